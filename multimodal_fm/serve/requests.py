"""From the body of a request to what the search engine and the model take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..errors import SampleError, printable
from .limits import MAX_JSON, Limits, Refused, is_json
from .media import check_picture, check_sound
from .schema import MAX_PARTS, Embed, Search, SearchWithFiles, one_line

STATUS = {"pixel-limit": 413, "duration-limit": 413, "byte-limit": 413, "decode": 415}  # of a SampleError; else 422
T = TypeVar("T", bound=BaseModel)


def wrong(detail: str) -> Refused:
    return Refused(422, printable(detail)[:500], "request")


def parse(kind: type[T], data: bytes | str) -> T:
    """Raises Refused."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise wrong(one_line(error)) from None


async def read_json(request: Request, kind: type[T]) -> T:
    """Raises Refused."""
    if not is_json(request.headers):
        raise Refused(415, "send application/json", "content type")
    return parse(kind, await request.body())


async def read_search(
    request: Request, limits: Limits, reads: list[str]
) -> tuple[Search | SearchWithFiles, list[dict]]:
    """The settings of a search, and its parts as the engine takes them. Raises Refused."""
    if is_json(request.headers):
        settings = await read_json(request, Search)
        files: dict[str, list[bytes]] = {}
    else:
        text, files = await read_form(request, limits, ("request",))
        settings = parse(SearchWithFiles, text.get("request", "{}"))
    parts, named = [], set()
    for number, part in enumerate(settings.parts):
        data = part.model_dump()
        for modality in ("image", "audio"):
            if modality in data:
                place = data[modality]
                if place >= len(files.get(modality, ())):
                    raise wrong(f"parts[{number}].{modality}: no such file is sent along")
                named.add((modality, place))
                data[modality] = files[modality][place]
        if "text" in data:
            check_text(data["text"], f"parts[{number}].text", limits)
        parts.append(data)
    for modality, own in files.items():
        parts += [{modality: data, "weight": 1.0} for n, data in enumerate(own) if (modality, n) not in named]
    if not 1 <= len(parts) <= MAX_PARTS:
        raise wrong(f"a query has 1 to {MAX_PARTS} parts, this one has {len(parts)}")
    if unread := [modality for part in parts for modality in ("text", "image", "audio")
                  if modality in part and modality not in reads]:  # fmt: skip
        raise wrong(f"the model of this index reads {', '.join(reads)}, not {unread[0]}")
    return settings, parts


async def read_inputs(request: Request, limits: Limits, reads: list[str]) -> dict[str, list]:
    """What is to be embedded, by modality. Raises Refused."""
    if is_json(request.headers):
        given: dict[str, list] = {"text": (await read_json(request, Embed)).text}
        for number, text in enumerate(given["text"]):
            check_text(text, f"text[{number}]", limits)
    else:
        given = {modality: own for modality, own in (await read_form(request, limits, ()))[1].items() if own}
    if not given:
        raise wrong("send texts, pictures or sounds")
    if unread := [modality for modality in given if modality not in reads]:
        raise wrong(f"the model of this index reads {', '.join(reads)}, not {unread[0]}")
    return given


async def read_form(
    request: Request, limits: Limits, texts: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """The fields `texts` of a form, and the bytes of its files `image` and `audio`, which are looked at: their headers
    say what they are and how large. Raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refused(415, "send application/json or multipart/form-data", "content type")
    values: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "audio": []}
    try:
        async with request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=MAX_JSON) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name in files:
                    files[name].append(await value.read())
                elif isinstance(value, str) and name in texts and name not in values:
                    values[name] = value
                else:
                    known = [*texts, *files]
                    raise wrong(f"the form has a field {name[:60]!r} too many; it may have files {' and '.join(known)}")
    except Refused:
        raise
    except HTTPException as error:  # Starlette's own, of a form that cannot be parsed
        raise wrong(str(error.detail)) from None
    checks: dict[str, Callable[[bytes], None]] = {
        "image": lambda data: check_picture(data, limits.max_pixels),
        "audio": lambda data: check_sound(data, limits.max_seconds),
    }
    for name, check in checks.items():
        for number, data in enumerate(files[name]):
            try:
                await run_in_threadpool(check, data)
            except SampleError as error:
                raise refuse_sample(error, f"{name}[{number}]: ") from None
    return values, files


def refuse_sample(error: SampleError, where: str = "") -> Refused:
    return Refused(STATUS.get(error.reason, 422), printable(f"{where}{error}")[:500], error.reason)


def check_text(text: str, name: str, limits: Limits) -> None:
    if len(text) > limits.max_text:
        raise wrong(f"{name}: {len(text):,} characters, the limit is {limits.max_text:,}")


def describe(given: Any) -> str:
    """What an error says, as one line that a page may show."""
    return printable(" ".join(str(given).splitlines()))[:500]
