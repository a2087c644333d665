"""Text: byte-level BPE (Sennrich et al. 2016, bytes as in GPT-2), learned from the run's own training text."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput, Lost
from ..rows import lookup, parse
from ..tokens import Tokens, sequence_of

extensions = ("txt", "json")
USUAL_FIELDS = ("txt", "caption", "captions", "text")
BEGIN, END = 0, 1  # ids that no text can spell: the merges start behind them
FILE = "tokenizer.json"


@dataclass
class Config:
    vocabulary: int = 4096  # ids, the two special ones and the 256 bytes among them
    limit: int = 256  # tokens a sequence; training draws a window of longer text, evaluation covers it
    fields: list[str] | dict[str, float] = field(default_factory=lambda: list(USUAL_FIELDS))
    """Where an item's text is: `txt` is the member of that name, anything else a field of the JSON (dots go deeper; a
    string, a list or a map of strings). A list: the first that the item has. A map: training draws by these weights."""
    file: str = ""  # a trained tokenizer.json; empty: `fit` writes one into the run folder
    fit_bytes: int = 20_000_000  # how much training text the merges are learned from

    def __post_init__(self):
        if self.vocabulary < 258 or self.limit < 3:
            raise ValueError("vocabulary is at least 258 (the bytes and two marks), limit at least 3")
        weights = self.fields.values() if isinstance(self.fields, dict) else [1.0]
        if not self.fields or not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError("fields names at least one field, with weights from 0 up")


def fit(config: Config, raws, folder: Path) -> Config:
    """Learn the merges from at most `fit_bytes` of text and save them as `folder/tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        limit_alphabet=256,
    )

    def texts():
        left = config.fit_bytes
        for raw in raws:
            for text in _readable(config, raw):
                text = _whole(text[: 1 + left // 4])
                left -= len(text.encode())
                yield text
            if left <= 0:
                return

    tokenizer.train_from_iterator(texts(), trainer)
    path = Path(folder) / FILE
    own = f"{path}.{os.getpid()}"
    tokenizer.save(own)
    os.replace(own, path)  # at once: another process may be reading it
    return replace(config, file=str(path))


def _readable(config: Config, raw: dict) -> list[str]:
    try:
        return [text for found in _fields(config, raw).values() for text in found]
    except Lost:
        return []


def check(config: Config) -> None:
    """Raises BadInput where the trained file is missing or holds more ids than the model has."""
    held = bpe(config.file).get_vocab_size() + 2
    if held > config.vocabulary:
        raise BadInput(
            f"{config.file} holds {held} ids: set tokenizers.text.vocabulary to that, not {config.vocabulary}"
        )


def _load(file: str):
    from tokenizers import Tokenizer

    if not file:
        raise BadInput("the text tokenizer has no file: it is trained by `mmfm pretrain`, or set tokenizers.text.file")
    try:
        return Tokenizer.from_file(file)
    except Exception as error:
        raise BadInput(f"{file}: not a tokenizer ({error})") from None


class _Loaded(threading.local):
    """What a thread has loaded: two threads with a tokenizer each are quicker than with one between them."""

    def __init__(self):
        self.bpe = functools.cache(_load)


_loaded = _Loaded()


def bpe(file: str):
    """The trained merges in `file`, this thread's own. Raises BadInput where there are none."""
    return _loaded.bpe(file)


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which are no characters."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


CHUNK = 4096  # characters encoded at a time, so that a pasted megabyte costs no more than its limit


def _chunks(text: str) -> list[str]:
    return [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]


def encode(config: Config, text: str, limit: int | None = None) -> list[int]:
    """Ids of `text`, without BEGIN and END; only as much of it is encoded as `limit` ids need."""
    ids, merges = [], bpe(config.file)
    for chunk in _chunks(_whole(text)):
        ids += [i + 2 for i in merges.encode(chunk, add_special_tokens=False).ids]
        if limit is not None and len(ids) >= limit:
            return ids[:limit]
    return ids


def decode(config: Config, ids: list[int]) -> str:
    """The text that `encode` made `ids` of."""
    return bpe(config.file).decode([i - 2 for i in ids if i > END], skip_special_tokens=False)


def count_bytes(config: Config, ids: list[int]) -> int:
    """How many bytes of text `ids` stand for: the merges are spelled with one character a byte."""
    return sum(len(bpe(config.file).id_to_token(i - 2)) for i in ids if i > END)


def read(config: Config, raw, generator: torch.Generator | None = None) -> list[Tokens]:
    """Sequences BEGIN ids END of at most `limit` tokens, content (N,) int64. raw: the item's members, or a string.

    With a generator one text is drawn, and of a long one a window; without, the item's first text, cut into at most
    `MOST_WINDOWS` windows. Raises Lost.
    """
    found = _offered(config, raw)
    if not found:
        return []
    if generator is None:
        return _windows(config, next(iter(found.values()))[0])
    text, draw = _drawn(config, found, generator)
    return [_window(config, encode(config, text), draw)]


def read_many(config: Config, raws: list, generators: list[torch.Generator]) -> list[list[Tokens] | Lost]:
    """`read` of each item with its generator, or what it raises; all of them in one call of the tokenizer.

    It is called by several readers at a time, so threads of the tokenizer's own, which would be in their way, are
    turned off unless `TOKENIZERS_PARALLELISM` is set.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results, drawn, chunks = [], [], []
    for raw, generator in zip(raws, generators, strict=True):
        try:
            found = _offered(config, raw)
        except Lost as error:
            results.append(error)
            continue
        results.append([])
        if found:
            text, draw = _drawn(config, found, generator)
            pieces = _chunks(_whole(text))
            chunks += pieces
            drawn.append((results[-1], len(pieces), draw))
    encoded = iter(bpe(config.file).encode_batch_fast(chunks, add_special_tokens=False) if chunks else ())
    for views, count, draw in drawn:
        ids = np.concatenate([np.array(next(encoded).ids, dtype=np.int64) for _ in range(count)])
        ids += 2
        views.append(_window(config, ids, draw))
    return results


def _drawn(config: Config, found: dict[str, list[str]], generator: torch.Generator) -> tuple[str, float]:
    """One of the item's texts, of a long one a part, and the draw that says which of its ids are taken."""
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    text = _draw(config, found, draws)
    reach = (config.limit - 2) * 8  # characters: far more than there is room for of nearly any text
    start = _pick(draws[2], max(len(text) - reach, 0) + 1)
    return text[start : start + reach], draws[3]


def _window(config: Config, ids, draw: float) -> Tokens:
    room = config.limit - 2
    start = _pick(draw, max(len(ids) - room, 0) + 1)
    return _sequence(config, ids[start : start + room])


def _pick(draw: float, count: int) -> int:
    """A draw from [0, 1) as one of `count` numbers."""
    return min(int(draw * count), count - 1)


def things(config: Config, raw) -> list[str]:
    """Each text of the first field that the item has: what evaluation and search take one by one."""
    return next(iter(_offered(config, raw).values()), [])


def describe(config: Config, raw: dict) -> str | None:
    """The item's first text; None where it has none. Raises Lost."""
    return next(iter(things(config, raw)), None)


def _offered(config: Config, raw) -> dict[str, list[str]]:
    """The texts that may be read, by field; empty where the item has none. Raises Lost where all are blank."""
    found = {"given": [raw]} if isinstance(raw, str) else _fields(config, raw)
    texts = {name: kept for name, texts in found.items() if (kept := list(filter(str.strip, texts)))}
    if found and not texts:
        raise Lost("empty", "no text in it")
    return texts


MOST_WINDOWS = 64


def _windows(config: Config, text: str) -> list[Tokens]:
    room = config.limit - 2
    ids = encode(config, text, room * MOST_WINDOWS)
    return [_sequence(config, ids[start : start + room]) for start in range(0, len(ids), room)]


def _sequence(config: Config, ids) -> Tokens:
    content = np.empty(len(ids) + 2, dtype=np.int64)
    content[0], content[1:-1], content[-1] = BEGIN, ids, END
    return sequence_of(torch.from_numpy(content), _positions(config.limit)[: len(content)])


@functools.lru_cache(maxsize=64)
def _positions(count: int) -> Tensor:
    """(count, 3); shared, so that nobody may write to it."""
    return F.pad(torch.arange(count, dtype=torch.float32)[:, None], (0, 2))


def _draw(config: Config, found: dict[str, list[str]], draws: list[float]) -> str:
    names = list(found)
    if isinstance(config.fields, dict):
        weights = np.cumsum([float(config.fields.get(name, 1.0)) for name in names])
        weights = weights if weights[-1] > 0 else np.arange(1, len(names) + 1)
        which = int(np.searchsorted(weights, draws[0] * weights[-1], side="right"))
        texts = found[names[min(which, len(names) - 1)]]
    else:
        texts = found[names[0]]
    return texts[_pick(draws[1], len(texts))]


def _fields(config: Config, raw: dict) -> dict[str, list[str]]:
    """The item's texts by field. Raises Lost where bytes are no UTF-8 or no JSON."""
    found, row = {}, None
    for name in config.fields:
        if name == "txt":
            if "txt" in raw:
                found[name] = [_utf8(raw["txt"])]
        elif "json" in raw:
            row = parse(raw["json"]) if row is None else row
            value = lookup(row, name)
            value = list(value.values()) if isinstance(value, dict) else value
            value = [value] if isinstance(value, str) else value
            if isinstance(value, list) and (texts := [text for text in value if isinstance(text, str)]):
                found[name] = texts
        if found and isinstance(config.fields, list):
            break
    return found


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Lost("text-decode", f"not UTF-8 at byte {error.start}") from None


class Embed(nn.Embedding):
    """ids (N,) -> (N, D)"""

    def __init__(self, config: Config, width: int):
        super().__init__(config.vocabulary, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, content: Tensor) -> Tensor:
        return self.weight.index_select(0, content)


class Predict(nn.Module):
    """Cross-entropy in nats of ids (M,) under vectors (M, D), one a token: (M,)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.logits = nn.Linear(width, config.vocabulary)
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(vectors).float(), content, reduction="none")
