"""Byte ranges of local and remote files, with retries and a bounded cache on disk, and atomic writes.

Local files are read with `pread`; everything else comes through fsspec.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import SampleError, UserError

ATTEMPTS = 5
BACKOFF = 0.1  # seconds before the second attempt, doubled each time
TIMEOUT = 20.0  # seconds without a byte, after which an attempt has failed
BLOCK_BYTES = 1 << 20  # fetched and cached at a time
VERSION_FIELDS = (  # what filesystems call that by which two versions of a file differ, the surest first
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "mtime"),
)
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "file", "memory")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def is_remote(path: str) -> bool:
    return "://" in path


def parse_size(text: str, name: str) -> int:
    """The bytes of `256MB`, `1.5GiB` or `1000000`, given as the setting `name`. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower(), re.ASCII)
    if not found:
        raise UserError(f"{name} is bytes as in 256MB or 1GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def cache_folder() -> Path:
    """Where indexes and fetched blocks are kept: `$MMFM_CACHE`, else `~/.cache/multimodal_fm`, else, for a user without
    a home, a folder among the temporary ones."""
    if folder := os.environ.get("MMFM_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "multimodal_fm"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"multimodal_fm-{os.getuid()}"


def cache_limit() -> int:
    """The bytes that fetched blocks may take: `$MMFM_CACHE_BYTES`, 10 GiB by default. Raises UserError."""
    return parse_size(os.environ.get("MMFM_CACHE_BYTES") or "10GiB", "MMFM_CACHE_BYTES")


def write_atomic(path: str | Path, data: bytes | Iterable[bytes], sync: bool = True) -> None:
    """Writes a file that appears complete or not at all, whoever else reads or writes it, and replaces one of its name.

    Args:
        data: the content, whole or in parts.
        sync: wait until the content is on the disk, so that it also outlives a power cut.

    Raises OSError with the file's name.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: str | Path) -> None:
    """Waits until the names in a folder are on the disk, as after `write_atomic`, so that they outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(pattern: str) -> list[str]:
    """The files that a path, a glob pattern or a URL names, sorted. Raises UserError for a scheme that is not read."""
    scheme, colon, _ = pattern.partition(":")
    if colon and (is_remote(pattern) or scheme == "pipe"):
        if scheme not in SCHEMES or not is_remote(pattern):
            raise UserError(f"{pattern}: {scheme}: is not read; give a path or one of {', '.join(SCHEMES)}")
        if scheme.startswith("http") or not set("*?[") & set(pattern):
            return [pattern]
        try:
            files = _retry(pattern, lambda: _filesystem(scheme).glob(pattern))
        except SampleError as error:
            raise UserError(error.detail) from None
        return sorted(f if is_remote(f) else f"{scheme}://{f.lstrip('/')}" for f in files)
    if os.path.isfile(pattern):  # its name may hold a pattern's characters
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))


def stat(path: str) -> tuple[int, str]:
    """A file's bytes, and what changes when it is replaced: its time stamp, or a server's ETag. Raises OSError."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    cache_limit()  # where it cannot be parsed, the user learns it now
    try:
        info = _retry(path, lambda: _filesystem(path.partition(":")[0]).info(path))
    except SampleError as error:
        raise OSError(error.detail) from None
    if info.get("size") is None:
        raise OSError("the server does not say how long it is, so it cannot be read by range")
    return int(info["size"]), next((str(info[name]) for name in VERSION_FIELDS if info.get(name)), "")


def read(path: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, fewer at the end of the file. Processes and threads may read at the same time.

    Raises OSError for a local file, SampleError("read") for a remote one.
    """
    if not is_remote(path):
        file = _open(path, os.getpid())  # a reference of our own: another thread may drop the cached one
        data = os.pread(file.fileno(), length, offset)
        while len(data) < length and (more := os.pread(file.fileno(), length - len(data), offset + len(data))):
            data += more  # one call returns 2 GiB at most
        return data
    size, version = _cached_stat(path)
    stop = min(offset + length, size)
    if stop <= offset:
        return b""
    first = offset // BLOCK_BYTES
    blocks = (_read_block(path, size, version, number) for number in range(first, -(-stop // BLOCK_BYTES)))
    return b"".join(blocks)[offset - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]


@functools.lru_cache(maxsize=256)
def _open(path: str, process: int):
    return open(path, "rb", buffering=0)


@functools.lru_cache(maxsize=4096)
def _cached_stat(path: str) -> tuple[int, str]:
    try:
        return stat(path)
    except OSError as error:
        raise SampleError("read", f"{path}: {error}"[:200]) from None


def reopen_files() -> None:
    """Forgets open files and remembered sizes: a file that was replaced since is then read anew."""
    _open.cache_clear()
    _cached_stat.cache_clear()


def _filesystem(scheme: str):
    import fsspec

    options = {}
    if scheme.startswith("http"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=TIMEOUT, sock_read=TIMEOUT)}
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{scheme}: cannot be read here: {error}") from None


def _retry(path: str, attempt: Callable):
    """What `attempt` returns, tried a few times. Raises SampleError."""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(BACKOFF * 2 ** (number - 1))
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # every filesystem raises its own
            last = error
        # Asked for a size, fsspec raises FileNotFoundError for any failure of an HTTP server: its cause says which.
        cause = last.__cause__
        if isinstance(last, FileNotFoundError) and (cause is None or getattr(cause, "status", 0) in (404, 410)):
            raise SampleError("read", f"{path}: not there ({last})"[:200])
    raise SampleError("read", f"{path}: {type(last).__name__}: {last} ({ATTEMPTS} attempts)"[:200])


def _read_block(path: str, size: int, version: str, number: int) -> bytes:
    """One block of a remote file, from the cache or from its server. Raises SampleError."""
    digest = hashlib.sha256(f"{path}\0{version}\0{size}".encode()).hexdigest()
    cached = cache_folder() / "blocks" / digest[:2] / f"{digest}-{number}"
    start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)
    with contextlib.suppress(OSError):
        data = cached.read_bytes()
        if len(data) == stop - start + 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:]):
            os.utime(cached)
            return data[:-4]

    def fetch() -> bytes:
        data = _filesystem(path.partition(":")[0]).cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
        return data

    data = _retry(path, fetch)
    with contextlib.suppress(OSError):  # a full disk, or none that may be written: go on without the cache
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, (data, zlib.crc32(data).to_bytes(4)), sync=False)
        _evict(cached.parents[1])
    return data


_blocks_written = 0


def _evict(folder: Path) -> None:
    """Once in a while, deletes the blocks that were longest unread until nine tenths of the limit are left."""
    global _blocks_written
    _blocks_written += 1
    limit = cache_limit()
    if (_blocks_written - 1) % max(1, min(64, limit // BLOCK_BYTES // 10)):
        return
    blocks = []
    for file in folder.rglob("*-*"):
        with contextlib.suppress(OSError):  # another process was quicker
            status = file.stat()
            blocks.append((status.st_mtime_ns, status.st_size, file))
    total = sum(size for _, size, _ in blocks)
    for _, size, file in sorted(blocks):
        if total <= limit * 0.9:
            break
        file.unlink(missing_ok=True)
        total -= size
