"""The web service over an index: search, embed, media, a map, and the page that uses them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Header, Request, Response
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from .. import __version__
from ..errors import SampleError, UserError, printable
from ..model import Model
from ..search.base import Index, Item
from ..search.engine import Found, attempt_many, found_to_data
from ..search.query import Part, Query, embed_queries, parse_query
from . import schema
from .batching import Batcher
from .layout import Map, draw
from .limits import COOKIE, LOCAL, Guard, Limits, Refused, Traffic, cookie_value, same
from .media import MediaReader, cut_range, file_name
from .metrics import Metrics
from .requests import describe, read_inputs, read_json, read_search

PAGE = Path(__file__).parent
SHOWN = 5000  # characters of a text that are told with an item; `/media/ID` has all of it
ABOUT = """Search a collection of texts, pictures and sounds by any of the three. A query is the weighted sum of its
parts; a part with a weight below 0 leads away from it. Errors are `{"detail": "one line"}`."""


@dataclass
class Settings:
    """How an index is served."""

    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = LOCAL  # names under which the service is reached
    any_address: bool = False  # numbers as well: for a service that is bound to all addresses
    token: str = ""
    name: str = ""  # of the collection, for the page
    map_file: Path = Path("map.json")
    remote_media: bool = False


class Service:
    """An index, its model, and what stands between them and the requests."""

    def __init__(self, index: Index, model: Model, settings: Settings):
        self.index, self.model, self.settings = index, model, settings
        self.metrics, self.traffic = Metrics(), Traffic()
        self.batch = Batcher(self.work, observe=self.metrics.observe_batch)
        self.media = MediaReader(settings.limits, settings.remote_media)
        self.map = Map(index, settings.map_file)
        self.reads = [modality for modality in model.modalities if modality in ("text", "image", "audio")]

    def work(self, jobs: list[tuple[Query, tuple]]) -> list:
        """The answers to jobs, as one batch: what a query finds, or, without a `how`, its vector (E,).

        A `how` is (top, to, where, fold); jobs of an equal one are one call of the engine.
        """
        answers: list[Any] = [None] * len(jobs)
        groups: dict[tuple, list[int]] = {}
        for number, (_, how) in enumerate(jobs):
            groups.setdefault(how, []).append(number)
        for how, numbers in groups.items():
            queries = [jobs[number][0] for number in numbers]
            for number, answer in zip(numbers, self._answer(queries, how), strict=True):
                answers[number] = answer
        return answers

    def _answer(self, queries: list[Query], how: tuple) -> list:
        try:
            if not how:
                return embed_queries(self.index, self.model, queries)
            top, to, where, fold = how
            return attempt_many(self.index, self.model, queries, top, to, dict(where), fold)
        except UserError as error:  # of the options or the collection, not of one query
            return [error] * len(queries)

    def find(self, id: str) -> tuple[Item, np.ndarray]:
        """Raises Refused where there is no such item."""
        found = self.index.get([id])
        if not found:
            raise Refused(404, "there is no item of this id", "unknown id")
        return found[0]

    def close(self) -> None:
        self.batch.close()
        self.map.close()


def create_app(index: Index, model: Model, settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application, for any server of these. It closes neither the index nor the model."""
    settings = settings or Settings()
    service = Service(index, model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        service.close()

    app = FastAPI(
        title="Multimodal search", version=__version__, description=ABOUT, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # these load scripts from another host
        redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    _add_errors(app)
    _add_queries(app, service)
    _add_items(app, service)
    _add_state(app, service)
    _add_page(app)
    _describe(app, bool(settings.token))
    app.add_middleware(
        Guard,
        limits=settings.limits,
        hosts=settings.hosts,
        any_address=settings.any_address,
        token=settings.token,
        observe=service.metrics.observe_request,
        traffic=service.traffic,
    )
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error is one line of JSON."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": describe(f"{where}: {first['msg']}")}, 422)

    @app.exception_handler(UserError)
    async def mendable(request: Request, error: UserError) -> Response:
        return JSONResponse({"detail": describe(error)}, 422)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        raise error  # the guard answers and counts it


def _add_queries(app: FastAPI, service: Service) -> None:
    limits = service.settings.limits

    @app.post(
        "/search", response_model=schema.Results, responses=schema.refusals(404, 415), tags=["search"],
        openapi_extra=schema.body(schema.Search, schema.multipart(schema.SearchWithFiles)),
    )  # fmt: skip
    async def search(request: Request) -> Any:
        """The items nearest to a query of texts, pictures, sounds and items of the index, for each modality."""
        wanted, parts = await read_search(request, limits, service.reads)
        for part in parts:
            if "id" in part:
                await run_in_threadpool(service.find, part["id"])
        began = time.perf_counter()
        how = (wanted.top, wanted.to or "", tuple(sorted(wanted.where.items())), wanted.fold)
        found = (await service.batch((parse_query(parts), how))).to_data()
        results = {modality: [found_entry(one) for one in own] for modality, own in found["hits"].items()}
        milliseconds = round(1000 * (time.perf_counter() - began), 1)
        return JSONResponse({"results": results, "background": found["background"], "milliseconds": milliseconds})

    @app.post(
        "/embed", response_model=schema.Vectors, responses=schema.refusals(415), tags=["search"],
        openapi_extra=schema.body(schema.Embed, schema.multipart(None)),
    )  # fmt: skip
    async def embed(request: Request) -> Any:
        """The vectors of texts, pictures or sounds."""
        given = await read_inputs(request, limits, service.reads)
        vectors: dict[str, list] = {}
        for modality, values in given.items():
            jobs = [service.batch((Query((Part(modality, value),)), ())) for value in values]
            vectors[modality] = [vector.tolist() for vector in await asyncio.gather(*jobs)]
        return JSONResponse({"model": service.index.model, "vectors": vectors})


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get("/item/{id}", response_model=schema.Entry, responses=schema.refusals(404), tags=["items"])
    def item(id: schema.Id) -> Any:
        """What the index says of an item."""
        return JSONResponse(entry(service.find(id)[0]))

    @app.get(
        "/media/{id}",
        response_class=Response,
        responses={
            200: {
                "description": "Its bytes, under the type that they show.",
                "content": {f"{kind}/*": {"schema": {"type": "string", "format": "binary"}}
                            for kind in ("image", "audio", "text")},
            },
            206: {"description": "A part of its bytes.", "content": {"audio/*": {}, "image/*": {}, "text/*": {}}},
            **schema.refusals(404, 416),
        },
        tags=["items"],
    )  # fmt: skip
    def media(
        id: schema.Id,
        thumbnail: bool = Parameter(False, description="Of a picture: a smaller one."),
        range: str | None = Header(None, max_length=200, description="bytes=START-END"),
    ) -> Response:
        """An item's picture, sound or text."""
        item = service.find(id)[0]
        try:
            small = thumbnail and item.modality == "image"
            data, kind = service.media.thumbnail(item) if small else service.media.read(item)
        except SampleError as error:
            raise Refused(404, describe(error), "media") from None
        except (UserError, OSError) as error:
            print(printable(f"mmfm: {item.source}: {error}"), file=sys.stderr)
            raise Refused(404, "the file that it is from cannot be read any more", "media") from None
        return send_bytes(data, kind, file_name(item, kind), range)

    @app.get("/sample", response_model=schema.Sample, responses=schema.refusals(), tags=["items"])
    def sample(count: int = Parameter(12, ge=1, le=60), seed: int = Parameter(0, ge=0, lt=2**32)) -> Any:
        """Some items of each modality, to begin with."""
        drawn = draw(service.index, count, seed)
        return JSONResponse({"items": [entry(item) for item, _ in drawn][:count]})

    making = {202: {"model": schema.Making, "description": "It is being made: ask again in a second."}}

    @app.get("/map", response_model=schema.MapData, responses={**making, **schema.refusals(503)}, tags=["items"])
    def map() -> Any:
        """Where the items lie on a map in two dimensions: near on the map is near for the model."""
        try:
            data = service.map.get()
        except UserError:
            raise
        except Exception as error:  # of the process that makes it
            raise Refused(503, describe(f"the map cannot be made: {type(error).__name__}: {error}"), "map") from None
        return JSONResponse({"state": "being made"}, 202) if data is None else JSONResponse(data)


def _add_state(app: FastAPI, service: Service) -> None:
    limits, token = service.settings.limits, service.settings.token

    @app.get("/about", response_model=schema.About, responses=schema.refusals(), tags=["state"])
    def about() -> Any:
        """What the collection holds, and what may be asked of it."""
        index = service.index
        return JSONResponse({
            "name": service.settings.name, "items": len(index), "counts": index.counts(), "dim": index.dim,
            "model": index.model, "reads": service.reads, "limits": asdict(limits),
        })  # fmt: skip

    @app.get(
        "/health", response_model=schema.Health, tags=["state"],
        responses={503: {"model": schema.Health, "description": schema.REFUSALS[503]}, **schema.refusals()},
    )  # fmt: skip
    def health() -> Any:
        """Whether the service answers; needs no token."""
        alive = service.batch.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses={
        200: {"description": "Counters as Prometheus reads them.", "content": {"text/plain": {}}}, **schema.refusals(),
    }, tags=["state"])  # fmt: skip
    def metrics() -> Response:
        """Requests, seconds, refusals and batches."""
        service.metrics.in_flight.set(service.traffic.requests)
        service.metrics.held.set(service.traffic.held)
        for modality, count in service.index.counts().items():
            service.metrics.items.labels(modality).set(count)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post(
        "/login", status_code=204, response_class=Response, responses=schema.refusals(415), tags=["state"],
        openapi_extra=schema.body(schema.Login),
    )  # fmt: skip
    async def login(request: Request) -> Response:
        """Exchange the token for a cookie, so that a browser can show media."""
        given = (await read_json(request, schema.Login)).token
        if token and not same(given, token):
            raise Refused(401, "this is not the token", "token", {"WWW-Authenticate": "Bearer"})
        answer = Response(status_code=204)
        if token:
            value, secure = cookie_value(token), request.url.scheme == "https"
            answer.set_cookie(COOKIE, value, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
        return answer


def _add_page(app: FastAPI) -> None:
    files = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path, name in files.items():
        data = (PAGE / name).read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        kind = f"{kinds[name.partition('.')[2]]}; charset=utf-8"

        def page(request: Request, data=data, headers=headers, kind=kind) -> Response:
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            return Response(data, headers=headers, media_type=kind)

        app.add_route(path, page, methods=["GET"], include_in_schema=False)


def _describe(app: FastAPI, has_token: bool) -> None:
    """The OpenAPI description, with the shapes of bodies that endpoints read themselves, and of the token."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            data = make()
            schemas = data["components"]["schemas"]
            for model in (schema.Search, schema.SearchWithFiles, schema.Embed, schema.Login):
                own = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= own.pop("$defs", {})
                schemas[model.__name__] = own
            if has_token:
                data["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                for path, own in data["paths"].items():
                    for operation in own.values():
                        operation["security"] = [] if path in ("/health", "/login") else [{"token": []}]
        return app.openapi_schema or {}

    app.openapi = openapi


def entry(item: Item) -> dict[str, Any]:
    """What is told of an item."""
    return _entry(found_to_data(Found(item, 0.0, 0.0)))


def found_entry(found: dict[str, Any]) -> dict[str, Any]:
    """What is told of something that was found, as the engine has it in plain data."""
    more = {"score": round(found["score"], 4), "standing": round(found["standing"], 1)}
    return {**_entry(found), **more, "copies": [copy["id"] for copy in found["copies"]]}


def _entry(data: dict[str, Any]) -> dict[str, Any]:
    """Of its source the name only, not the folders of the machine."""
    kept = {name: data[name] for name in ("id", "modality", "key", "fields")}
    kept["text"] = data["text"] if len(data["text"]) <= SHOWN else data["text"][: SHOWN - 1] + "…"
    return {**kept, "source": os.path.basename(data["source"]), "media": f"/media/{quote(data['id'], safe='')}"}


def send_bytes(data: bytes, kind: str, name: str, range: str | None) -> Response:
    """A medium, whole or a part. Nothing in it is run, wherever it is opened."""
    headers = {
        "Content-Disposition": f'inline; filename="{name}"',
        "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
        "Cache-Control": "private, max-age=86400",
        "Accept-Ranges": "bytes",
    }
    try:
        span = cut_range(range, len(data)) if range else None
    except UserError as error:
        raise Refused(416, str(error), "range", {"Content-Range": f"bytes */{len(data)}"}) from None
    if span is None:
        return Response(data, media_type=kind, headers=headers)
    headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{len(data)}"
    return Response(data[span[0] : span[1]], 206, media_type=kind, headers=headers)
