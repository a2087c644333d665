"""What a shard holds, found by reading it through: samples, their members' places, and what is refused."""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from . import storage, tar

LARGEST = 2**32 - 1  # bytes of a member
KINDS = 2**16 - 1  # endings, and makeups, that a shard may have
CHUNK = 1 << 22  # bytes that are read at a time


class Window:
    """Reads a file in large strides, for a walk that asks for little at a time."""

    def __init__(self, path: str, size: int):
        self.path, self.size, self.start, self.data = path, size, 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        if not self.start <= offset <= offset + length <= self.start + len(self.data):
            self.start = offset
            self.data = storage.read(self.path, offset, max(length, min(CHUNK, self.size - offset)))
        return self.data[offset - self.start : offset - self.start + length]


@dataclass
class Found:
    """What a scan collects."""

    keys: list[str] = dataclasses.field(default_factory=list)
    samples: list[dict[str, tuple[int, int]]] = dataclasses.field(default_factory=list)
    refused: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)


def scan(shard: str, read: Window, piece: int) -> Found:
    """The samples of a shard, a .tar, .jsonl or .txt. Raises OSError, SampleError."""
    if shard.endswith(".tar"):
        found = _tar(read)
    elif shard.endswith(".jsonl"):
        found = _lines(read)
    else:
        found = _paragraphs(read, piece)
    _of_few_modalities(found)
    return found


def _of_few_modalities(found: Found) -> None:
    """Takes out what has endings of its own, where there are more of those than an index can count."""
    endings, makeups = set(), set()
    for key, sample in zip(found.keys, found.samples, strict=True):
        for ending in [e for e in sample if e not in endings]:
            if len(endings) < KINDS:
                endings.add(ending)
            else:
                offset, _ = sample.pop(ending)
                detail = f"more than {KINDS} endings in one shard, at byte {offset}: a key ends at the first dot"
                found.refused.append((key, ending, "name", detail))
        if tuple(sample) not in makeups and len(makeups) == KINDS:
            found.refused.append((key, "", "name", f"more than {KINDS} sets of endings in one shard"))
            sample.clear()
        if sample:
            makeups.add(tuple(sample))
    kept = [(key, sample) for key, sample in zip(found.keys, found.samples, strict=True) if sample]
    found.keys, found.samples = [key for key, _ in kept], [sample for _, sample in kept]


def _tar(read: Window) -> Found:
    """Neighbouring members of one stem are a sample, as in webdataset."""
    found, seen, key, sample, repeated = Found(), set(), None, {}, False

    def refuse(key: str, part: str, reason: str, detail: str) -> None:
        found.refused.append((key, part, reason, detail))

    def close() -> None:
        if sample:
            found.keys.append(key)
            found.samples.append(dict(sample))

    for one in tar.walk(read, read.size):
        if isinstance(one, tar.Fault):
            refuse(*_split(one.name), one.reason, f"{one.detail}, at byte {one.offset}")
            continue
        own, ending = _split(one.name)
        if not own or not ending:
            continue
        if own != key:
            close()
            key, sample, repeated = own, {}, own in seen
            seen.add(own)
            if repeated:
                refuse(own, "", "duplicate", f"the key came before, and again at byte {one.offset}")
        if repeated:
            continue
        if ending in sample:
            refuse(own, ending, "duplicate", f"at byte {sample[ending][0]}, and again at byte {one.offset}")
        elif one.size > LARGEST:
            refuse(own, ending, "byte-limit", f"{one.size} bytes at byte {one.offset}")
        else:
            sample[ending] = (one.offset, one.size)
    close()
    return found


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member's name; the ending begins at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (folder + slash + stem if stem else ""), ending.lower()


def _lines(read: Window) -> Found:
    """A line a sample. However long it is, only a stretch of it is in memory."""
    found, size, start, number, blank = Found(), read.size, 0, 0, True
    for at in range(0, size, CHUNK):
        *ends, rest = read(at, min(CHUNK, size - at)).split(b"\n")
        place = at
        for stretch in ends:
            end = place + len(stretch)
            _line(found, number, start, end, blank and not stretch.strip())
            place, start, number, blank = end + 1, end + 1, number + 1, True
        blank = blank and not rest.strip()
    _line(found, number, start, size, blank)
    if not size:
        found.refused.append(("", "", "empty", "no bytes"))
    return found


def _line(found: Found, number: int, start: int, end: int, blank: bool) -> None:
    if end - start > LARGEST:
        found.refused.append((str(number), "json", "byte-limit", f"{end - start} bytes at byte {start}"))
    elif not blank:
        found.keys.append(str(number))
        found.samples.append({"json": (start, end - start)})


def _paragraphs(read: Window, piece: int) -> Found:
    """Neighbouring paragraphs are joined up to `piece` bytes; a longer one is cut at a space or between characters."""
    found, size, start = Found(), read.size, 0
    while start < size:
        text = read(start, min(piece + 1, size - start))
        end = cut(text, piece) if len(text) > piece else len(text)
        if text[:end].strip():
            found.keys.append(str(start))
            found.samples.append({"txt": (start, end)})
        start += end
    if not found.samples:
        found.refused.append(("", "", "empty", "no text"))
    return found


def cut(text: bytes, most: int) -> int:
    """Where to cut a text longer than `most` bytes: after a paragraph, a line, a sentence, a word, a character."""
    for marks in ((b"\n\n", b"\n \n", b"\r\n\r\n"), (b"\n", b". ", b" ")):
        ends = [place + len(mark) for mark in marks if (place := text.rfind(mark, 0, most)) > 0]
        if ends and max(ends) <= most:
            return max(ends)
    end = most
    while end > 1 and 0x80 <= text[end] < 0xC0:
        end -= 1  # not inside a character
    return end


def checks(read, before: int, offset: int, length: int, size: int, block: int) -> tuple[int, int, bytes, int]:
    """A member's CRC-32, the CRC-16 of what else belongs to it from byte `before` on, its first bytes, and its end."""
    end = min(-(-(offset + length) // block) * block, max(size, offset + length))
    crc, frame, first = 0, 0, b""
    for chunk in _chunks(read, before, offset):
        frame = binascii.crc_hqx(chunk, frame)
    for chunk in _chunks(read, offset, offset + length):
        first, crc = first or chunk, zlib.crc32(chunk, crc)
    for chunk in _chunks(read, offset + length, end):
        frame = binascii.crc_hqx(chunk, frame)
    return crc, frame, first, end


def crc_of(read, start: int, stop: int) -> int:
    crc = 0
    for chunk in _chunks(read, start, stop):
        crc = zlib.crc32(chunk, crc)
    return crc


def block_of(shard: str) -> int:
    """What a member's end is rounded up to."""
    return tar.BLOCK if shard.endswith(".tar") else 1


def _chunks(read, start: int, stop: int) -> Iterator[bytes]:
    for place in range(start, stop, CHUNK):
        yield read(place, min(stop - place, CHUNK))


def digest_of(shard: str, size: int) -> str:
    """The SHA-256 of the whole shard."""
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        digest.update(storage.read(shard, start, min(CHUNK, size - start)))
    return digest.hexdigest()
