"""What is sent to the service and what it answers, as its OpenAPI description has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _not_zero(weight: float) -> float:
    if not weight:
        raise ValueError("is not 0")
    return weight


Weight = Annotated[
    float,
    Field(ge=-10, le=10, allow_inf_nan=False, description="Below 0: away from it."),
    Field(json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]
Id = Annotated[str, Field(min_length=1, max_length=200)]
Modality = Literal["text", "image", "audio"]
MAX_PARTS = 16
MAX_TOP = 100


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    text: str = Field(min_length=1, pattern=r"\S", description="Words to search for.")
    weight: Weight = 1.0


class IdPart(Strict):
    id: Id = Field(description="An item of the index: more like this.")
    weight: Weight = 1.0


class ImagePart(Strict):
    image: int = Field(ge=0, lt=MAX_PARTS, description="Which of the pictures that are sent along, from 0 on.")
    weight: Weight = 1.0


class AudioPart(Strict):
    audio: int = Field(ge=0, lt=MAX_PARTS, description="Which of the sounds that are sent along, from 0 on.")
    weight: Weight = 1.0


class Settings(Strict):
    top: int = Field(12, ge=1, le=MAX_TOP, description="How many of each modality.")
    to: Modality | None = Field(None, description="Only results of this modality.")
    where: dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=1000)]] = Field(
        default_factory=dict, max_length=16, description="Only items whose fields have these values."
    )
    fold: bool = Field(True, description="Show near copies once.")


class Search(Settings):
    """The query is the weighted sum of its parts."""

    parts: list[TextPart | IdPart] = Field(min_length=1, max_length=MAX_PARTS)


class SearchWithFiles(Settings):
    """Beside pictures and sounds; one that no part names has the weight 1."""

    parts: list[TextPart | IdPart | ImagePart | AudioPart] = Field(default_factory=list, max_length=MAX_PARTS)


class Embed(Strict):
    text: list[Annotated[str, Field(min_length=1, pattern=r"\S")]] = Field(min_length=1, max_length=64)


class Login(Strict):
    token: str = Field(max_length=1000)


class Entry(BaseModel):
    """An item of the index."""

    id: str
    modality: str
    text: str = Field(description="The beginning of the text; of a picture or a sound what is said about it.")
    source: str = Field(description="The name of the file that it is from.")
    key: str
    fields: dict[str, Any]
    media: str = Field(description="Where its bytes are.")


class Found(Entry):
    """An item that is near to the query."""

    score: float = Field(description="The cosine with the query, -1 to 1.")
    standing: float = Field(description="Per cent of the collection's items of its modality that are farther.")
    copies: list[str] = Field(description="Near copies of it, by id, which are not shown.")


class Background(BaseModel):
    """The scores of a random sample of a modality's items."""

    count: int
    median: float
    highest: float


class Results(BaseModel):
    background: dict[str, Background]
    results: dict[str, list[Found]] = Field(description="By modality, the nearest first.")
    milliseconds: float


class Vectors(BaseModel):
    """Unit vectors, comparable across modalities by their dot product."""

    model: str
    vectors: dict[str, list[list[float]]]


class About(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    name: str
    items: int
    counts: dict[str, int]
    dim: int
    model: str
    reads: list[str] = Field(description="The modalities that a query may have.")
    limits: dict[str, float]


class Health(BaseModel):
    status: Literal["ok", "failed"]


class Sample(BaseModel):
    items: list[Entry]


class MapData(BaseModel):
    method: str
    items: int
    ids: list[str]
    modalities: list[str]
    texts: list[str]
    x: list[float]
    y: list[float]


class Making(BaseModel):
    state: Literal["being made"]


class Error(BaseModel):
    detail: str = Field(description="One line: what is wrong and how to mend it.")


REFUSALS = {
    400: "There is not one Host header.",
    401: "The token is missing or wrong.",
    403: "The request comes from a page of another origin.",
    404: "There is no such item.",
    408: "The request did not arrive in time.",
    413: "Too long, too many pixels, or too many seconds.",
    415: "Another content type than those that are read.",
    416: "The range lies outside of the medium.",
    421: "The service is not reached under this name.",
    422: "The request cannot be understood.",
    429: "Too many requests; Retry-After says when to come again.",
    503: "The service cannot answer.",
}
EVERYWHERE = (400, 401, 403, 408, 413, 421, 422, 429)


def refusals(*more: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer besides, for its description."""
    return {status: {"model": Error, "description": REFUSALS[status]} for status in sorted({*EVERYWHERE, *more})}


def one_line(error: ValidationError) -> str:
    """What is wrong with a request and where; of a part that fits no kind of parts, what is wrong with the nearest."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    grave = [one for one in errors if one["type"] not in ("missing", "extra_forbidden")] or errors
    first = max(grave, key=lambda one: -len(one["loc"]) if one["type"] == "missing" else 0)
    names = [str(part) for part in first["loc"] if not str(part).endswith("Part")]
    where = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in names).lstrip(".")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where[:200]}: {message[:300]}" if where else message[:300]


def multipart(request: type[BaseModel] | None) -> dict[str, Any]:
    """The schema of a form with pictures, sounds and, as JSON, a request."""
    files = {"type": "array", "maxItems": MAX_PARTS, "items": {"type": "string", "format": "binary"}}
    properties: dict[str, Any] = {"image": files, "audio": files}
    if request is not None:
        properties["request"] = {
            "type": "string",
            "contentMediaType": "application/json",
            "description": f"JSON of {request.__name__}",
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def body(json: type[BaseModel], form: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an endpoint that reads its body itself says of it."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{json.__name__}"}}}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}
