"""The code that a registered model runs, as a package with a name of its own.

A version ships the modules that its entry module imports, found by reading import statements, and
nothing else. The package is called `sessionmill_serving_<hash of its contents>`: versions of other
code live beside it in one process, and beside anybody's package `models`; the same code has the same
name and is loaded once. (MLflow puts a version's code on `sys.path` and imports it by its name, so
that of two packages of one name the first one loaded would serve both: mlflow#12377.)
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


def package(root: Path, entry: str) -> Package:
    """The package of what the module `entry` (below the package folder `root`) imports.

    Raises:
        UserError: a module imports in a way that cannot be followed.
    """
    found = closure(root, entry)
    texts = {name: file.read_text(encoding="utf-8") for name, file in found.items()}
    paths = {name: file.relative_to(root).as_posix() for name, file in found.items()}
    digest = hashlib.sha256()
    for name in sorted(texts):
        text = renamed(texts[name], root.name, NAME)
        digest.update(f"{paths[name]}\0{len(text)}\0{text}\0".encode())
    called = f"{NAME}_{digest.hexdigest()[:16]}"
    files = {paths[name]: renamed(text, root.name, called) for name, text in texts.items()}
    return Package(called, called + entry.removeprefix(root.name), files)


def closure(root: Path, entry: str) -> dict[str, Path]:
    """Module name -> file of `entry` and all that it imports of the package at `root`, wherever in
    a module the statement is; not what only type checkers import."""
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        file = _file(root, name)
        if name in found:
            continue
        if file is None:
            raise UserError(f"there is no module {name} in {root}")
        found[name] = file
        waiting += [name.rpartition(".")[0]] if "." in name else []
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for node in _nodes(tree):
            _check(node, root.name, file)
            if isinstance(node, ast.ImportFrom):
                waiting += _targets(node, name, root, is_package=file.name == "__init__.py")
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


def _targets(node: ast.ImportFrom, name: str, root: Path, *, is_package: bool) -> list[str]:
    """The modules of the package that a `from … import …` of the module `name` loads."""
    base = node.module or ""
    if node.level:
        parts = name.split(".")
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, *([base] if base else [])])
    if not _inside(base, root.name):
        return []
    below = [f"{base}.{alias.name}" for alias in node.names]
    return [base, *(one for one in below if _file(root, one))]


def _check(node: ast.AST, package: str, file: Path) -> None:
    """Raises:
    UserError: the node imports, or reads a file, in a way that cannot be followed.
    """
    said, line = "", getattr(node, "lineno", 0)
    if isinstance(node, ast.Import):
        ours = [one.name for one in node.names if _inside(one.name, package)]
        said = f"import {ours[0]}" if ours else ""
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        said = name if name in OUT_OF_SIGHT else ""
    if said:
        raise UserError(
            f"{file}, line {line}: `{said}` cannot be shipped with a registered model. "
            f"Write `from {package}.… import …`, and keep what reads its own files out of serving"
        )
