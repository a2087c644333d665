"""The bytes of an index's items, found by what the index says of them, never by what a client says.

What a stranger put into a picture or a sound is data: it is sent under the type that its own first bytes show, or else
encoded again, and nothing is sent that is neither a picture nor a sound.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import warnings
from collections import OrderedDict

from ..corpus import storage
from ..corpus.index import Index as ShardIndex
from ..corpus.index import open_index
from ..corpus.shards import SHARDS
from ..errors import SampleError, UserError
from ..search.base import Item
from .limits import Limits

THUMBNAIL = 480  # pixels of the longer side
MAX_SHARDS = 64  # whose keys are held
MAX_MEDIUM = 200_000_000  # bytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class MediaReader:
    """Reads the media of an index.

    Args:
        remote: whether a source may be a URL. An index that somebody else made could name any.
    """

    def __init__(self, limits: Limits, remote: bool = False):
        self.limits, self.remote = limits, remote
        self._shards: OrderedDict[str, tuple[ShardIndex, dict[str, int]]] = OrderedDict()
        self._lock = threading.Lock()
        self._thumbnail = functools.lru_cache(maxsize=1024)(self._make_thumbnail)

    def read(self, item: Item) -> tuple[bytes, str]:
        """The medium of an item and its content type. Raises SampleError, and UserError where its source is gone."""
        if item.modality == "text":
            return item.text.encode("utf-8", "replace"), "text/plain; charset=utf-8"
        data = self._raw(item)
        kind = sniff(data)
        if kind.partition("/")[0] == item.modality:
            return data, kind
        if item.modality != "image":
            raise SampleError("decode", "no known kind of sound")
        return encode(data, self.limits.max_pixels), "image/png"

    def thumbnail(self, item: Item) -> tuple[bytes, str]:
        """A picture of at most `THUMBNAIL` pixels a side. Raises SampleError, UserError."""
        return self._thumbnail(item.id, item.source, item.key, item.member)

    def _make_thumbnail(self, id: str, source: str, key: str, member: str) -> tuple[bytes, str]:
        data = self._raw(Item(id, "image", source, key, member))
        return encode(data, self.limits.max_pixels, THUMBNAIL), "image/webp"

    def _raw(self, item: Item) -> bytes:
        if storage.is_remote(item.source) and not self.remote:
            raise SampleError("read", "its source is a URL; `mmfm serve --remote-media` allows to read these")
        if item.source.endswith(SHARDS):
            return self._member(item)
        if item.key:
            raise SampleError("read", "media of tables and of compressed shards are not shown; mmfm pack makes shards")
        size = storage.stat(item.source)[0]
        if size > MAX_MEDIUM:
            raise SampleError("byte-limit", f"{size} bytes, the limit is {MAX_MEDIUM}")
        return storage.read(item.source, 0, size)

    def _member(self, item: Item) -> bytes:
        shard, keys = self._shard(item.source)
        if item.key not in keys:
            raise SampleError("missing", "the shard has no sample of this key any more")
        members, failed = shard.read(keys[item.key], (item.member,), MAX_MEDIUM)
        if failed:
            raise failed[0][1]
        if item.member not in members:
            raise SampleError("missing", "the sample has no such member any more")
        return members[item.member]

    def _shard(self, source: str) -> tuple[ShardIndex, dict[str, int]]:
        with self._lock:
            if source not in self._shards:
                shard = open_index(source, write_index=False)
                shard.check()
                self._shards[source] = shard, {shard.key(number): number for number in range(len(shard))}
                if len(self._shards) > MAX_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(source)
            return self._shards[source]


def sniff(data: bytes) -> str:
    """The content type of what a browser shows or plays, by its first bytes; empty for all else."""
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    if data[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(data[8:12], "")
    if data[:4] == b"fLaC":
        return "audio/flac"
    if data[:4] == b"OggS":
        return "audio/ogg"
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xE6 == 0xE2):  # MPEG, layer III
        return "audio/mpeg"
    return ""


def check_picture(data: bytes, max_pixels: int) -> None:
    """Raises SampleError where the header announces more pixels than the limit, or there is none of a picture."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise SampleError("pixel-limit", f"the limit is {max_pixels:,}") from None
    except Exception:  # Pillow's readers raise nearly anything on damaged bytes
        raise SampleError("decode", "no known picture format") from None
    if width * height > max_pixels:
        raise SampleError("pixel-limit", f"{width} x {height}, the limit is {max_pixels:,}")


def check_sound(data: bytes, max_seconds: float) -> None:
    """Raises SampleError where the header announces more seconds than the limit, or there is none of a sound."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(data))
    except Exception:
        raise SampleError("decode", "no known kind of sound (wav, flac, ogg or mp3)") from None
    if info.samplerate <= 0 or info.frames <= 0:
        raise SampleError("empty", "no samples")
    if info.frames > max_seconds * info.samplerate:
        raise SampleError("duration-limit", f"{info.duration:.0f} seconds, the limit is {max_seconds:g}")


def encode(data: bytes, max_pixels: int, side: int = 0) -> bytes:
    """A picture encoded again: as PNG, or with `side` as WebP of at most so many pixels a side. Raises SampleError."""
    from PIL import Image, ImageOps

    check_picture(data, max_pixels)
    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if side:
                picture.draft("RGB", (side, side))
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            whole = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            if side:
                whole.thumbnail((side, side))
            whole.save(out, "WEBP" if side else "PNG", **({"quality": 82, "method": 2} if side else {}))
    except SampleError:
        raise
    except Exception as error:
        raise SampleError("decode", f"{type(error).__name__}: {error}"[:100]) from None
    return out.getvalue()


def file_name(item: Item, kind: str) -> str:
    """A name under which a browser may save it: nothing in it is obeyed by a shell, a path or a header."""
    stem = item.key or os.path.splitext(os.path.basename(item.source))[0]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)[:80] or "medium"
    ending = {"image/jpeg": "jpg", "audio/mpeg": "mp3"}.get(kind, kind.partition(";")[0].partition("/")[2])
    return f"{safe}.{'txt' if ending == 'plain' else ending}"


def cut_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end of `bytes=START-END` in `size` bytes; None where it is no such range. Raises UserError where it
    lies outside."""
    unit, _, span = header.partition("=")
    first, dash, last = span.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or not all(part == "" or _digits(part) for part in (first, last)):
        return None
    if not first:
        start, stop = max(size - int(last), 0) if last else size, size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    if start >= size or (not first and last == "0"):
        raise UserError("the range lies outside of the medium")
    return (start, stop) if start < stop else None


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19
