"""Reads the files and URLs that a table names.

A table may come from a stranger: its paths stay below its own folder and its URLs reach public addresses only, unless
the user passes --allow-outside.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import time
from typing import Any

from ..errors import SampleError, UserError
from .samples import AUDIO_FILES, IMAGE_FILES, MAX_BYTES

SCHEMES = ("http", "https", "s3", "gs")
ATTEMPTS, PAUSE, TIMEOUT = 3, 0.5, 30.0  # tries, seconds between them (doubled each time), seconds without a byte


def read_file(path: str, roots: tuple[str, ...] = ()) -> bytes:
    """Read a regular file of at most `MAX_BYTES`; with `roots`, only one below these folders. Raises SampleError."""
    try:
        real = os.path.realpath(path)
        if roots and not any(is_below(real, root) for root in roots):
            raise SampleError("name", f"{path}: outside of the table's folder (--allow-outside reads it)"[:200])
        if not stat.S_ISREG(os.stat(real).st_mode):  # opening a FIFO would wait forever
            raise SampleError("name", f"{path}: not a regular file"[:200])
        with open(real, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise SampleError("missing", f"{path}: not there"[:200]) from None
    except (OSError, ValueError) as error:
        raise SampleError("read", f"{path}: {error}"[:200]) from None
    if len(data) > MAX_BYTES:
        raise SampleError("byte-limit", f"more than {MAX_BYTES} bytes")
    return data


def is_below(path: str, folder: str) -> bool:
    """Whether a path lies below a folder, once all symbolic links are followed."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def fetch(name: str, roots: tuple[str, ...], allow_outside: bool = False) -> bytes:
    """The bytes of a URL or of a path relative to the first of `roots`, at most `MAX_BYTES`. Raises SampleError."""
    scheme, colon, _ = name.partition(":")
    if not colon or "/" in scheme or len(scheme) < 2:
        return read_file(os.path.join(roots[0], name), () if allow_outside else roots)
    if scheme not in SCHEMES or "://" not in name or "::" in name:
        raise SampleError("name", f"not a path, nor a URL of {', '.join(SCHEMES)}: {name}"[:200])
    for attempt in range(ATTEMPTS):
        try:
            return _download(name, scheme, allow_outside)
        except (SampleError, UserError):
            raise
        except FileNotFoundError:
            raise SampleError("missing", f"{name}: not there"[:200]) from None
        except Exception as error:  # each filesystem of fsspec raises its own
            last = f"{type(error).__name__}: {error}"
            time.sleep(PAUSE * 2**attempt if attempt + 1 < ATTEMPTS else 0)
    raise SampleError("read", f"{name}: {last} ({ATTEMPTS} attempts)"[:200])


def _download(url: str, scheme: str, allow_outside: bool) -> bytes:
    filesystem: dict[str, Any] = {}
    reading: dict[str, Any] = {}
    try:
        import fsspec

        if scheme.startswith("http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=600, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            filesystem = {"client_kwargs": {"timeout": timeout}}
            if not allow_outside:
                filesystem["get_client"] = _public_client
            # As a stream of unknown size: fsspec would ask for the size first, and report any failure as "not found".
            reading = {"block_size": 0, "size": MAX_BYTES}
        opened = fsspec.filesystem(scheme, **filesystem)
    except ImportError as error:
        raise UserError(f"{url}: {error}; URLs need `pip install multimodal_fm[pack]`") from None
    with opened.open(url, "rb", **reading) as file:
        data = bytearray()
        while len(data) <= MAX_BYTES and (block := file.read(1 << 20)):
            data += block
    if len(data) > MAX_BYTES:
        raise SampleError("byte-limit", f"more than {MAX_BYTES} bytes")
    return bytes(data)


async def _public_client(**options):
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_public_socket), **options)


def _public_socket(address: tuple) -> socket.socket:
    """A socket for one connection of aiohttp. It is asked with the resolved address, after each redirect too."""
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise SampleError("name", f"{where[0]} is not a public address (--allow-outside reads it)")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from everywhere: not loopback, private, link-local or otherwise reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


MAGIC = (
    ("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG"), ("gif", b"GIF8"), ("bmp", b"BM"), ("tif", b"II*\0"),
    ("tif", b"MM\0*"), ("flac", b"fLaC"), ("ogg", b"OggS"), ("mp3", b"ID3"), ("mp3", b"\xff\xfb"), ("mp3", b"\xff\xf3"),
    ("aiff", b"FORM"), ("au", b".snd"), ("caf", b"caff"),
)  # fmt: skip


def sniff_extension(data: bytes, modality: str, name: str) -> str:
    """The extension that the bytes call for, else the one in the name, so that the check can say what is wrong."""
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "wav"
    if extension := next((extension for extension, start in MAGIC if data.startswith(start)), None):
        return extension
    extension = name.rpartition(".")[2].lower()
    known, default = (IMAGE_FILES, "jpg") if modality == "image" else (AUDIO_FILES, "wav")
    return extension if extension in known else default
