"""Whether a checkpoint was written by this user, so that the files that its configuration names may be read.

A checkpoint from a stranger is data: its weights and settings are loaded, but no file or URL that it names is opened.
Each checkpoint is signed with a key that never leaves the user's own folder (HMAC-SHA-256 of its manifest, which holds
the hashes of all its files), so that a signature cannot be made or moved to another checkpoint by anybody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ..corpus.storage import cache_folder

SIGNATURE = "SIGNATURE"  # in a checkpoint's folder


def sign(manifest: bytes) -> str:
    """The signature of a checkpoint's manifest; empty where no key can be kept, as without a folder to write to."""
    key = _key()
    return hmac.new(key, manifest, hashlib.sha256).hexdigest() if key else ""


def is_own(folder: Path, manifest: str) -> bool:
    """Whether the checkpoint in `folder`, whose manifest is the file of that name, was written by this user."""
    try:
        expected = sign((folder / manifest).read_bytes())
        return bool(expected) and hmac.compare_digest((folder / SIGNATURE).read_bytes(), expected.encode())
    except OSError:
        return False


def _key() -> bytes:
    """This user's key, made on first use; empty where it cannot be kept or may be known to others."""
    file = cache_folder() / f"key-{os.getuid()}"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            work = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
            with open(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
                opened.write(secrets.token_bytes(32))
            try:
                os.link(work, file)  # whole or not at all, and the first of several processes wins
            except FileExistsError:
                pass
            finally:
                work.unlink()
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
            found = os.fstat(opened.fileno())
            if found.st_uid == os.getuid() and not found.st_mode & 0o077 and found.st_size == 32:
                return opened.read()
    return b""
