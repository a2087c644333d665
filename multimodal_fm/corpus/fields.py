"""The fields of a sample's JSON."""

from __future__ import annotations

import json
import math

from ..errors import SampleError


def parse(data: bytes):
    """The JSON in `data`. Raises SampleError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("json", str(error)[:100]) from None


def parse_map(data: bytes | None) -> dict:
    """The JSON object in `data`; empty where there is none, or `data` is broken or something else."""
    try:
        row = parse(data) if data is not None else {}
    except SampleError:
        return {}
    return row if isinstance(row, dict) else {}


def lookup(row, name: str):
    """`row["a"]["b"]` for the name `a.b`; None where there is no such field."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def label_text(value, names: list[str] | None = None) -> str:
    """A label as text: a whole number as such, whatever type it was read as; empty where it is none.

    names: of classes that are stored as numbers.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        value = int(value) if value.is_integer() else value
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else ""
    return str(value).strip()


def label_texts(value) -> list[str]:
    """The labels of a sample that may have several, as text."""
    return [text for one in (value if isinstance(value, list) else [value]) if (text := label_text(one))]


def matches(row: dict, values: dict[str, str]) -> bool:
    """Whether each of the named fields has the given value, both compared as text."""
    return all(str(lookup(row, name)) == str(value) for name, value in values.items())
