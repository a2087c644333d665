"""A sample as its source has it: members by ending, its JSON, its texts, the pieces of a long text."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field

from ..corpus import scan
from ..corpus.fields import parse_map
from ..errors import SampleError
from .settings import Settings

IMAGE_FILES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
AUDIO_FILES = ("flac", "wav", "ogg", "mp3", "oga", "opus", "aif", "aiff", "au", "caf", "m4a", "aac", "wma")
SIDE_CARS = ("txt", "json", "cls")
TABLE_TEXT = ("text", "caption", "txt", "captions")  # the text columns of tables, where none is named
LARGEST = 200_000_000  # bytes of one member, file or download


@dataclass
class Raw:
    """A sample as its source has it."""

    key: str
    members: dict[str, bytes]
    failed: list[tuple[str, SampleError]] = field(default_factory=list)


def dumped(row: dict) -> bytes:
    return json.dumps(_plain(row), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, (bytes, bytearray))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if not isinstance(v, (bytes, bytearray))]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def all_texts(members: dict[str, bytes], column: str) -> list[str]:
    """Every text of a sample, translations too: its `txt`, and of its JSON the text column and the captions.

    Where it has none of them, the fields that hold more than one word.
    """
    found = [members["txt"].decode("utf-8-sig", "replace")] if "txt" in members else []
    row = parse_map(members.get("json"))
    for name, value in row.items():
        if name == column or name in TABLE_TEXT or name.startswith("caption"):
            value = list(value.values()) if isinstance(value, dict) else value
            value = value if isinstance(value, list) else [value]
            found += [one for one in value if isinstance(one, str)]
    found = [text for text in found if text.strip()]
    if not found and not any(e in IMAGE_FILES or e in AUDIO_FILES for e in members):
        found = [value for value in row.values() if isinstance(value, str) and len(value.split()) > 1]
    return found


def cut(text: bytes, most: int) -> list[bytes]:
    """Pieces of at most `most` bytes that join to the text, cut as a shard of plain text is."""
    pieces, start = [], 0
    while len(text) - start > most:
        end = start + scan.cut(text[start : start + most + 1], most)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def pieces(raw: Raw, settings: Settings) -> list[Raw]:
    """The sample, or where it is text alone and that is long, its pieces: each keeps the other fields."""
    if any(ending in IMAGE_FILES or ending in AUDIO_FILES for ending in raw.members):
        return [raw]
    most, made = settings.piece_bytes, []
    if len(raw.members.get("txt", b"")) > most:
        made = [{"txt": piece} for piece in cut(raw.members["txt"], most)]
    elif "txt" not in raw.members and len(raw.members.get("json", b"")) > most:
        row = parse_map(raw.members.get("json"))
        column = next((c for c in (settings.text_column, *TABLE_TEXT) if isinstance(row.get(c), str)), None)
        if column and len(text := row[column].encode("utf-8", "replace")) > most:
            made = [{"json": dumped(row | {column: piece.decode()})} for piece in cut(text, most)]
    made = [new for new in made if new.get("txt", b"x").strip()]
    if len(made) < 2:
        return [raw]
    return [Raw(f"{raw.key}-{i:04d}", raw.members | new, raw.failed if not i else []) for i, new in enumerate(made)]


def safe_key(key: str) -> str:
    """Letters, digits, `_` and `-`, at most 60: a member's name before its ending, whatever the source called it."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_-") or "sample"
    if len(safe) > 60:
        safe = f"{safe[:47]}-{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"
    return safe
