"""Writes docs/config.md, the reference of all configuration keys, from the dataclasses and the comments in them.

python docs/make_config.py            # writes it
python docs/make_config.py --check    # exits with 1 where it is out of date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from multimodal_fm.config import Folder, plugin_class, plugin_names, to_data
from multimodal_fm.train.config import TrainConfig

FILE = Path(__file__).with_name("config.md")
HEAD = """# Configuration reference

Made by `docs/make_config.py` from the dataclasses that stand beside what they set: change the comments there, then run
`make docs`.

A run is one YAML file: `mmfm pretrain CONFIG.yaml [key=value ...]`. Dots in a key go deeper, the value is YAML, and
what is given on the command line stands in for the file's: `mmfm pretrain mine.yaml steps=50 model.backbone.width=128`.
A key that does not exist, or a value that cannot be, stops the run before it starts; all that is wrong comes in one
message. NAME is a name of your own. A tokenizer, an objective or a head is chosen by the name of its entry, or by
`tokenizer:`, `objective:` or `head:` within it where the entry should be called otherwise; with a dot in it that is the
import path of a file of your own ([how to write one](extending.md)). YAML's plain words are those of its version 1.2:
`yes`, `no`, `on` and `off` are text, and 1e-3 is a number.
"""


def comments(cls: type) -> dict[str, str]:
    """What stands beside each field of a dataclass or of its bases: a comment in its line, or a string below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.cleandoc("\n" + inspect.getsource(base))
        lines = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0]] = token.string.lstrip("# ")
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said = [lines[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in lines]
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    said.append(inspect.cleandoc(str(after.value.value)).replace("\n", " "))
                found[node.target.id] = " ".join(said)
    return found


def describe(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is list:
        return f"list of {describe(args[0])}"
    if origin is dict:
        return f"map of {describe(args[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(hint, "keys")


def default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "needed"
    if dataclasses.is_dataclass(value) and value == type(value)():
        return "as below"
    if dataclasses.is_dataclass(value):  # of its keys those that are not at their own default
        usual = to_data(type(value)())
        value = {key: one for key, one in to_data(value).items() if one != usual[key]}
    return {"": "empty", None: "none"}.get(value, "") if value in ("", None) else f"`{yaml_flow(to_data(value))}`"


def yaml_flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_flow, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def children(path: str, cls: type) -> list[tuple[str, type]]:
    """The dataclasses of what lies below one, with their paths; for plug-ins those of each built-in one."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        here, args = f"{path}.{name}".lstrip("."), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            found.append((here, hint))
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1]):
            found.append((f"{here}.NAME", args[1]))
        elif typing.get_origin(hint) is dict and typing.get_origin(args[1]) is Annotated:
            folder: Folder = typing.get_args(args[1])[1]
            names = plugin_names(folder.name)
            found += [(f"{here}.{name}", plugin_class(folder, name).Config) for name in names]
    return found


def section(path: str, cls: type, homes: dict[type, str]) -> list[str]:
    """The keys of a dataclass as a table, then the sections of what lies below it. homes: where each is written out."""
    lines = [f"## `{path}`\n" if path else "## The run\n"]
    if homes[cls] != path:
        return [*lines, f"The keys of [`{homes[cls]}`](#{homes[cls].lower().replace('.', '')}).\n"]
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):
        lines.append(inspect.cleandoc(cls.__doc__) + "\n")
    said, hints = comments(cls), typing.get_type_hints(cls, include_extras=True)
    lines += ["| key | is | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        meaning = said.get(field.name, "").replace("|", "\\|").rstrip(".")
        if not meaning:
            raise SystemExit(f"{cls.__module__}.{cls.__name__}.{field.name}: no comment says what it is")
        lines.append(f"| `{field.name}` | {describe(hints[field.name])} | {default(field)} | {meaning} |")
    return [*lines, "", *(line for below in children(path, cls) for line in section(*below, homes))]


def reference() -> str:
    """The page."""
    homes: dict[type, str] = {}
    queue: list[tuple[str, type]] = [("", TrainConfig)]
    while queue:  # the shortest path of each is its home
        path, cls = queue.pop(0)
        if homes.setdefault(cls, path) == path:
            queue += children(path, cls)
    return "\n".join([HEAD, *section("", TrainConfig, homes)]).rstrip() + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        FILE.write_text(reference(), encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != reference():
        sys.exit(f"{FILE} is out of date: make docs")


if __name__ == "__main__":
    main()
