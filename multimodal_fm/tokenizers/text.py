"""Text: byte-level BPE (Sennrich et al. 2016, bytes as in GPT-2), learned from the run's own training text.

Hugging Face `tokenizers` learns the merges and keeps the file; `tiktoken`, several times faster, applies them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import storage
from ..corpus.fields import lookup, parse
from ..errors import SampleError, UserError
from ..tokens import Tokens, sequence_of
from . import base

EXTENSIONS = ("txt", "json")
USUAL_FIELDS = ("txt", "caption", "captions", "text")
BEGIN, END = 0, 1  # ids that no text can spell: the merges start behind them


@dataclass
class Config:
    vocab_size: int = 4096  # ids, the two special ones and the 256 bytes among them
    max_tokens: int = 256  # tokens a sequence; training draws a window of longer text, evaluation covers it
    fields: list[str] | dict[str, float] = field(default_factory=lambda: list(USUAL_FIELDS))
    """Where a sample's text is: `txt` is the member of that name, anything else a field of the JSON (dots go deeper; a
    string, a list or a map of strings). A list: the first that the sample has. A map: training draws by these weights."""
    file: str = ""  # a trained tokenizer.json of byte-level BPE; empty: a run learns one and keeps it in its folder
    train_bytes: int = 20_000_000  # how much training text the merges are learned from

    def __post_init__(self):
        if self.vocab_size < 258 or self.max_tokens < 3:
            raise ValueError("vocab_size is at least 258 (the bytes and two marks), max_tokens at least 3")
        weights = self.fields.values() if isinstance(self.fields, dict) else [1.0]
        if not self.fields or not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError("fields names at least one field, with weights from 0 up")


def _readable(config: Config, raw: dict) -> list[str]:
    try:
        return [text for found in _fields(config, raw).values() for text in found]
    except SampleError:
        return []


SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Between what no merge reaches (GPT-2, Radford et al. 2019)."""


@functools.cache
def bpe(file: str):
    """The trained merges in `file`, a `tiktoken.Encoding`. Raises UserError where there are none."""
    import tiktoken

    if not file:
        raise UserError("the text tokenizer has no file: it is trained by `mmfm pretrain`, or set tokenizers.text.file")
    try:
        with open(file, encoding="utf-8") as opened:
            ranks, split = _ranks(json.load(opened))
        return tiktoken.Encoding(file, pat_str=split, mergeable_ranks=ranks, special_tokens={})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a tokenizer of byte-level BPE ({error or type(error).__name__})") from None


def _ranks(saved: dict) -> tuple[dict[bytes, int], str]:
    """The id of each run of bytes, and the pattern that splits text, of a file of `tokenizers`. Raises ValueError."""
    model, steps = saved["model"], saved["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *splits, last = steps
    plain = [s for s in splits if s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"]]
    by_regex = [one["pattern"]["Regex"] for one in plain]
    split = SPLIT if last.get("use_regex", True) else by_regex[0] if by_regex else r"(?s:.+)"
    if model["type"] != "BPE" or last["type"] != "ByteLevel" or last["add_prefix_space"] or saved["normalizer"]:
        raise ValueError("BPE on bytes as they are is what can be read")
    if len(by_regex) != len(splits) or len(splits) + last.get("use_regex", True) > 1:
        raise ValueError("text is split by more than one pattern")
    alphabet = _alphabet()
    ranks = {bytes(alphabet[letter] for letter in token): rank for token, rank in model["vocab"].items()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [model["vocab"][left + right] for left, right in merges]
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"byte {missing[0]} has no id")
    if made != sorted(made):
        raise ValueError("ids are not in the order of the merges")
    return ranks, split


def _alphabet() -> dict[str, int]:
    """The bytes by the letters that stand for them in a file: themselves, or if unprintable the next from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which are no characters."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


CHUNK = 4096  # characters encoded at a time, so that a pasted megabyte costs no more than its limit


def _encoded(config: Config, text: str, limit: int | None) -> np.ndarray:
    """The merges' own ids of a text without halves of surrogate pairs."""
    ids, merges = [], bpe(config.file)
    for start in range(0, len(text), CHUNK):
        ids += merges.encode_ordinary(text[start : start + CHUNK])
        if limit is not None and len(ids) >= limit:
            break
    ids = ids[:limit]
    return np.fromiter(ids, np.int64, len(ids))


def _pick(draw: float, count: int) -> int:
    """A draw from [0, 1) as one of `count` numbers."""
    return min(int(draw * count), count - 1)


def _offered(config: Config, raw) -> dict[str, list[str]]:
    """The texts that may be read, by field; empty where the sample has none. Raises SampleError where all are blank."""
    found = {"given": [raw]} if isinstance(raw, str) else _fields(config, raw)
    texts = {name: kept for name, texts in found.items() if (kept := list(filter(str.strip, texts)))}
    if found and not texts:
        raise SampleError("empty", "no text in it")
    return texts


MOST_WINDOWS = 64


def _windows(config: Config, text: str) -> list[Tokens]:
    room = config.max_tokens - 2
    ids = _encoded(config, _whole(text), room * MOST_WINDOWS)
    return [_sequence(ids[start : start + room]) for start in range(0, len(ids), room)]


def _sequence(ids: np.ndarray) -> Tokens:
    content = np.empty(len(ids) + 2, dtype=np.int64)
    content[0], content[-1] = BEGIN, END
    np.add(ids, 2, out=content[1:-1])
    return sequence_of(torch.from_numpy(content), _positions(len(content)))


@functools.lru_cache(maxsize=4096)
def _positions(count: int) -> Tensor:
    """(count, 3); shared, so that nobody may write to it."""
    return _most_positions(1 << count.bit_length())[:count]


@functools.cache
def _most_positions(count: int) -> Tensor:
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
    """The sample's texts by field. Raises SampleError where bytes are no UTF-8 or no JSON."""
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
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SampleError("text-decode", f"not UTF-8 at byte {error.start}") from None


class Embed(nn.Embedding):
    """ids (N,) -> (N, D)"""

    def __init__(self, config: Config, width: int):
        super().__init__(config.vocab_size, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, content: Tensor) -> Tensor:
        return self.weight.index_select(0, content)


class Predict(nn.Module):
    """Cross-entropy in nats of ids (M,) under vectors (M, D), one a token: (M,)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.logits = nn.Linear(width, config.vocab_size)
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def forward(self, vectors: Tensor, content: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(vectors).float(), content, reduction="none")


class Tokenizer(base.Tokenizer):
    Config, extensions = Config, EXTENSIONS

    @property
    def learns(self) -> bool:
        return not self.config.file

    @property
    def file(self) -> str:
        return self.config.file

    def toy(self) -> Tokenizer:
        smaller = {} if self.file else {"vocab_size": min(self.config.vocab_size, 512)}
        return self.replace(
            max_tokens=min(self.config.max_tokens, 32), train_bytes=min(self.config.train_bytes, 200_000), **smaller
        )

    def fit(self, raws, stem: Path) -> Tokenizer:
        """Learn the merges from at most `train_bytes` of text and save them as `STEM.json`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size - 2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            limit_alphabet=256,
        )

        def texts():
            left = self.config.train_bytes
            for raw in raws:
                for text in _readable(self.config, raw):
                    text = _whole(text[: 1 + left // 4])
                    left -= len(text.encode())
                    yield text
                if left <= 0:
                    return

        tokenizer.train_from_iterator(texts(), trainer)
        path = f"{stem}.json"
        storage.put(Path(path), tokenizer.to_str(pretty=True).encode())  # at once: another process may be reading it
        return self.replace(file=path)

    def check(self) -> None:
        """Raises UserError where the trained file is missing or holds more ids than the model has."""
        held = bpe(self.config.file).n_vocab + 2
        if held > self.config.vocab_size:
            raise UserError(
                f"{self.config.file} holds {held} ids: set tokenizers.text.vocab_size to that, not {self.config.vocab_size}"
            )

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of `text`, without BEGIN and END; only as much of it is encoded as `limit` ids need."""
        return (_encoded(self.config, _whole(text), limit) + 2).tolist()

    def decode(self, ids: list[int]) -> str:
        """The text that `encode` made `ids` of."""
        return bpe(self.config.file).decode([i - 2 for i in ids if i > END])

    def count_bytes(self, ids: list[int]) -> int:
        """How many bytes of text `ids` stand for."""
        return len(bpe(self.config.file).decode_bytes([i - 2 for i in ids if i > END]))

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """Sequences BEGIN ids END of at most `max_tokens` tokens, content (N,) int64. raw: the sample's members, or a string.

        With a generator one text is drawn, and of a long one a window; without, the sample's first text, cut into at most
        `MOST_WINDOWS` windows. Raises SampleError.
        """
        found = _offered(self.config, raw)
        if not found:
            return []
        if generator is None:
            return _windows(self.config, next(iter(found.values()))[0])
        draws = [generator.random() for _ in range(4)]
        text, room = _draw(self.config, found, draws), self.config.max_tokens - 2
        reach = room * 8  # characters: far more than there is room for of nearly any text
        start = _pick(draws[2], max(len(text) - reach, 0) + 1)
        ids = _encoded(self.config, _whole(text[start : start + reach]), None)
        start = _pick(draws[3], max(len(ids) - room, 0) + 1)
        return [_sequence(ids[start : start + room])]

    def split_inputs(self, raw) -> list[str]:
        """Each text of the first field that the sample has: what evaluation and search take one by one."""
        return next(iter(_offered(self.config, raw).values()), [])

    def describe(self, raw: dict) -> str | None:
        """The sample's first text; None where it has none. Raises SampleError."""
        return next(iter(self.split_inputs(raw)), None)

    def embedder(self, width: int) -> nn.Module:
        return Embed(self.config, width)

    def predictor(self, width: int) -> nn.Module:
        return Predict(self.config, width)
