"""Text as byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2), learned from the run's own training text.

Hugging Face `tokenizers` learns the merges and writes the file; `tiktoken`, several times faster, applies them. The
tokenizer of an imported model may be of any kind that `tokenizers` reads, such as WordPiece.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import storage
from ..corpus.fields import lookup, parse
from ..errors import SampleError, UserError
from ..tokens import Tokens, make_sequence
from . import base

USUAL_FIELDS = ("txt", "caption", "captions", "text")
DOCUMENTS = "documents"  # the field of a block that `mmfm pack --text-block` made: a list of texts, read as one
BEGIN, END = 0, 1  # ids that no text can spell; those of the merges follow, and at the top of the vocabulary sentinels
Text = str | tuple[str, ...]  # one text, or several documents that are read as one sequence
CHUNK = 4096  # characters encoded at a time, so that a pasted megabyte costs no more than its limit
MAX_WINDOWS = 64  # of one text in evaluation; what follows them is not read


@dataclass
class Config:
    vocab_size: int = 4096  # ids, among them BEGIN, END, the 256 bytes and the sentinels
    max_tokens: int = 256  # tokens a sequence; training draws a window of longer text, evaluation covers it
    fields: list[str] | dict[str, float] = field(default_factory=lambda: list(USUAL_FIELDS))
    """Where a sample's text is: `txt` is the member of that name, anything else a field of the JSON (dots go deeper; a
    string, a list or a map of strings). A list: the first that the sample has. A map: training draws by weight. Where
    a sample has none of them, the list `documents` is read as one text."""
    file: str = ""  # a trained tokenizer.json of byte-level BPE; empty: the run learns one and keeps it in its folder
    format: Literal["bytes", "hugging_face"] = "bytes"
    """bytes: the file is byte-level BPE, which loses nothing. hugging_face: any tokenizer.json, of WordPiece (BERT) or
    another kind that may change a text; ids are those of the file and 2, special tokens in a text are plain text."""
    train_bytes: int = 20_000_000  # how much training text the merges are learned from
    sentinels: int = 0  # ids at the top of the vocabulary that mark where the objective `denoise` took spans out
    end_cuts: bool = True  # END also where a longer text is cut; false: only where it ends, so that `causal` writes on
    causal: bool = False  # each token reads only those before it, whatever the objective (GPT-2, CLIP's texts)

    def __post_init__(self):
        least = 258 if self.format == "bytes" else 3  # the bytes, where text is made of them, and two marks
        if self.sentinels < 0 or self.vocab_size < least + self.sentinels or self.max_tokens < 3:
            raise ValueError(
                f"vocab_size is at least {least} (the bytes and two marks) and the sentinels, max_tokens at least 3"
            )
        weights = self.fields.values() if isinstance(self.fields, dict) else [1.0]
        if not self.fields or not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError("fields names at least one field, with weights from 0 up")


class Tokenizer(base.Tokenizer):
    """Text <-> ids."""

    Config, extensions = Config, ("txt", "json")

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self._loaded: Any = None  # of `file`, once it was asked for: one that is replaced later changes no encoding

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None}  # another process reads the file for itself

    def read(self, raw, generator: Random | None = None) -> list[Tokens]:
        """Sequences BEGIN ids END of at most `max_tokens` tokens: content (N,) int64, position (index, 0, 0). Without
        `end_cuts` a window that ends within its text has no END.

        `raw` is the sample's members by ending, or a string. With a generator one of the texts is drawn, and of a long
        one a window; otherwise the first text is cut into at most `MAX_WINDOWS` windows. Between the documents of a
        block stand END and BEGIN. Raises SampleError.
        """
        texts = self._texts(raw)
        if not texts:
            return []
        room = self.config.max_tokens - 2
        if generator is None:
            ids = self._encode_documents(next(iter(texts.values()))[0], room * MAX_WINDOWS)
            _check_ids(ids)
            whole = len(ids) < room * MAX_WINDOWS
            return [self._window(ids, start, whole) for start in range(0, len(ids), room)]
        draws = [generator.random() for _ in range(4)]
        text = self._draw(texts, draws[0], draws[1])
        reach = room * 8  # characters: nearly any text has fewer in `room` tokens
        length = len(text) if isinstance(text, str) else sum(map(len, text))
        first = _index(draws[2], max(length - reach, 0) + 1)
        ids = self._encode_documents(_crop(text, first, first + reach))
        _check_ids(ids)
        start = _index(draws[3], max(len(ids) - room, 0) + 1)
        return [self._window(ids, start, first + reach >= length)]

    def _window(self, ids: np.ndarray, start: int, whole: bool) -> Tokens:
        """The sequence of the ids from `start` on; whole: whether the text ends with the last of all ids."""
        stop = start + self.config.max_tokens - 2
        ended = self.config.end_cuts or (whole and stop >= len(ids))
        return _sequence(ids[start:stop], self.config.causal, ended)

    def split_inputs(self, raw) -> list[str]:
        """Each text of the first field that the sample has, the documents of a block one by one. Raises SampleError."""
        texts = next(iter(self._texts(raw).values()), [])
        return [one for text in texts for one in ([text] if isinstance(text, str) else text)]

    def describe(self, raw: dict) -> str | None:
        """The sample's first text; None where it has none. Raises SampleError."""
        return next(iter(self.split_inputs(raw)), None)

    def _texts(self, raw) -> dict[str, list[Text]]:
        """The texts by field; empty where the sample has none. Raises SampleError where all of them are blank."""
        given = {"given": [raw]} if isinstance(raw, str) else self._field_texts(raw)
        texts: dict[str, list[Text]] = {}
        for name, values in given.items():
            if kept := [text for text in values if text.strip()]:
                texts[name] = [tuple(kept)] if name == DOCUMENTS else [*kept]
        if given and not texts:
            raise SampleError("empty", "no text in it")
        return texts

    def _field_texts(self, raw: dict) -> dict[str, list[str]]:
        """All texts by field, blank ones too. Raises SampleError where bytes are not UTF-8 or not JSON."""
        texts, row = {}, None
        for name in dict.fromkeys([*self.config.fields, DOCUMENTS]):
            if texts and name not in self.config.fields:
                break
            if name == "txt":
                if "txt" in raw:
                    texts[name] = [_decode_utf8(raw["txt"])]
            elif "json" in raw:
                row = parse(raw["json"]) if row is None else row
                value = lookup(row, name)
                value = list(value.values()) if isinstance(value, dict) else value
                value = [value] if isinstance(value, str) else value
                if isinstance(value, list) and (strings := [text for text in value if isinstance(text, str)]):
                    texts[name] = strings
            if texts and isinstance(self.config.fields, list):
                break
        return texts

    def _draw(self, texts: dict[str, list[Text]], field_draw: float, text_draw: float) -> Text:
        """One of the texts, for two numbers drawn from [0, 1)."""
        names, fields = list(texts), self.config.fields
        chosen = names[0]
        if isinstance(fields, dict):
            weights = np.cumsum([float(fields.get(name, 1.0)) for name in names])
            weights = weights if weights[-1] > 0 else np.arange(1, len(names) + 1)
            which = int(np.searchsorted(weights, field_draw * weights[-1], side="right"))
            chosen = names[min(which, len(names) - 1)]
        return texts[chosen][_index(text_draw, len(texts[chosen]))]

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of `text`, without BEGIN and END; only as much of it is encoded as `limit` ids need."""
        return (self._encode(_replace_surrogates(text), limit) + 2).tolist()

    def _merges(self):
        """What turns texts into ids and back, from `file`. Raises UserError."""
        if self._loaded is None:
            self._loaded = (load_vocabulary if self.config.format == "hugging_face" else load_merges)(self.config.file)
        return self._loaded

    def _encode(self, text: str, limit: int | None = None) -> np.ndarray:
        """The merges' own ids of a text without lone surrogates."""
        ids, merges, start = [], self._merges(), 0
        while start < len(text) and (limit is None or len(ids) < limit):
            stop = start + CHUNK
            if stop < len(text):  # no word is cut
                space = text.rfind(" ", start + 1, stop)
                stop = space if space > 0 else stop
            ids += merges.encode_ordinary(text[start:stop])
            start = stop
        ids = ids[:limit]
        return np.fromiter(ids, np.int64, len(ids))

    def _encode_documents(self, text: Text, limit: int | None = None) -> np.ndarray:
        """As `_encode`, of a text that may be several documents."""
        pieces: list[np.ndarray] = []
        for document in [text] if isinstance(text, str) else text:
            pieces += [SEPARATOR] * bool(pieces) + [self._encode(_replace_surrogates(document), limit)]
            if limit is not None and sum(map(len, pieces)) >= limit:
                break
        return np.concatenate(pieces)[:limit]

    def decode(self, ids: list[int]) -> str:
        """The text that `encode` gave `ids` for; BEGIN, END and sentinels stand for nothing."""
        merges = self._merges()
        return merges.decode([i - 2 for i in ids if END < i < merges.n_vocab + 2])

    def generation(self) -> base.Generation:
        return base.Generation((BEGIN,), END, self.config.max_tokens, _positions(self.config.max_tokens))

    def token_bytes(self, ids: list[int]) -> list[int]:
        """How many bytes of text each of `ids` stands for; BEGIN, END and sentinels stand for none.

        Raises UserError where the tokenizer may change a text.
        """
        merges = self._merges()
        if isinstance(merges, Vocabulary):
            raise UserError(f"{self.config.file}: its ids stand for no certain number of bytes (format: hugging_face)")
        most = merges.n_vocab + 2
        return [len(merges.decode_single_token_bytes(i - 2)) if END < i < most else 0 for i in ids]

    @property
    def counts_bytes(self) -> bool:
        """Whether `count_bytes` can say how many bytes ids stand for."""
        return self.config.format != "hugging_face"

    def count_bytes(self, ids: list[int]) -> int:
        """How many bytes of text `ids` stand for."""
        return sum(self.token_bytes(ids))

    def spans(self, text: str, ids: list[int]) -> np.ndarray:
        """The first byte and the one after the last (T, 2), in the UTF-8 of a text, of the first ids that it has."""
        merges = self._merges()
        if isinstance(merges, Vocabulary):
            return merges.spans(text, ids)
        lengths = np.array(self.token_bytes(ids), dtype=np.int64)
        ends = lengths.cumsum()
        return np.stack([ends - lengths, ends], 1)

    @property
    def sentinels(self) -> range:
        """The first is the highest id, as in T5."""
        return range(self.config.vocab_size - 1, self.config.vocab_size - 1 - self.config.sentinels, -1)

    def sentence_ends(self, ids: Tensor) -> Tensor:
        """Those with a full stop, a question mark or an exclamation mark at their end, and END."""
        table = _sentence_ends(self._merges())
        return table[ids.clamp(max=len(table) - 1)]

    @property
    def learns(self) -> bool:
        return not self.config.file

    @property
    def file(self) -> str:
        return self.config.file

    def fit(self, raws, stem: Path) -> Tokenizer:
        """Learns the merges from at most `train_bytes` of text and saves them as `STEM.json`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size - self.config.sentinels - 2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            limit_alphabet=256,
        )

        def training_texts():
            left = self.config.train_bytes
            for raw in raws:
                try:
                    texts = [text for values in self._field_texts(raw).values() for text in values]
                except SampleError:
                    continue
                for text in texts:
                    text = _replace_surrogates(text[: 1 + left // 4])
                    left -= len(text.encode())
                    yield text
                if left <= 0:
                    return

        tokenizer.train_from_iterator(training_texts(), trainer)
        path = f"{stem}.json"
        storage.write_atomic(path, tokenizer.to_str(pretty=True).encode())
        return self.replace(file=path)

    def check(self) -> None:
        """Raises UserError where the trained file is missing or holds more ids than the model has."""
        ids, most = self._merges().n_vocab + 2 + self.config.sentinels, self.config.vocab_size
        if ids > most:
            among = f" with {self.config.sentinels} sentinels" if self.config.sentinels else ""
            raise UserError(
                f"{self.config.file} holds {ids} ids{among}: set tokenizers.text.vocab_size to that, not {most}"
            )

    def estimate_tokens(self, length: np.ndarray, tokens_per_byte: float = 0.25) -> np.ndarray:
        """About how many tokens (N,) texts of these bytes have before they are cropped, BEGIN and END among them."""
        return np.asarray(length) * tokens_per_byte + 2

    def extent(self) -> tuple[int, int, int]:
        return self.config.max_tokens, 1, 1

    def toy(self) -> Tokenizer:
        smaller = {} if self.file else {"vocab_size": min(self.config.vocab_size, 512 + self.config.sentinels)}
        max_tokens, train_bytes = min(self.config.max_tokens, 32), min(self.config.train_bytes, 200_000)
        return self.replace(max_tokens=max_tokens, train_bytes=train_bytes, **smaller)

    def embedder(self, width: int) -> nn.Module:
        return base.EmbedIds(self.config.vocab_size, width)

    def predictor(self, width: int) -> nn.Module:
        return base.PredictIds(self.config.vocab_size, width)


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pieces of text that no merge crosses (GPT-2, Radford et al. 2019)."""


def _kept(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """`load(file)`, whose result is kept until another file stands under that name; of a file that is gone for good."""
    kept: dict[str, tuple[tuple, Any]] = {}

    @functools.wraps(load)
    def get(file: str) -> Any:
        try:
            status = os.stat(file)
            version = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            version = kept[file][0] if file in kept else ()
        if file not in kept or kept[file][0] != version:
            kept[file] = version, load(file)
        return kept[file][1]

    return get


@_kept
def load_merges(file: str):
    """The trained merges in `file` as a `tiktoken.Encoding`. Raises UserError where there are none."""
    import tiktoken

    if not file:
        raise UserError("the text tokenizer has no file: it is trained by `mmfm pretrain`, or set tokenizers.text.file")
    try:
        with open(file, encoding="utf-8") as opened:
            ranks, split = _parse_merges(json.load(opened))
        return tiktoken.Encoding(file, pat_str=split, mergeable_ranks=ranks, special_tokens={})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not a tokenizer of byte-level BPE ({error or type(error).__name__}); for another kind set "
            "tokenizers.text.format: hugging_face"
        ) from None


def _parse_merges(saved: dict) -> tuple[dict[bytes, int], str]:
    """The id of each token's bytes, and the pattern that splits text, of a file of `tokenizers`. Raises ValueError."""
    model, steps = saved["model"], saved["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *splits, last = steps
    plain = [s for s in splits if s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"]]
    patterns = [step["pattern"]["Regex"] for step in plain]
    split = GPT2_SPLIT if last.get("use_regex", True) else patterns[0] if patterns else r"(?s:.+)"
    if model["type"] != "BPE" or last["type"] != "ByteLevel" or last["add_prefix_space"] or saved["normalizer"]:
        raise ValueError("only BPE on unchanged bytes can be read")
    if len(patterns) != len(splits) or len(splits) + last.get("use_regex", True) > 1:
        raise ValueError("text is split by more than one pattern")
    byte_of = _byte_of_letter()
    ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in model["vocab"].items()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = [model["vocab"][left + right] for left, right in merges]
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"byte {missing[0]} has no id")
    if merged != sorted(merged):
        raise ValueError("ids are not in the order of the merges")
    return ranks, split


class Vocabulary:
    """A tokenizer.json of any kind, with the methods of `tiktoken.Encoding` that are used here."""

    def __init__(self, saved: str):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(saved)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        self.n_vocab = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_single_token_bytes(self, number: int) -> bytes:
        """How a token is spelled in the file."""
        return (self.tokenizer.id_to_token(number) or "").removesuffix("</w>").encode()

    def spans(self, text: str, ids: list[int]) -> np.ndarray:
        """As `Tokenizer.spans`; BEGIN and END stand for no byte, at the start and at the end of the text's part."""
        text = _replace_surrogates(text)
        inner = sum(one > END for one in ids)
        places = self.tokenizer.encode(text, add_special_tokens=False).offsets[:inner]
        starts = np.cumsum([0, *(len(letter.encode()) for letter in text)])  # of each character
        spans, last, rest = [], 0, iter(places)
        for one in ids:
            first, last = (int(starts[place]) for place in next(rest)) if one > END else (last, last)
            spans.append((first, last))
        return np.array(spans, dtype=np.int64).reshape(-1, 2)


@_kept
def load_vocabulary(file: str) -> Vocabulary:
    """A file of Hugging Face's `tokenizers`, of any kind. Raises UserError where it is none."""
    try:
        with open(file, encoding="utf-8") as opened:
            return Vocabulary(opened.read())
    except Exception as error:  # `tokenizers` raises plain ones
        raise UserError(f"{file}: not a tokenizer of Hugging Face's format ({error or type(error).__name__})") from None


@functools.cache
def _sentence_ends(merges) -> Tensor:
    """Whether each id ends a sentence (V + 1,); the last row stands for all higher ids."""
    spelled = [merges.decode_single_token_bytes(i).rstrip(b" \n\"')") for i in range(merges.n_vocab)]
    return torch.tensor([False, True, *(text.endswith((b".", b"?", b"!")) for text in spelled), False])


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a GPT-2 vocabulary file stands for: itself, or one that is not printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def letters() -> list[str]:
    """What stands for each of the 256 bytes in a GPT-2 vocabulary file, in the order of the bytes."""
    byte_of = _byte_of_letter()
    return sorted(byte_of, key=byte_of.__getitem__)


def _replace_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which are no characters and have no UTF-8."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode_utf8(data: bytes) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SampleError("text-decode", f"not UTF-8 at byte {error.start}") from None


def _check_ids(ids: np.ndarray) -> None:
    """Raises SampleError where a tokenizer has left nothing of a text, such as of a zero-width space alone."""
    if not len(ids):
        raise SampleError("empty", "its tokenizer makes no ids of it")


def _index(draw: float, count: int) -> int:
    """A number drawn from [0, 1) as one of range(count)."""
    return min(int(draw * count), count - 1)


SEPARATOR = np.array([END - 2, BEGIN - 2])  # between two documents, counted as the merges count their ids


def _crop(text: Text, start: int, stop: int) -> Text:
    """The characters from `start` to `stop` of a text, or of documents laid end to end."""
    if isinstance(text, str):
        return text[start:stop]
    kept = []
    for document in text:
        if piece := document[max(start, 0) : max(stop, 0)]:
            kept.append(piece)
        start, stop = start - len(document), stop - len(document)
    return tuple(kept)


def _sequence(ids: np.ndarray, causal: bool, ended: bool) -> Tokens:
    content = np.full(len(ids) + 1 + ended, END, dtype=np.int64)
    content[0] = BEGIN
    np.add(ids, 2, out=content[1 : len(ids) + 1])
    tokens = make_sequence(torch.from_numpy(content), _positions(len(content)))
    return tokens.replace(order=torch.arange(len(tokens))) if causal else tokens


@functools.lru_cache(maxsize=4096)
def _positions(count: int) -> Tensor:
    """(count, 3), a part of a longer one. It is cached and shared: do not write to it."""
    return _longer_positions(1 << count.bit_length())[:count]


@functools.cache
def _longer_positions(count: int) -> Tensor:
    return F.pad(torch.arange(count, dtype=torch.float32)[:, None], (0, 2))
