"""Bytes by range: local files by `pread`, everything else through fsspec, with retries and a bounded local cache."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import tempfile
import time
import zlib
from pathlib import Path

from ..errors import SampleError, UserError

ATTEMPTS = 5
PAUSE = 0.1  # seconds before the second attempt, doubled each time
PATIENCE = 20.0  # seconds without a byte, after which an attempt has failed
PIECE = 1 << 20  # bytes fetched and kept at a time
ROOM = int(os.environ.get("MMFM_CACHE_BYTES", 10 << 30))  # what the cache may hold
MARKS = (  # what filesystems call that by which a file is told from what stood there before
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "mtime"),
)
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "file", "memory")


def is_remote(path: str) -> bool:
    return "://" in path


def cache_folder() -> Path:
    """Where indexes and fetched pieces are kept: $MMFM_CACHE, else ~/.cache/multimodal_fm; who has no home has a folder
    among the temporary ones."""
    if given := os.environ.get("MMFM_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "multimodal_fm"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"multimodal_fm-{os.getuid()}"


def put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError, with the file's name."""
    work = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        work.write_bytes(data)
        os.replace(work, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        work.unlink(missing_ok=True)


def find(pattern: str) -> list[str]:
    """The files that a path, a pattern or a URL names, sorted. Raises UserError for a scheme that is not read."""
    scheme, colon, _ = pattern.partition(":")
    if colon and (is_remote(pattern) or scheme == "pipe"):
        if scheme not in SCHEMES or not is_remote(pattern):
            raise UserError(f"{pattern}: {scheme}: is not read; give a path or one of {', '.join(SCHEMES)}")
        if not any(mark in pattern for mark in "*[?") or scheme.startswith("http"):
            return [pattern]
        files = _filesystem(scheme).glob(pattern)
        return sorted(f if is_remote(f) else f"{scheme}://{f.lstrip('/')}" for f in files)
    if os.path.isfile(pattern):  # a name may hold what a pattern would read otherwise
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))


def size(path: str) -> int:
    """Bytes. Raises OSError."""
    return stamp(path)[0]


def stamp(path: str) -> tuple[int, str]:
    """A file's size in bytes and a mark that changes when it does, such as its time. Raises OSError."""
    if not is_remote(path):
        found = os.stat(path)
        return found.st_size, str(found.st_mtime_ns)
    try:
        found = _patient(path, lambda: _filesystem(path.partition(":")[0]).info(path))
    except SampleError as error:
        raise OSError(error.detail) from None
    if found.get("size") is None:
        raise OSError("the server does not say how long it is, so it cannot be read by range")
    return int(found["size"]), next((str(found[name]) for name in MARKS if found.get(name)), "")


def read(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, fewer where the file ends. Several processes and threads may read at once.

    Raises OSError for a local file, SampleError("read") for a remote one that cannot be had.
    """
    if not is_remote(path):
        file = _open(path, os.getpid())  # held until it is read: another thread may drop it from the cache
        return _pread(file.fileno(), length, offset)
    total, mark = _known(path)
    length = min(length, total - offset)
    if length <= 0:
        return b""
    pieces = range(offset // PIECE, -(-(offset + length) // PIECE))
    data = b"".join(_piece(path, total, mark, number) for number in pieces)
    start = offset - pieces.start * PIECE
    return data[start : start + length]


def _pread(file: int, length: int, offset: int) -> bytes:
    data = os.pread(file, length, offset)
    while len(data) < length and (more := os.pread(file, length - len(data), offset + len(data))):
        data += more  # one call gives 2 GiB at most
    return data


@functools.lru_cache(maxsize=256)
def _open(path: str, process: int):
    return open(path, "rb", buffering=0)


@functools.lru_cache(maxsize=4096)
def _known(path: str) -> tuple[int, str]:
    try:
        return stamp(path)
    except OSError as error:
        raise SampleError("read", f"{path}: {error}"[:200]) from None


def forget(path: str) -> None:
    """Look at the file anew: it may have been replaced."""
    _open.cache_clear()
    _known.cache_clear()


def _filesystem(scheme: str):
    import fsspec

    options = {}
    if scheme.startswith("http"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=PATIENCE, sock_read=PATIENCE)}
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{scheme}: cannot be read here: {error}") from None


def _piece(path: str, total: int, mark: str, number: int) -> bytes:
    """One piece of a remote file, from the cache or from where it is. Raises SampleError."""
    digest = hashlib.sha256(f"{path}\0{mark}\0{total}".encode()).hexdigest()
    file = cache_folder() / "pieces" / digest[:2] / f"{digest}-{number}"
    start, end = number * PIECE, min((number + 1) * PIECE, total)
    try:
        kept = file.read_bytes()
        if len(kept) == end - start + 4 and zlib.crc32(kept[:-4]) == int.from_bytes(kept[-4:]):
            os.utime(file)
            return kept[:-4]
    except OSError:
        pass

    def fetch() -> bytes:
        data = _filesystem(path.partition(":")[0]).cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came where {end - start} were asked for")
        return data

    data = _patient(path, fetch)
    _keep(file, data)
    return data


def _patient(path: str, attempt):
    """What `attempt` gives, tried a few times. Raises SampleError."""
    for turn in range(ATTEMPTS):
        if turn:
            time.sleep(PAUSE * 2 ** (turn - 1))
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # every filesystem has its own
            last = error
        if isinstance(last, FileNotFoundError) and _gone(last):
            raise SampleError("read", f"{path}: not there ({last})"[:200])
    raise SampleError("read", f"{path}: {type(last).__name__}: {last} ({ATTEMPTS} attempts)"[:200])


def _gone(error: FileNotFoundError) -> bool:
    """Whether it is meant: where it asks an HTTP server for a size, fsspec calls whatever goes wrong by this name."""
    return error.__cause__ is None or getattr(error.__cause__, "status", 0) in (404, 410)


def _keep(file: Path, data: bytes) -> None:
    """Put a piece into the cache; where that fails (a full disk), do without."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        put(file, data + zlib.crc32(data).to_bytes(4))
        _tidy(file.parents[1])


_written = 0


def _tidy(folder: Path) -> None:
    """Every so often, drop the pieces that were longest unread until they fill nine tenths of the room."""
    global _written
    _written += 1
    if (_written - 1) % max(1, min(64, ROOM // PIECE // 10)):
        return
    pieces = []
    for file in folder.rglob("*-*"):
        try:
            found = file.stat()
            pieces.append((found.st_mtime_ns, found.st_size, file))
        except OSError:  # another process was quicker
            continue
    held = sum(size for _, size, _ in pieces)
    for _, size_, file in sorted(pieces):
        if held <= ROOM * 0.9:
            break
        file.unlink(missing_ok=True)
        held -= size_
