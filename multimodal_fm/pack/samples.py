"""A sample as read from its source, its texts, and the pieces of a long text."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..corpus import scan
from ..corpus.fields import parse_map
from ..errors import SampleError
from ..tokenizers.text import DOCUMENTS
from .settings import Settings

IMAGE_FILES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
AUDIO_FILES = ("flac", "wav", "ogg", "mp3", "oga", "opus", "aif", "aiff", "au", "caf", "m4a", "aac", "wma")
SIDECARS = ("txt", "json", "cls")
TEXT_COLUMNS = ("text", "caption", "txt", "captions")  # used where no text column is named
MAX_BYTES = 200_000_000  # of one member, file or download


@dataclass
class RawSample:
    """A sample as read from its source: members (bytes by extension) and those that could not be read."""

    key: str
    members: dict[str, bytes]
    failed: list[tuple[str, SampleError]] = field(default_factory=list)

    @property
    def has_media(self) -> bool:
        return any(modality_of(extension) in ("image", "audio") for extension in self.members)


def modality_of(extension: str) -> str:
    """The modality that a member of this extension belongs to; the extension itself where it is none."""
    if extension in IMAGE_FILES:
        return "image"
    return "audio" if extension in AUDIO_FILES else "text" if extension in ("txt", "json") else extension


def encode_json(row: dict) -> bytes:
    """UTF-8 JSON; bytes are left out, NaN and infinity become null, lone surrogates are escaped."""
    return json.dumps(_jsonable(row), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


def _jsonable(value):
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items() if not isinstance(v, (bytes, bytearray))}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value if not isinstance(v, (bytes, bytearray))]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect_texts(sample: RawSample, row: dict, column: str) -> tuple[list[str], set[str]]:
    """All texts of a sample, translations included, and the fields of its JSON `row` that hold them.

    These are its `txt`, the text column and the captions. A sample without any of them and without media falls back to
    the fields of more than one word.
    """
    texts, fields = [], set()
    if "txt" in sample.members:
        texts.append(sample.members["txt"].decode("utf-8-sig", "replace"))
    for name, value in row.items():
        if name == column or name in TEXT_COLUMNS or name.startswith("caption"):
            values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if strings := [one for one in values if isinstance(one, str)]:
                texts += strings
                fields.add(name)
    texts = [text for text in texts if text.strip()]
    if not texts and not sample.has_media:
        fields = {name for name, value in row.items() if isinstance(value, str) and len(value.split()) > 1}
        texts = [row[name] for name in row if name in fields]
    return texts, fields


def cut_text(text: bytes, max_bytes: int) -> list[bytes]:
    """Pieces of at most `max_bytes` that join to the text, cut at the same points as a shard of plain text."""
    pieces, start = [], 0
    while len(text) - start > max_bytes:
        end = start + scan.find_cut(text[start : start + max_bytes + 1], max_bytes)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def cut_sample(sample: RawSample, settings: Settings) -> list[RawSample]:
    """The sample itself, or the pieces of one that is nothing but a long text; each piece keeps the other fields."""
    limit, changed = settings.max_text, []
    if sample.has_media:
        return [sample]
    if len(sample.members.get("txt", b"")) > limit:
        changed = [{"txt": piece} for piece in cut_text(sample.members["txt"], limit) if piece.strip()]
    elif "txt" not in sample.members and len(sample.members.get("json", b"")) > limit:
        row = parse_map(sample.members["json"])
        column = next((c for c in (settings.text_column, *TEXT_COLUMNS) if isinstance(row.get(c), str)), None)
        if column and len(text := row[column].encode("utf-8", "replace")) > limit:
            changed = [{"json": encode_json(row | {column: piece.decode()})} for piece in cut_text(text, limit)]
    if len(changed) < 2:
        return [sample]
    return [
        RawSample(f"{sample.key}-{i:04d}", sample.members | new, sample.failed if not i else [])
        for i, new in enumerate(changed)
    ]


def join_documents(samples: Iterable[dict], block_bytes: int, column: str) -> Iterator[dict]:
    """The samples of a shard, with those that are nothing but one text joined to blocks of several documents.

    A block holds texts that follow each other, of at most `block_bytes` bytes together, as the list `documents` of its
    JSON, and their keys as `keys`; its own key is that of the first. A text that is longer is a block of its own. Other
    fields of the texts are left out; samples with media, a class or several texts stay as they are.
    """
    keys, texts, size = [], [], 0
    for sample in samples:
        text = _only_text(sample, column)
        if keys and (text is None or size + len(text.encode("utf-8", "replace")) > block_bytes):
            yield _block(keys, texts)
            keys, texts, size = [], [], 0
        if text is None:
            yield sample
            continue
        keys.append(sample["__key__"])
        texts.append(text)
        size += len(text.encode("utf-8", "replace"))
    if keys:
        yield _block(keys, texts)


def _block(keys: list[str], texts: list[str]) -> dict:
    return {"__key__": keys[0], "json": encode_json({DOCUMENTS: texts, "keys": keys})}


def _only_text(sample: dict, column: str) -> str | None:
    """The text of a sample that has nothing else to learn from; None where it has media, a class or several texts."""
    members = {name: data for name, data in sample.items() if name != "__key__"}
    if not members.keys() <= {"txt", "json"}:
        return None
    texts, _ = collect_texts(RawSample("", members), parse_map(members.get("json")), column)
    return texts[0] if len(texts) == 1 else None


def safe_key(key: str) -> str:
    """The key as at most 60 letters, digits, `_` and `-`, so that it is safe as the name of a member."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_-") or "sample"
    if len(safe) > 60:
        safe = f"{safe[:47]}-{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"
    return safe


ID_FIELD = re.compile(
    r"(?i:(?:.*_)?(?:ids?|idx|index(?:_level_\d+_*)?|key|u?uid|guid|ur[li]|path|file_?(?:name|path)?|sha256|md5|width|height))"
    r"|.*[a-z](?:I[dD]|Key|U[Rr][LlIi]|Path)"
)
"""Fields that name a sample, say where it came from or follow from its bytes: copies may differ in them."""


def content_fields(row, ignored: set[str] | frozenset[str] = frozenset()):
    """The fields of a JSON row that are content, at any depth: all but ids and those that are `ignored`."""
    if isinstance(row, dict):
        kept = {k: content_fields(v) for k, v in row.items() if k not in ignored and not ID_FIELD.fullmatch(str(k))}
        return {k: v for k, v in kept.items() if v not in (None, "", {}, [])}
    return [content_fields(one) for one in row] if isinstance(row, list) else row
