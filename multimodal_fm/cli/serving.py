"""Shares a collection: serve."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError
from .app import app


@app.command
def serve(
    index: str,
    /,
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    token: str = "",
    run: str = "",
    device: str = "auto",
    allow_host: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    remote_media: Annotated[bool, Parameter(negative=())] = False,
    max_upload: str = "16MB",
    max_pixels: int = 40_000_000,
    max_seconds: float = 120.0,
    max_text: int = 2_000,
    max_queries: int = 64,
    max_requests: int = 512,
    rate: float = 20.0,
    timeout: float = 20.0,
) -> None:
    """Search an index in a browser, and by HTTP: `mmfm serve collection`, then open http://127.0.0.1:8000.

    Needs `pip install "multimodal_fm[serve]"`; the map is drawn by UMAP with the extra `map`, else by t-SNE.

    Parameters
    ----------
    index
        What `mmfm index` made: a folder, or postgresql://...
    port
        0: any that is free.
    host
        The address to listen at; 0.0.0.0 for all of this machine, so that others reach it: then set a token.
    token
        What a client has to show; without it, $MMFM_TOKEN. The page asks for it.
    run
        The run folder of the model that made the index; without it, where the index says that it is.
    device
        cpu, cuda, or auto.
    allow_host
        Further names under which the service is reached, as behind a proxy.
    remote_media
        Read media from the URLs that the index names; do not where somebody else made it.
    max_upload
        The most bytes of a request.
    max_pixels
        The most pixels of a picture.
    max_seconds
        The most seconds of a sound.
    max_text
        The most characters of a text.
    max_queries
        Requests to the model at a time; more are told to come again.
    max_requests
        Requests of any kind at a time.
    rate
        Requests to the model a second, of one client.
    timeout
        Seconds in which a request has to arrive, and in which its answer has to be taken.
    """
    from ..corpus.storage import parse_size

    try:
        from ..serve.limits import Limits
        from ..serve.start import start
    except ImportError as error:
        raise UserError(f'serve needs {error.name}: pip install "multimodal_fm[serve]"') from None
    limits = Limits(
        max_upload=parse_size(max_upload, "--max-upload"), max_pixels=max_pixels, max_seconds=max_seconds,
        max_text=max_text, max_queries=max_queries, max_requests=max_requests, rate=rate, burst=max(1, round(3 * rate)),
        timeout=timeout,
    )  # fmt: skip
    secret = token or os.environ.get("MMFM_TOKEN", "")
    start(index, host, port, secret, run, device, limits, allow_host or [], remote_media)
