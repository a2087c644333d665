"""Scans a shard from its first byte to its last: which samples it holds, where their members lie, what is rejected."""

from __future__ import annotations

import binascii
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from tarfile import BLOCKSIZE

from . import storage, tar

MAX_MEMBER_BYTES = 2**32 - 1
READ_BYTES = 1 << 22  # read at a time


@dataclass(frozen=True)
class Rejection:
    """Something in a shard that is not delivered: the sample's key and the member's extension, empty where unknown,
    one of `errors.REASONS`, and free text."""

    shard: str
    key: str
    member: str
    reason: str
    detail: str


class WindowReader:
    """Reads a file in large strides for a caller that asks for a few bytes at a time, nearly in order."""

    def __init__(self, path: str, size: int):
        self.path, self.size, self.start, self.data = path, size, 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        if not self.start <= offset <= offset + length <= self.start + len(self.data):
            self.start = offset
            self.data = storage.read(self.path, offset, max(length, min(READ_BYTES, self.size - offset)))
        return self.data[offset - self.start : offset - self.start + length]

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        for offset in range(start, stop, READ_BYTES):
            yield self(offset, min(stop - offset, READ_BYTES))


Sample = tuple[str, dict[str, tuple[int, int]]]
"""A key, and the offset and length of each member by extension."""


def scan(shard: str, size: int, piece_bytes: int) -> Iterator[Sample | Rejection]:
    """Yields what a .tar, .jsonl or .txt file of `size` bytes holds, in order. Raises OSError, SampleError."""
    read = WindowReader(shard, size)
    if shard.endswith(".tar"):
        return _scan_tar(shard, read)
    return _scan_lines(shard, read) if shard.endswith(".jsonl") else _scan_text(shard, read, piece_bytes)


def _scan_tar(shard: str, read: WindowReader) -> Iterator[Sample | Rejection]:
    """Adjacent members with the same key are one sample, as in webdataset."""
    seen, key, members, repeated = set(), "", {}, False
    for entry in tar.walk(read, read.size):
        own, extension = _split_name(entry.name)
        if isinstance(entry, tar.Fault):
            yield Rejection(shard, own, extension, entry.reason, f"{entry.detail}, at byte {entry.offset}")
            continue
        if not own or not extension:
            continue
        at = f"again at byte {entry.offset}"
        if own != key:
            if members:
                yield key, members
            key, members, repeated = own, {}, own in seen
            seen.add(own)
            if repeated:
                yield Rejection(shard, own, "", "duplicate", f"the key came before, and {at}")
        if repeated:
            continue
        if extension in members:
            yield Rejection(shard, own, extension, "duplicate", f"at byte {members[extension][0]}, and {at}")
        elif entry.size > MAX_MEMBER_BYTES:
            yield Rejection(shard, own, extension, "byte-limit", f"{entry.size} bytes at byte {entry.offset}")
        else:
            members[extension] = entry.offset, entry.size
    if members:
        yield key, members


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member's name: the extension begins at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _scan_lines(shard: str, read: WindowReader) -> Iterator[Sample | Rejection]:
    """Each line is a sample. However long it is, only a few megabytes of it are in memory."""
    size, start, number, blank = read.size, 0, 0, True
    if not size:
        yield Rejection(shard, "", "", "empty", "no bytes")
    for end in range(0, size, READ_BYTES):
        last = end + READ_BYTES >= size
        *ended, rest = (read(end, min(READ_BYTES, size - end)) + b"\n" * last).split(b"\n")
        for text in ended:
            end += len(text)
            if end - start > MAX_MEMBER_BYTES:
                yield Rejection(shard, str(number), "json", "byte-limit", f"{end - start} bytes at byte {start}")
            elif not blank or text.strip():
                yield str(number), {"json": (start, end - start)}
            end = start = end + 1
            number, blank = number + 1, True
        blank = blank and not rest.strip()


def _scan_text(shard: str, read: WindowReader, piece_bytes: int) -> Iterator[Sample | Rejection]:
    """Adjacent paragraphs are joined up to `piece_bytes`; a longer one is cut at a space or between characters."""
    start, empty = 0, True
    while start < read.size:
        text = read(start, min(piece_bytes + 1, read.size - start))
        end = find_cut(text, piece_bytes) if len(text) > piece_bytes else len(text)
        if text[:end].strip():
            empty = False
            yield str(start), {"txt": (start, end)}
        start += end
    if empty:
        yield Rejection(shard, "", "", "empty", "no text")


def find_cut(text: bytes, limit: int) -> int:
    """Where to cut UTF-8 that is longer than `limit` bytes: after a paragraph, else after a line, a sentence or a word,
    else between two characters."""
    for marks in ((b"\n\n", b"\n \n", b"\r\n\r\n"), (b"\n", b". ", b" ")):
        ends = [start + len(mark) for mark in marks if (start := text.rfind(mark, 0, limit)) > 0]
        if ends and max(ends) <= limit:
            return max(ends)
    end = limit
    while end > 1 and 0x80 <= text[end] < 0xC0:
        end -= 1
    return end


def checksum_member(read: WindowReader, before: int, offset: int, length: int) -> tuple[int, int, bytes, int]:
    """A member's CRC-32, the CRC-16 of the header and padding around it, its first bytes, and where its padding ends.

    `before` is where the member before it ended, so that each byte of the shard is covered once.
    """
    end = offset + length
    if read.path.endswith(".tar"):
        end = max(end, min(-(-end // BLOCKSIZE) * BLOCKSIZE, read.size))
    crc, frame, first = 0, 0, b""
    for chunk in read.chunks(before, offset):
        frame = binascii.crc_hqx(chunk, frame)
    for chunk in read.chunks(offset, offset + length):
        first, crc = first or chunk, zlib.crc32(chunk, crc)
    for chunk in read.chunks(offset + length, end):
        frame = binascii.crc_hqx(chunk, frame)
    return crc, frame, first, end


def checksum_rest(read: WindowReader, start: int) -> int:
    """The CRC-32 of everything from `start` on."""
    crc = 0
    for chunk in read.chunks(start, read.size):
        crc = zlib.crc32(chunk, crc)
    return crc


def hash_shard(shard: str, size: int) -> str:
    """The SHA-256 of the whole shard."""
    digest = hashlib.sha256()
    for chunk in WindowReader(shard, size).chunks(0, size):
        digest.update(chunk)
    return digest.hexdigest()
