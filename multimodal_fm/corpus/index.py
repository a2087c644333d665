"""The index of a shard: a small file through which any sample is reached at random and its bytes are verified.

`NAME.mmidx` stands beside the shard, or in the cache folder where nothing may be written beside it. All numbers are
little endian: the magic, the version (u32), the length of a JSON head (u32), the head's CRC-32 (u32), twelve zeros, the
head, then the tables for N samples with M members:

    members            (M,)   `MEMBER`: where a member's content lies, its CRC-32, the two numbers of its tokenizer's
                              `measure` (0, 0 where there is none), the row of its extension in the head, and the CRC-16
                              of the header and padding around it
    member_starts      (N+1,) u32: sample i's members are `members[member_starts[i] : member_starts[i + 1]]`
    extension_set_ids  (N,)   u16: which of the head's extension sets sample i has
    key_starts         (N+1,) u32: sample i's key is `keys[key_starts[i] : key_starts[i + 1]]`
    keys               (K,)   UTF-8

The head holds the shard's size, version (`storage.stat`) and SHA-256, the CRC-32 of what follows the last member, the
counts, what was rejected, which tokenizer measured which extension, and the SHA-256 of the tables. So every byte of a
shard is covered by exactly one checksum.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from ..errors import SampleError, UserError
from ..tokenizers.base import Tokenizer
from . import storage
from .scan import MAX_MEMBER_BYTES, Rejection, WindowReader, checksum_member, checksum_rest, hash_shard, scan

MAGIC, PREAMBLE_BYTES = b"mmidx\r\n\0", 32
VERSION = 3  # one more whenever the layout changes, or a scan finds other samples
MEMBER = np.dtype(
    [
        *(("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")),
        *(("a", "<u4"), ("b", "<u4")),  # `measure`: width and height in pixels, or milliseconds and samples a second
        *(("extension", "<u2"), ("frame", "<u2")),
    ]
)
HEAD = {
    int: ("samples", "members", "key_bytes", "size", "rejection_count", "tail"),
    str: ("version", "sha256", "tables"),
    list: ("counts", "extensions", "extension_sets", "rejections"),
    dict: ("measured_by",),
}
MAX_EXTENSIONS = 2**16 - 1  # that one shard may have, and as many sets of them
MAX_LISTED = 10_000  # rejections that the head lists; all are counted
PIECE_BYTES = 2000  # of plain text


class Damaged(ValueError):
    """An index file is not what was written."""


class Index:
    """An index file, whose tables are mapped into memory. Raises OSError, ValueError, and `Damaged`, which is one.

    Attributes:
        head: what the file says of the shard and of the tables.
        extensions: those of all members; a row of `members` names its own by number.
        extension_sets: those of samples; a row of `extension_set_ids` names its own by number.
        rejections: what the scan rejected, the first `MAX_LISTED` of `head["rejection_count"]`.
    """

    def __init__(self, shard: str, file: Path):
        self.shard, self.file, self._checked = shard, file, False
        data = _map_file(file)
        preamble = data[:PREAMBLE_BYTES].tobytes()
        if preamble[:8] != MAGIC:
            raise Damaged("not an index")
        if int.from_bytes(preamble[8:12], "little") != VERSION:
            raise ValueError("not an index of this version")
        start = PREAMBLE_BYTES + int.from_bytes(preamble[12:16], "little")
        head = data[PREAMBLE_BYTES:start].tobytes()
        if preamble != _preamble(head):
            raise Damaged("its head is not what was written")
        self.head, self.extensions, self.extension_sets, self.rejections = _parse_head(shard, head)
        kinds, samples = (MEMBER, "<u4", "<u2", "<u4", "u1"), self.head["samples"]
        counts = (self.head["members"], samples + 1, samples, samples + 1, self.head["key_bytes"])
        sizes = [np.dtype(kind).itemsize * count for kind, count in zip(kinds, counts)]
        ends = list(itertools.accumulate(sizes, initial=start))
        if min(counts) < 0 or ends[-1] != len(data):
            raise Damaged("its tables are not as long as its head says")
        self._tables = [data[i:j].view(kind) for kind, (i, j) in zip(kinds, itertools.pairwise(ends))]
        self.members, self.member_starts, self.extension_set_ids, self.key_starts, self.keys = self._tables

    def __len__(self) -> int:
        return len(self.extension_set_ids)

    def key(self, sample: int) -> str:
        return self.keys[self.key_starts[sample] : self.key_starts[sample + 1]].tobytes().decode("utf-8", "replace")

    def spans(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Offset, length and CRC-32 of the sample's members by extension."""
        rows = self.members[self.member_starts[sample] : self.member_starts[sample + 1]].tolist()
        return {self.extensions[row[5]]: row[:3] for row in rows}

    def measured_by(self, tokenizers: Iterable[Tokenizer]) -> bool:
        """Whether the measures are those of these tokenizers, for the extensions that they read and the shard has."""
        names, own = self.head["measured_by"], _by_extension(tokenizers)
        return all(names.get(extension) == own[extension].name for extension in self.extensions if extension in own)

    def is_intact(self) -> bool:
        """Whether the tables are those that were written, and such as a scan writes. Reads all of them."""
        bounds = (self.member_starts, len(self.members)), (self.key_starts, len(self.keys))
        rows = (self.members["extension"], self.extensions), (self.extension_set_ids, self.extension_sets)
        return (
            _hash_tables(self._tables) == self.head["tables"]
            and all(
                starts[0] == 0 and starts[-1] == stop and (starts[1:] >= starts[:-1]).all() for starts, stop in bounds
            )
            and all(not len(ids) or ids.max() < len(names) for ids, names in rows)
        )

    def check(self) -> None:
        """Raises UserError where the tables are damaged. They are read the first time only."""
        if not self._checked and not self.is_intact():
            raise UserError(
                f"{self.shard}: its index {self.file} is damaged; `mmfm inspect --rebuild {self.shard}` makes it anew"
            )
        self._checked = True

    def read(
        self, sample: int, extensions=(), max_bytes: int = MAX_MEMBER_BYTES
    ) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
        """The sample's members by extension, all or those with the given extensions, and which of them cannot be had:
        longer than `max_bytes`, unreadable, or not the bytes that were indexed."""
        members, failed = {}, []
        for extension, (offset, length, crc) in self.spans(sample).items():
            if extensions and extension not in extensions:
                continue
            try:
                if length > max_bytes:
                    raise SampleError("byte-limit", f"{length} bytes, the limit is {max_bytes}")
                data = storage.read(self.shard, offset, length)
                if len(data) != length or zlib.crc32(data) != crc:
                    raise SampleError("crc", f"{length} bytes at {offset} are not those that were indexed")
                members[extension] = data
            except OSError as error:
                failed.append((extension, SampleError("read", str(error)[:200])))
            except SampleError as error:
                failed.append((extension, error))
        return members, failed

    def differences(self) -> Iterator[tuple[int, str, str, str]]:
        """Reads the whole shard and yields (sample or -1, extension, reason, detail) for each difference.

        A header and padding belong to their member's sample, and what follows the last member to the last sample.
        Raises OSError, SampleError.
        """
        read, end = WindowReader(self.shard, storage.stat(self.shard)[0]), 0
        samples = np.repeat(np.arange(len(self)), np.diff(self.member_starts)).tolist()
        for sample, row in zip(samples, self.members, strict=True):
            offset, length, indexed_crc, _, _, extension, indexed_frame = row.tolist()
            crc, frame, _, end = checksum_member(read, end, offset, length)
            where = f"{length} bytes at {offset}"
            if crc != indexed_crc:
                yield sample, self.extensions[extension], "crc", f"{where} are not those that were indexed"
            elif frame != indexed_frame:
                yield sample, self.extensions[extension], "shard", f"the header or the padding of {where} is damaged"
        if checksum_rest(read, end) != self.head["tail"]:
            yield len(self) - 1, "", "shard", f"what follows the last member, from byte {end} on, is damaged"


def open_all(
    shards: list[str],
    piece_bytes: int = PIECE_BYTES,
    tokenizers: Iterable[Tokenizer] = (),
    write_index: bool = True,
    progress: Callable[[str], None] = lambda shard: None,
) -> list[Index]:
    """The indexes of several shards, some of them built at the same time; see `open_index`."""
    tokenizers = tuple(tokenizers)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda shard: open_index(shard, piece_bytes, tokenizers, write_index, progress), shards))


def open_index(
    shard: str,
    piece_bytes: int = PIECE_BYTES,
    tokenizers: Iterable[Tokenizer] = (),
    write_index: bool = True,
    progress: Callable[[str], None] = lambda shard: None,
) -> Index:
    """The shard's index, which is built where there is none.

    Args:
        piece_bytes: of a .txt file, the bytes that a sample has at most.
        tokenizers: those whose measures the index must hold; one that was built without them is built again.
        write_index: whether a new index may be written beside the shard; else it goes into the cache folder.
        progress: is called with the shard's name before it is read through.

    Raises UserError where the shard cannot be read, or has been replaced since its index was built.
    """
    with _naming(shard):
        storage.reopen_files()
        size, version = storage.stat(shard)
        existing, tokenizers = [], tuple(tokenizers)
        for file in _index_files(shard, piece_bytes):
            with contextlib.suppress(OSError, ValueError):  # not there, of another version, or damaged
                existing.append(Index(shard, file))
        current = [one for one in existing if (one.head["size"], one.head["version"]) == (size, version)]
        for one in current:
            if one.measured_by(tokenizers):
                return one
        # A copy of the shard, or one whose time stamp has changed, is the same shard.
        if existing and not current and hash_shard(shard, size) not in [one.head["sha256"] for one in existing]:
            mend = f"`mmfm inspect --rebuild {shard}` makes it anew"
            raise UserError(f"{shard}: is not the file that {existing[0].file} was made of; {mend}")
    progress(shard)
    return build(shard, piece_bytes, tokenizers, write_index)


def read_existing(shard: str, piece_bytes: int = PIECE_BYTES) -> Index | None:
    """The index that was built before, even if the shard has changed since; None if there is none. Raises Damaged."""
    for file in _index_files(shard, piece_bytes):
        try:
            return Index(shard, file)
        except Damaged as error:
            raise Damaged(f"{file}: {error}") from None
        except (OSError, ValueError):
            continue
    return None


def build(
    shard: str, piece_bytes: int = PIECE_BYTES, tokenizers: Iterable[Tokenizer] = (), write_index: bool = True
) -> Index:
    """Reads the whole shard and writes its index. Raises UserError where one of the two cannot be done."""
    with _naming(shard):
        storage.reopen_files()
        size, version = storage.stat(shard)
        head, tables = _scan_tables(shard, size, piece_bytes, tokenizers)
        head |= {"shard": os.path.basename(shard), "size": size, "version": version, "sha256": hash_shard(shard, size)}
        if storage.stat(shard) != (size, version):
            raise UserError(f"{shard}: changes while it is read")
    text = json.dumps(head | {"tables": _hash_tables(tables)}, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 16)
    for file in _index_files(shard, piece_bytes)[0 if write_index else -1 :]:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(file, [_preamble(text), text, *(table.tobytes() for table in tables)])
            return Index(shard, file)
        except OSError as error:
            failed = error
    raise UserError(f"{shard}: its index cannot be written, {failed}; set MMFM_CACHE to a folder that can be")


@contextlib.contextmanager
def _naming(shard: str):
    """Turns what reading a shard raises into a UserError that names it."""
    try:
        yield
    except (OSError, SampleError) as error:
        raise UserError(f"{shard}: {getattr(error, 'strerror', '') or error}") from None


def _index_files(shard: str, piece_bytes: int) -> list[Path]:
    """Where the shard's index may be, the preferred place first and the cache folder last."""
    suffix = f".{piece_bytes}.mmidx" if shard.endswith(".txt") else ".mmidx"
    name = shard if storage.is_remote(shard) else os.path.abspath(shard)
    cached = storage.cache_folder() / "indexes" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}{suffix}"
    if storage.is_remote(shard):
        return [cached]
    beside = Path(shard + suffix)  # root may write where nobody should, so the folder's mode is asked
    return [beside, cached] if beside.exists() or os.stat(beside.parent).st_mode & 0o222 else [cached]


def _map_file(file: Path) -> np.ndarray:
    """A file's bytes (N,), mapped into memory. It does not stay open, as it would under numpy's maps: there may be more
    shards than a process may have open files. Raises OSError."""
    size = os.stat(file).st_size
    try:
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None
    data.flags.writeable = False
    return data


def _parse_head(shard: str, text: bytes) -> tuple[dict, list[str], list[list[str]], list[Rejection]]:
    """The head, and of it the extensions, their sets and the rejections. Raises Damaged, whoever wrote it."""
    try:
        head = json.loads(text)
        extensions, sets = head["extensions"], head["extension_sets"]
        rejections = [Rejection(shard, *row) for row in head["rejections"]]
        typed = all(isinstance(head[name], kind) for kind, names in HEAD.items() for name in names)
        if typed and set(map(type, extensions)) <= {str} and all(set(names) <= set(extensions) for names in sets):
            return head, extensions, sets, rejections
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Damaged("its head is not one of an index")


def _preamble(head: bytes) -> bytes:
    numbers = (VERSION, len(head), zlib.crc32(head))
    return (MAGIC + b"".join(number.to_bytes(4, "little") for number in numbers)).ljust(PREAMBLE_BYTES, b"\0")


def _hash_tables(tables: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        digest.update(np.ascontiguousarray(table).view("u1").data)
    return digest.hexdigest()


def _scan_tables(shard: str, size: int, piece_bytes: int, tokenizers: Iterable[Tokenizer]) -> tuple[dict, list]:
    """The head's counts and the five tables of a shard's index. Raises OSError, SampleError."""
    from .. import tokenizers as built_in

    measurers = _by_extension(built_in.builtin()) | _by_extension(tokenizers)
    read, end = WindowReader(shard, size), 0
    extensions: dict[str, int] = {}
    sets: dict[tuple[str, ...], int] = {}
    rows, counts, set_ids, keys, rejections = [], [0], [], [], []
    for found in scan(shard, size, piece_bytes):
        if isinstance(found, Rejection):
            rejections.append(found)
            continue
        key, members = found
        for extension in [e for e in members if e not in extensions][MAX_EXTENSIONS - len(extensions) :]:
            at = f"at byte {members.pop(extension)[0]}: a key ends at the first dot"
            detail = f"more than {MAX_EXTENSIONS} extensions in one shard, {at}"
            rejections.append(Rejection(shard, key, extension, "name", detail))
        if tuple(members) not in sets and len(sets) == MAX_EXTENSIONS:
            detail = f"more than {MAX_EXTENSIONS} sets of extensions in one shard"
            rejections.append(Rejection(shard, key, "", "name", detail))
        elif members:
            for extension, (offset, length) in members.items():
                crc, frame, first, end = checksum_member(read, end, offset, length)
                measures = _measure(measurers.get(extension), first, length)
                rows.append((offset, length, crc, *measures, extensions.setdefault(extension, len(extensions)), frame))
            keys.append(key.encode())
            counts.append(len(members))
            set_ids.append(sets.setdefault(tuple(members), len(sets)))
    tables = [
        np.array(rows, MEMBER),
        np.cumsum(counts, dtype="<u4"),
        np.array(set_ids, "<u2"),
        np.cumsum([0, *map(len, keys)], dtype="<u4"),
        np.frombuffer(b"".join(keys), "u1"),
    ]
    head = {
        "samples": len(keys),
        "members": len(rows),
        "key_bytes": len(tables[-1]),
        "extensions": list(extensions),
        "extension_sets": [list(names) for names in sets],
        "counts": np.bincount(np.array(set_ids, int), minlength=len(sets)).tolist(),
        "measured_by": {name: measurers[name].name for name in extensions if name in measurers},
        "rejection_count": len(rejections),
        "rejections": [[r.key, r.member, r.reason, r.detail] for r in rejections[:MAX_LISTED]],
        "piece_bytes": piece_bytes,
        "tail": checksum_rest(read, end),
    }
    return head, tables


def _by_extension(tokenizers: Iterable[Tokenizer]) -> dict[str, Tokenizer]:
    """Each extension's tokenizer; the first one of those that read it."""
    return {extension: one for one in reversed(tuple(tokenizers)) for extension in one.extensions}


def _measure(tokenizer: Tokenizer | None, data: bytes, length: int) -> tuple[int, int]:
    try:
        a, b = tokenizer.measure(data, length) if tokenizer else (0, 0)
        return min(max(int(a), 0), MAX_MEMBER_BYTES), min(max(int(b), 0), MAX_MEMBER_BYTES)
    except Exception:  # any reader's complaint about damaged bytes, which are rejected when they are read
        return 0, 0
