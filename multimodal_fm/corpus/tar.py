"""A strict walk over a tar: every header's checksum is verified; what is damaged or unsafe is named, not trusted.

`tarfile` takes a damaged header for the end of the archive, and so loses what follows without a word. This walk finds
the next sound header instead. POSIX.1-2001 (ustar and pax) with GNU long names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
LONGEST_NAME = 1024  # bytes
LONGEST_EXTENSION = 1 << 20  # bytes of a pax header or a GNU long name
STRIDE = 1 << 22  # bytes looked at at a time at most, where a sound header is searched for
GLANCE = 1 << 14  # and at first: it is near, as a rule
EMPTY = bytes(BLOCK)


@dataclass(frozen=True)
class Member:
    """A regular file in the archive."""

    name: str
    offset: int  # of its content
    size: int


@dataclass(frozen=True)
class Fault:
    """Something in the archive that cannot be used: at which byte, for which of `errors.REASONS`, and whose it was."""

    offset: int
    reason: str
    detail: str
    name: str = ""


Read = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there, fewer where the file ends."""


def walk(read: Read, size: int) -> Iterator[Member | Fault]:
    """The members of a tar of `size` bytes, and what in it is refused, in order."""
    if not size or not _begins_well(read):
        yield Fault(0, "shard", "not a tar archive" if size else "no bytes")
        return
    offset, pax, long_name = 0, {}, None
    while True:
        block = read(offset, BLOCK)
        if len(block) < BLOCK:
            yield Fault(offset, "shard", "no end of archive: it may have been cut")
            return
        if block == EMPTY:
            after = _next_header(read, offset + BLOCK, size)
            if after is not None:
                yield Fault(after, "shard", f"more follows the end of the archive at byte {offset}")
            return
        length = _length(block) if _sound(block) else None
        if length is None:
            what = "damaged header" if not _sound(block) else "a size that no member has"
            pax, long_name = {}, None
            after = _after_damage(read, block, offset + BLOCK, size)
            yield Fault(offset, "shard", what + ("" if after is not None else ": nothing sound follows"))
            if after is None:
                return
            offset = after
            continue
        kind, content = block[156:157], offset + BLOCK
        if kind in b"xgLK" and kind:
            if content + length > size:
                yield Fault(offset, "shard", "ends inside a header")
                after = _next_header(read, content, size)  # unless it was the size that lied
                if after is None:
                    return
                offset, pax, long_name = after, _UNUSABLE, None
                continue
            if length > LONGEST_EXTENSION:
                yield Fault(offset, "shard", f"a header of {length} bytes")
                pax = _UNUSABLE
            elif kind == b"x":
                pax = _records(read(content, length))
                if pax is None:
                    yield Fault(offset, "shard", "a pax header that cannot be read")
                    pax = _UNUSABLE
            elif kind == b"L":
                long_name = read(content, length).rstrip(b"\0")
            offset = content + _rounded(length)
            continue
        raw = pax.get("path", long_name if long_name is not None else _name(block))
        if "size" in pax:
            length = int(pax["size"]) if pax["size"].isdigit() and len(pax["size"]) < 19 else -1
        sparse = kind == b"S" or any(record.startswith("GNU.sparse") for record in pax)
        unusable = "unusable" in pax
        pax, long_name = {}, None
        if length < 0:
            yield Fault(offset, "shard", "a size that no member has")
            after = _next_header(read, content, size)
            if after is None:
                return
            offset = after
            continue
        shown = raw[:80].decode("utf-8", "backslashreplace")
        if content + length > size:
            yield Fault(offset, "shard", f"ends inside {shown!r}", shown)
            after = _next_header(read, content, size)  # unless it was the size that lied
            if after is None:
                return
            offset = after
            continue
        regular = kind in (b"0", b"\0", b"7") and not raw.endswith(b"/")
        if not unusable and (not regular or sparse):
            if kind != b"5" and not raw.endswith(b"/"):
                yield Fault(offset, "name", f"{shown!r} is {_TYPES.get(kind, 'no regular file')}", shown)
        elif not unusable:
            name = _safe(raw)
            if name is None:
                yield Fault(offset, "name", f"{shown!r} is no name that a member may have", shown)
            else:
                yield Member(name, content, length)
        offset = content + (_rounded(length) if kind not in _EMPTY_TYPES else 0)


_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"0": "a sparse file",
    b"S": "a sparse file",
}
_UNUSABLE = {"path": b"", "unusable": b""}  # for a member whose pax header cannot be believed
_EMPTY_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")  # no content follows, whatever their size says


def _rounded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _begins_well(read: Read) -> bool:
    """Whether there is a tar in it at all: a sound header somewhere in the first stride, or an empty archive."""
    block = read(0, BLOCK)
    return len(block) == BLOCK and (block == EMPTY or _sound(block) or _next_header(read, BLOCK, STRIDE) is not None)


def _sound(block: bytes) -> bool:
    """Whether the header's checksum is right (unsigned, or signed as some old writers did)."""
    claimed = _octal(block[148:156])
    if claimed is None:
        return False
    rest = block[:148] + b"        " + block[156:]
    total = sum(rest)
    return claimed == total or claimed == total - 256 * sum(byte > 127 for byte in rest)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    try:
        return int(digits, 8) if digits and digits.isdigit() else None
    except ValueError:
        return None


def _length(block: bytes) -> int | None:
    """The size field: octal, or base-256 (GNU) where its first bit is set. None where it is neither, or negative."""
    field = block[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:]) if field[0] == 0x80 else None
    return 0 if not field.strip(b"\0 ") else _octal(field)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _safe(raw: bytes) -> str | None:
    """The name as text; None where it is absolute, climbs, is too long, or holds what a name does not hold."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return None
    name = name.removeprefix("./")
    bad = (
        not name
        or len(raw) > LONGEST_NAME
        or name.startswith(("/", "\\"))
        or ".." in name.replace("\\", "/").split("/")
    )
    return None if bad or not name.isprintable() else name


def _records(data: bytes) -> dict[str, bytes] | None:
    """The records of a pax header, each `length key=value newline`. None where they are damaged."""
    records, place = {}, 0
    while place < len(data):
        space = data.find(b" ", place, place + 21)
        digits = data[place:space] if space > 0 else b""
        if not digits.isdigit():
            return records if not data[place:].strip(b"\0") else None
        end = place + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1 : end] != b"\n" or not equals:
            return None
        records[key.decode("utf-8", "replace")] = value
        place = end
    return records


def _after_damage(read: Read, block: bytes, content: int, size: int) -> int | None:
    """Where to go on after a damaged header: where its size points, if a header is there, else at the next one.

    A member may itself be a tar, whose headers are not ours.
    """
    length = _length(block)
    if length is not None and content + _rounded(length) < size:
        there = read(content + _rounded(length), BLOCK)
        if there == EMPTY or (len(there) == BLOCK and _sound(there)):
            return content + _rounded(length)
    return _next_header(read, content, size)


def _next_header(read: Read, offset: int, size: int) -> int | None:
    """Where the next sound ustar header begins, from `offset` on; None where there is none."""
    stride = GLANCE
    while offset < size:
        wanted = min(stride, size - offset)
        chunk = read(offset, wanted)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            if (
                start >= 0
                and start % BLOCK == 0
                and len(chunk) >= start + BLOCK
                and _sound(chunk[start : start + BLOCK])
            ):
                return offset + start
            found = chunk.find(b"ustar", found + 1)
        if len(chunk) < wanted:
            return None
        offset += wanted  # a stride is whole blocks, so that no header straddles two
        stride = min(2 * stride, STRIDE)
    return None
