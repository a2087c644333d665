"""`mmfm serve`: opens an index and its model, and serves them until it is interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI

from ..corpus.storage import cache_folder, is_remote
from ..errors import UserError, printable
from ..search.query import load_model
from .limits import LOCAL, Limits, is_address
from .protocol import with_deadlines
from .server import Settings, create_app


def start(
    place: str,
    host: str,
    port: int,
    token: str,
    run: str,
    device: str,
    limits: Limits,
    more_hosts: Sequence[str],
    remote_media: bool,
) -> None:
    """Serves the index at `place`. Raises UserError where it or its model cannot be had, or the address is taken."""
    from ..search.index import open_index

    with listen(host, port) as listening, contextlib.closing(open_index(place)) as index:
        hosts, any_address = allowed_hosts(host, more_hosts)
        settings = Settings(limits, hosts, any_address, token, collection_name(place), map_file(place), remote_media)
        app = create_app(index, load_model(index, run, device), settings)
        address = "[::1]" if host in ("::", "::1") else "127.0.0.1" if host in ("0.0.0.0", "") else host
        print(f"http://{address}:{listening.getsockname()[1]}  ({printable(settings.name)}: {len(index):,} items)")
        if host not in LOCAL and not token:
            print("mmfm: whoever reaches this address can search; --token TOKEN asks for one", file=sys.stderr)
        sys.stdout.flush()
        serve(app, listening, limits)


def serve(app: FastAPI, listening: socket.socket, limits: Limits) -> None:
    """Answers until it is interrupted."""
    make_server(app, limits).run(sockets=[listening])


def make_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(
        app, http=with_deadlines(limits.timeout), ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=15, timeout_graceful_shutdown=5, backlog=1024,
    ))  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        mend = "; choose another --port, or 0 for any that is free" if port else ""
        raise UserError(f"{host}:{port}: {getattr(error, 'strerror', '') or error}{mend}") from None


def allowed_hosts(host: str, more: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The names under which a service at this address is reached, and whether any number is one."""
    everywhere = host in ("0.0.0.0", "::", "")
    own = socket.gethostname() if everywhere else host
    return [*LOCAL, own, *more], everywhere or (is_address(host) and host not in LOCAL)


def collection_name(place: str) -> str:
    """What the page calls it: the folder's or the database's name, without what else an address may tell."""
    if is_remote(place):
        address = urlsplit(place)
        return parse_qs(address.query).get("collection", [address.path.strip("/")])[0] or "collection"
    return Path(place).resolve().name


def map_file(place: str) -> Path:
    """Where the map of an index is kept: beside it, or in the cache where it is no folder."""
    if not is_remote(place) and Path(place).is_dir():
        return Path(place) / "map.json"
    return cache_folder() / "maps" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
