"""A strict reader of tar headers: POSIX.1-2001 (ustar and pax) with GNU long names.

Every header's checksum is verified, and whatever is damaged or unsafe is reported with its offset. `tarfile` takes a
damaged header for the end of the archive and silently loses what follows; this reader searches for the next valid one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import BLOCKSIZE

MAX_NAME_BYTES = 1024
MAX_EXTENDED_BYTES = 1 << 20  # of a pax header or a GNU long name
MAX_SEARCH_BYTES = 1 << 22  # read at a time while searching for a valid header
MIN_SEARCH_BYTES = 1 << 14  # and at first, since it usually is near
EMPTY = bytes(BLOCKSIZE)


@dataclass(frozen=True)
class Member:
    """A regular file of the archive; `offset` and `size` are those of its content, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Fault:
    """Something in the archive that cannot be used: its byte offset, one of `errors.REASONS`, and the member's name."""

    offset: int
    reason: str
    detail: str
    name: str = ""


Read = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there, fewer at the end of the file."""


def walk(read: Read, size: int) -> Iterator[Member | Fault]:
    """Yields the members and the faults of a tar archive of `size` bytes in order."""
    if not size or not _looks_like_tar(read):
        yield Fault(0, "shard", "not a tar archive" if size else "no bytes")
        return
    offset, pax, long_name = 0, {}, None
    while offset is not None:
        block, content = read(offset, BLOCKSIZE), offset + BLOCKSIZE
        if len(block) < BLOCKSIZE:
            yield Fault(offset, "shard", "no end of archive: it may have been cut")
            return
        if block == EMPTY:
            if (after := _find_header(read, content, size)) is not None:
                yield Fault(after, "shard", f"more follows the end of the archive at byte {offset}")
            return
        valid = _has_valid_checksum(block)
        length = _parse_size(block) if valid else None
        if length is None:
            after = _skip_damage(read, block, content, size)
            what = "a size that no member has" if valid else "damaged header"
            yield Fault(offset, "shard", what if after is not None else f"{what}: nothing sound follows")
            offset, pax, long_name = after, {}, None
            continue
        kind = block[156:157]
        if kind in (b"x", b"g", b"L", b"K"):
            if content + length > size:
                yield Fault(offset, "shard", "ends inside a header")
                offset, pax, long_name = _find_header(read, content, size), _UNUSABLE, None
                continue
            if length > MAX_EXTENDED_BYTES:
                yield Fault(offset, "shard", f"a header of {length} bytes")
                pax = _UNUSABLE
            elif kind == b"x" and (pax := _parse_pax(read(content, length))) is None:
                yield Fault(offset, "shard", "a pax header that cannot be read")
                pax = _UNUSABLE
            elif kind == b"L":
                long_name = read(content, length).rstrip(b"\0")
            offset = content + _round_up(length)
            continue
        raw_name = pax.get("path", _parse_name(block) if long_name is None else long_name)
        if "size" in pax:
            length = int(pax["size"]) if pax["size"].isdigit() and len(pax["size"]) < 19 else -1
        regular = kind in (b"0", b"\0", b"7") and not any(record.startswith("GNU.sparse") for record in pax)
        skipped = "unusable" in pax or kind == b"5" or raw_name.endswith(b"/")  # folders are no samples' members
        shown, name = raw_name[:80].decode("utf-8", "backslashreplace"), _safe_name(raw_name)
        pax, long_name = {}, None
        if length < 0 or content + length > size:
            what = "a size that no member has" if length < 0 else f"ends inside {shown!r}"
            yield Fault(offset, "shard", what, shown if length >= 0 else "")
            offset = _find_header(read, content, size)  # the archive goes on where only the size is wrong
            continue
        if not skipped and not regular:
            yield Fault(offset, "name", f"{shown!r} is {_TYPES.get(kind, 'no regular file')}", shown)
        elif not skipped and name is None:
            yield Fault(offset, "name", f"{shown!r} is no name that a member may have", shown)
        elif not skipped and name is not None:
            yield Member(name, content, length)
        offset = content + (_round_up(length) if kind not in _WITHOUT_CONTENT else 0)


_TYPES = {
    **{b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"},
    **{b"0": "a sparse file", b"S": "a sparse file"},
}
_UNUSABLE = {"path": b"", "unusable": b""}  # stands for a pax header that cannot be believed
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever their size field says


def _round_up(length: int) -> int:
    return -(-length // BLOCKSIZE) * BLOCKSIZE


def _looks_like_tar(read: Read) -> bool:
    """Whether the file is an empty archive or has a valid header near its beginning."""
    block = read(0, BLOCKSIZE)
    return len(block) == BLOCKSIZE and (_ends_or_begins(block) or _find_header(read, 0, MAX_SEARCH_BYTES) is not None)


def _ends_or_begins(block: bytes) -> bool:
    """Whether the block is the end of an archive or a valid header."""
    return block == EMPTY or (len(block) == BLOCKSIZE and _has_valid_checksum(block))


def _has_valid_checksum(block: bytes) -> bool:
    """Whether the header's checksum is right (the sum of unsigned bytes, or of signed ones as by some old writers)."""
    claimed = _parse_octal(block[148:156])
    rest = block[:148] + b"        " + block[156:]
    total = sum(rest)
    return claimed is not None and (claimed == total or claimed == total - 256 * sum(byte > 127 for byte in rest))


def _parse_octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _parse_size(block: bytes) -> int | None:
    """The size field: octal, or base-256 (GNU) where its first bit is set. None where it is neither, or negative."""
    field = block[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:]) if field[0] == 0x80 else None
    return _parse_octal(field) if field.strip(b"\0 ") else 0


def _parse_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _safe_name(raw: bytes) -> str | None:
    """The name as text; None where it is absolute, leaves its folder, is too long or is not printable UTF-8."""
    try:
        name = raw.decode().removeprefix("./")
    except UnicodeDecodeError:
        return None
    leaves = name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")
    return name if name and not leaves and len(raw) <= MAX_NAME_BYTES and name.isprintable() else None


def _parse_pax(data: bytes) -> dict[str, bytes] | None:
    """The records of a pax header, each `LENGTH KEY=VALUE` and a newline. None where they are damaged."""
    records, start = {}, 0
    while start < len(data):
        space = data.find(b" ", start, start + 21)
        digits = data[start:space] if space > 0 else b""
        if not digits.isdigit():
            return None if data[start:].strip(b"\0") else records
        end = start + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space + 1 < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            return None
        records[key.decode("utf-8", "replace")] = value
        start = end
    return records


def _skip_damage(read: Read, block: bytes, content: int, size: int) -> int | None:
    """Where to go on after a damaged header: where its size points if a header is there, else at the next one.

    The size comes first because a member may itself be a tar archive, whose headers are not ours.
    """
    length = _parse_size(block)
    if length is not None and (after := content + _round_up(length)) < size and _ends_or_begins(read(after, BLOCKSIZE)):
        return after
    return _find_header(read, content, size)


def _find_header(read: Read, offset: int, size: int) -> int | None:
    """The offset of the first valid ustar header from `offset` on; None where there is none before `size`."""
    stride = MIN_SEARCH_BYTES  # strides are whole blocks, so that no header lies in two of them
    while offset < size:
        wanted = min(stride, size - offset)
        chunk = read(offset, wanted)
        magic = chunk.find(b"ustar")
        while magic >= 0:
            start = magic - 257
            if start >= 0 and start % BLOCKSIZE == 0 and _ends_or_begins(chunk[start : start + BLOCKSIZE]):
                return offset + start
            magic = chunk.find(b"ustar", magic + 1)
        if len(chunk) < wanted:
            return None
        offset, stride = offset + wanted, min(2 * stride, MAX_SEARCH_BYTES)
    return None
