"""The messages of errors that a person can mend, read from the code with `ast`.

Collected is every `raise X("…")` of an error class below, wherever its text can be read: a literal, an
f-string (what is filled in becomes `…`, or its name), a choice between texts, a variable of the same
function, or a function of ours that returns a text or an error. What is put together otherwise is
counted, and listed by place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("jobs", "models", "expectations", "dags")
CLASSES = {
    "SettingsError": ("An option, an environment variable or something outside does not allow the command.", "Correct what the message names, and run the command again."),
    "SourceError": ("A source file has a mistake. Nothing was read.", "Correct the key that the message names."),
    "ValueError": ("The same, as a check of one key or section; printed with the file, the key and its value before it.", "Correct the key that the message names."),
    "SchemaError": ("A landing file is not what the source file promises.", "Correct the source file, or have the file delivered again; then run the command again."),
    "Unusable": ("The same, found while the file is read.", "As `SchemaError`."),
    "RejectShareError": ("Too many lines of a run cannot be used.", "The message has three lines and the keys that would mend them. Correct the source file and run it again: the files are read again."),
    "AuditFailed": ("Rows break a check. The table stays at its last good version.", "The message names the checks and the rows, or the command that repairs the table."),
    "AuditErrored": ("A check could not be evaluated. Nothing is known about the rows.", "Mend what the message names, and run the step again."),
    "RuleChanged": ("The sessions were made by another session rule.", "Run the command that the message names."),
    "TableLost": ("Another writer put older or other rows in place of a table of the log.", "Run the command that the message names."),
    "InputChanged": ("Another writer changed a derived table that is about to be read.", "Run the job that the message names, or `python -m jobs run`."),
    "TableRefused": ("Another writer gave a table a setting that cannot be handled. Nothing was written.", "Undo the setting by the statement that the message names."),
    "FeedGone": ("Changes of a table can no longer be read; the run makes what depends on them anew.", "Nothing."),
    "Conflict": ("Another run changed the table in the meantime.", "Let it end, and run the command again."),
    "UserError": ("An option, or something that `python -m models` needs, is wrong or missing.", "Correct what the message names."),
    "ArgumentTypeError": ("The value of an option cannot be read.", "Write it as the message says."),
    "AirflowFailException": ("A task of a DAG failed and is not tried again.", "Do what the message says, and clear the task."),
    "AirflowSkipException": ("A task of a DAG was skipped. This is not an error.", "Nothing."),
}  # fmt: skip
"""Error class -> what it means, and what to do where the message does not say more."""
ONLY_IN = {
    "ValueError": tuple(
        f"jobs/core/source_{part}.py" for part in ("file", "log", "events", "rules")
    )
}
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
DEPTH = 4


@dataclass(frozen=True, order=True)
class Message:
    kind: str
    where: str
    text: str


@dataclass(frozen=True)
class Collected:
    messages: tuple[Message, ...]
    composed: tuple[tuple[str, str], ...]  # (class, module.function) of texts that cannot be read


def collected(repo: Path) -> Collected:
    trees = {
        file.relative_to(repo).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for file in sorted((repo / folder).rglob("*.py"))
    }
    reader = _Reader(trees)
    messages: set[Message] = set()
    composed: set[tuple[str, str]] = set()
    for file, tree in trees.items():
        for function, kind, text in reader.raised(file, tree):
            if file not in ONLY_IN.get(kind, (file,)):
                continue
            if text is None:
                composed.add((kind, f"{file}: {function}"))
            else:
                messages.add(Message(kind, file, text))
    return Collected(tuple(sorted(messages)), tuple(sorted(composed)))


class _Reader:
    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.functions: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
        for file, tree in trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append((file, node))

    def raised(self, file: str, tree: ast.Module) -> Iterator[tuple[str, str, str | None]]:
        """(function, class, text or None) of each raise in a file."""
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in _own(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    for kind, text in self.error(node.exc, file, function, DEPTH):
                        if text != "":
                            yield function.name, kind, text

    def error(
        self, call: ast.Call, file: str, function: ast.FunctionDef, depth: int
    ) -> Iterator[tuple[str, str | None]]:
        """(class, text) of an expression that makes an error; nothing where it is none of ours."""
        name = _name(call)
        if name in CLASSES:
            if not call.args:
                return
            if _passes_on(call.args[0]):
                return  # the text of another error, which is collected where it is raised
            texts = list(self.texts(call.args[0], file, function, depth))
            if not texts:
                yield name, None
            yield from ((name, text) for text in texts)
        elif depth and name is not None and (made := self.function(name, file)) is not None:
            for node in _own(made[1]):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                    for kind, text in self.error(node.value, made[0], made[1], depth - 1):
                        yield kind, _filled(text, call, made[1], self, file, function)

    def texts(
        self, node: ast.expr, file: str, function: ast.FunctionDef, depth: int
    ) -> Iterator[str]:
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=values):
                yield "".join(_part(one) for one in values)
            case ast.IfExp(body=body, orelse=other):
                yield from self.texts(body, file, function, depth)
                yield from self.texts(other, file, function, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                ends = list(self.texts(right, file, function, depth)) or ["…"]
                for start in self.texts(left, file, function, depth):
                    yield from (start + end for end in ends)
            case ast.Name(id=name) if depth:
                for one in _own(function):
                    if isinstance(one, ast.Assign) and name in map(_target, one.targets):
                        yield from self.texts(one.value, file, function, depth - 1)
            case ast.Call() if depth and (called := _name(node)) is not None:
                if (made := self.function(called, file)) is not None:
                    for one in _own(made[1]):
                        if isinstance(one, ast.Return) and one.value is not None:
                            yield from self.texts(one.value, made[0], made[1], depth - 1)

    def function(self, name: str, file: str) -> tuple[str, ast.FunctionDef] | None:
        """The function that a name means: of this file, or the only one of that name."""
        found = self.functions.get(name, [])
        here = [one for one in found if one[0] == file]
        return here[0] if len(here) == 1 else found[0] if len(found) == 1 else None


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            todo = [*ast.iter_child_nodes(node), *todo]


def _name(call: ast.Call) -> str | None:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def _target(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _passes_on(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _name(node) == "str"


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.FormattedValue)
    shown = ast.unparse(node.value)
    name = shown.split(".")[-1].strip("_") if PLAIN.fullmatch(shown) else ""
    return f"<{name}>" if name else "<…>"


def _filled(
    text: str | None,
    call: ast.Call,
    made: ast.FunctionDef,
    reader: _Reader,
    file: str,
    function: ast.FunctionDef,
) -> str | None:
    """Texts that are handed to a function which makes the error, in their places."""
    if text is None:
        return None
    names = [one.arg for one in made.args.args]
    names = names[1:] if names[:1] == ["self"] else names
    given = dict(zip(names, call.args)) | {one.arg: one.value for one in call.keywords if one.arg}
    for name, value in given.items():
        if f"<{name}>" in text and not isinstance(value, ast.Name):
            found = list(reader.texts(value, file, function, 1))
            if len(found) == 1:
                text = text.replace(f"<{name}>", found[0])
    return text


def page(repo: Path, table: Callable[[tuple[str, ...], Iterable[tuple[str, ...]]], str]) -> str:
    found = collected(repo)
    text = (
        "Messages of errors that a person can mend, as the code has them; `<name>` stands for what is filled in. "
        "They are printed without a stack, after `<job> stopped:` or `error:`. A message names the thing, its "
        "value and what to do; where it does not say what to do, the sentence above the table does.\n"
    )
    for kind, (meaning, remedy) in CLASSES.items():
        mine = [one for one in found.messages if one.kind == kind]
        if not mine:
            continue
        text += f"\n## {kind}\n\n{meaning} **What to do:** {remedy}\n\n"
        rows = [(_literal(one.text), f"`{one.where}`") for one in mine]
        text += table(("message", "raised in"), rows)
    if found.composed:
        text += (
            "\n## Not listed\n\nThese messages are put together when they are needed, so the text cannot be read from the "
            "code. They follow the same form.\n\n"
        )
        text += table(
            ("error", "made in"), [(f"`{kind}`", f"`{where}`") for kind, where in found.composed]
        )
    return text


def _literal(text: str) -> str:
    """A message as Markdown shows it, word for word."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_\[\]#])", r"\\\1", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")
