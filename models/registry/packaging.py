"""The code that a registered model runs, as a package with a name of its own.

A version ships the modules that its entry module imports, of its own package and of some beside it,
found by reading import statements, and nothing else. The package is called `sessionmill_serving_<hash of its contents>`: versions of other
code live beside it in one process, and beside anybody's package `models`; the same code has the same
name and is loaded once. (MLflow puts a version's code on `sys.path` and imports it by its name, so
that of two packages of one name the first one loaded would serve both: mlflow#12377.)

Decision 13 in docs/design/decisions.md.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.core.errors import UserError

NAME = "sessionmill_serving"
# They name modules or files in ways that reading import statements does not find.
OUT_OF_SIGHT = ("__file__", "__import__", "import_module")
LOADER = '''"""The file that MLflow runs to load this model; its code is beside it. No pickle."""

from mlflow.models import set_model

from {module} import SessionRecommender

set_model(SessionRecommender())
'''


@dataclass(frozen=True)
class Package:
    """Python files under a name of their own.

    entry: name of the module that defines `SessionRecommender`.
    files: path below the package's folder -> text.
    """

    name: str
    entry: str
    files: dict[str, str]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The file that loads the model, and the package's folder."""
        for path, text in self.files.items():
            file = folder / self.name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        loader = folder / "pyfunc.py"
        loader.write_text(LOADER.format(module=self.entry), encoding="utf-8")
        return loader, folder / self.name

    @contextmanager
    def importable(self, folder: Path) -> Iterator[None]:
        """The package can be imported from `folder`, where it was written, until the end."""
        there = self.name in sys.modules
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
            if not there:  # the folder may go: whoever loads this code next brings their own
                for name in [one for one in sys.modules if _inside(one, self.name)]:
                    del sys.modules[name]


def package(root: Path, entry: str, beside: tuple[Path, ...] = ()) -> Package:
    """The package of what the module `entry` (below the package folder `root`) imports.

    Args:
        beside: folders of other packages that are shipped with it, below its own name.

    Raises:
        UserError: a module imports in a way that cannot be followed.
    """
    found = closure(root, entry, beside)
    texts = {name: file.read_text(encoding="utf-8") for name, file in found.items()}
    paths = {name: _below(file, root, beside) for name, file in found.items()}
    digest = hashlib.sha256()
    for name in sorted(texts):
        text = _under(NAME, texts[name], root, beside)
        digest.update(f"{paths[name]}\0{len(text)}\0{text}\0".encode())
    called = f"{NAME}_{digest.hexdigest()[:16]}"
    files = {paths[name]: _under(called, text, root, beside) for name, text in texts.items()}
    return Package(called, called + entry.removeprefix(root.name), files)


def _below(file: Path, root: Path, beside: tuple[Path, ...]) -> str:
    """A file's path in the package that is shipped."""
    for other in beside:
        if file.is_relative_to(other):
            return file.relative_to(other.parent).as_posix()
    return file.relative_to(root).as_posix()


def _under(name: str, text: str, root: Path, beside: tuple[Path, ...]) -> str:
    """The module's text as it imports in the package that is shipped as `name`."""
    for other in beside:
        text = renamed(text, other.name, f"{name}.{other.name}")
    return renamed(text, root.name, name)


def closure(root: Path, entry: str, beside: tuple[Path, ...] = ()) -> dict[str, Path]:
    """Module name -> file of `entry` and all that it imports of the packages at `root` and
    `beside`, wherever in a module the statement is; not what only type checkers import."""
    roots = (root, *beside)
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        file = _found(name, roots)
        if file is None:
            raise UserError(f"there is no module {name} in {root}")
        found[name] = file
        waiting += [name.rpartition(".")[0]] if "." in name else []
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for node in _nodes(tree):
            _check(node, roots, file)
            if isinstance(node, ast.ImportFrom):
                waiting += _targets(node, name, roots, is_package=file.name == "__init__.py")
    return found


def renamed(text: str, old: str, new: str) -> str:
    """The module's text with `from old…` imports, also those of type checkers, from `new`."""
    lines = text.encode().splitlines(keepends=True)  # (columns of `ast` are bytes)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and _inside(node.module or "", old):
            at, column = node.lineno - 1, node.col_offset
            before, rest = lines[at][:column], lines[at][column:]
            lines[at] = before + re.sub(rb"^(from\s+)\w+", rb"\1" + new.encode(), rest)
    return b"".join(lines).decode()


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _found(name: str, roots: tuple[Path, ...]) -> Path | None:
    """The file of a module of one of these packages."""
    return next((_file(root, name) for root in roots if _inside(name, root.name)), None)


def _file(root: Path, name: str) -> Path | None:
    path = root.parent.joinpath(*name.split("."))
    places = (path / "__init__.py", path.with_name(path.name + ".py"))
    return next((place for place in places if place.is_file()), None)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _nodes(other)
        else:
            yield from _nodes(child)


def _targets(
    node: ast.ImportFrom, name: str, roots: tuple[Path, ...], *, is_package: bool
) -> list[str]:
    """The modules of the packages that a `from … import …` of the module `name` loads."""
    base = node.module or ""
    if node.level:
        parts = name.split(".")
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, *([base] if base else [])])
    if not any(_inside(base, root.name) for root in roots):
        return []
    below = [f"{base}.{alias.name}" for alias in node.names]
    return [base, *(one for one in below if _found(one, roots))]


def _check(node: ast.AST, roots: tuple[Path, ...], file: Path) -> None:
    """Raises:
    UserError: the node imports, or reads a file, in a way that cannot be followed.
    """
    said, line = "", getattr(node, "lineno", 0)
    if isinstance(node, ast.Import):
        names = [one.name for one in node.names]
        ours = [one for one in names if any(_inside(one, root.name) for root in roots)]
        said = f"import {ours[0]}" if ours else ""
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        said = name if name in OUT_OF_SIGHT else ""
    if said:
        raise UserError(
            f"{file}, line {line}: `{said}` cannot be shipped with a registered model. "
            f"Write `from {roots[0].name}.… import …`, and keep what reads its own files out of serving"
        )
