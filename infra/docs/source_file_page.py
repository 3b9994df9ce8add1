"""All keys of a source file as a page, docs/reference/source-file.md: `make reference`."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, get_args

from pydantic.fields import FieldInfo

from jobs.core.source_file import Source

HEAD = """# The source file: all keys

<!-- Made by `make reference` from jobs/core/source_*.py. Change it there. -->

A file `infra/sources/<name>.toml` describes one log. A key that is not listed here is refused.
"""
SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "integer": "whole number", "boolean": "true, false"}


def page(examples: Mapping[tuple[str, str], str]) -> str:
    """`examples`: (section, key) -> a line of a source file that sets the key."""
    fields = Source.model_fields.items()
    return HEAD + "".join(_section(name, field, examples) for name, field in fields)


def _section(name: str, section: FieldInfo, examples: Mapping[tuple[str, str], str]) -> str:
    # One that may be left out altogether is `Part | None`.
    kinds = get_args(section.annotation) or (section.annotation,)
    part = next(kind for kind in kinds if kind is not type(None))
    schema, meaning = part.model_json_schema(), texts_under(part)
    required = schema.get("required", ())
    lines = [
        f"\n## [{name}]\n",
        f"{inspect.getdoc(part)} {'Required.' if section.is_required() else 'May be left out.'}\n",
        "| key | type | default | allowed | meaning | example |",
        "|---|---|---|---|---|---|",
    ]
    for key, about in schema["properties"].items():
        kind, allowed = _kind(about)
        default = "required" if key in required else _default(about.get("default"))
        example = examples.get((name, key), "")
        cells = (f"`{key}`", kind, default, allowed, meaning[key], example and f"`{example}`")
        lines.append("| " + " | ".join(_cell(one) for one in cells) + " |")
    return "\n".join(lines) + "\n"


def texts_under(part: type) -> dict[str, str]:
    """The text under each field of a class. (pydantic's `use_attribute_docstrings` reads it at every import, of
    DAG files too, and doubles the time that takes.)"""
    (tree,) = ast.parse(inspect.getsource(part)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for one, after in pairwise(tree.body):
        match one, after:
            case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                found[key] = " ".join(text.split())
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(value: Any) -> str:
    return "none" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _kind(about: dict[str, Any]) -> tuple[str, str]:
    """The type of a key, and which of its values are allowed, from its JSON schema."""
    several = [one for one in about.get("anyOf", ()) if one.get("type") != "null"]
    if len(several) > 1:
        return " or ".join(_kind(one)[0] for one in several), ""
    about = several[0] if several else about
    if "oneOf" in about:  # words, or keys of its own
        words = [_kind(one)[1] for one in about["oneOf"] if "enum" in one]
        return "text, or a table", f"{words[0]}, a table" if words else ""
    if "$ref" in about:
        return "table", ""
    if "enum" in about:
        return "text", ", ".join(f"`{one}`" for one in about["enum"])
    if about["type"] == "array":
        return f"list of {_kind(about['items'])[0]}s", ""
    if about["type"] == "object":
        inner = _kind(about["additionalProperties"])[0]
        low, high = about.get("minProperties"), about.get("maxProperties")
        return f"table: {inner} by column", f"{low} to {high} entries" if low else ""
    if about.get("format") == "date":
        return "date", ""
    kind = TYPES.get(about["type"], about["type"])
    limits = [f"{sign} {_figure(about[name])}" for name, sign in SIGNS.items() if name in about]
    if about.get("maxLength") == 1:
        return "character", ""
    return kind, " and ".join(limits) or ("not empty" if about.get("minLength") else "")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
