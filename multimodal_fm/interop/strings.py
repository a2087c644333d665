"""Tokenizers of texts that come with imported weights, as files of our text tokenizer.

Ids are numbered anew, since ours begin with BEGIN and END, and the table of vectors is put in that order: byte-level
BPE as GPT-2 and RoBERTa have it in the order of its merges, without the special tokens that no text can spell; every
other tokenizer (WordPiece, Unigram, CLIP's BPE of lower-cased text) as the original's id and 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..tokenizers import text
from .base import read_json

CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Strings:
    """A tokenizer for texts."""

    format: str  # of our text tokenizer's file
    saved: str  # what the file holds
    ids: list[int]  # the original's id of each of ours
    how: str  # how ids are numbered, in words


def find_mask(folder: Path) -> int | None:
    """The id of [MASK] or <mask>, where a file of the tokenizer names it."""
    found: dict[str, Any] = {}
    if (folder / "tokenizer.json").exists():
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        found = {str(one.get("content")): one.get("id") for one in added if isinstance(one, dict)}
    elif (folder / "vocab.json").exists():
        found = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").exists():
        found = {line: number for number, line in enumerate(_lines(folder / "vocab.txt"))}
    return next((found[name] for name in ("[MASK]", "<mask>") if isinstance(found.get(name), int)), None)


def import_strings(folder: Path, kind: str, ends: tuple[Any, Any], size: int) -> Strings:
    """The tokenizer of a folder whose model has `size` vectors of ids. kind: the model_type of its config.json. ends:
    the ids that its configuration gives a text's first and last token, if any.

    Raises UserError where there is none, or none that can be expressed.
    """
    if kind in ("roberta", "gpt2") and (found := _byte_level(folder)):
        saved, ids = found
        ids = [*ends, *ids]
        how = "the ids of <s> and </s>, the 256 bytes, the merges in their order; ids that no text spells are left out"
        if kind == "gpt2":
            how = how.replace("<s> and </s>", "<|endoftext|> twice")
        _check(folder, ids, size)
        return Strings("bytes", json.dumps(saved, ensure_ascii=False), ids, how)
    saved = _any(folder, kind)
    try:
        vocabulary = text.Vocabulary(saved)
        bare, whole = (vocabulary.tokenizer.encode("a", add_special_tokens=own).ids for own in (False, True))
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises plain ones
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from None
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), -1)
    before, after = whole[: max(first, 0)], whole[first + len(bare) :]
    if first < 0 or len(before) > 1 or len(after) > 1:
        raise UserError(f"{folder}: its tokenizer puts {len(before)} tokens before a text and {len(after)} after it")
    outer = [*(before or [ends[0]]), *(after or [ends[1]])]
    _check(folder, [*outer, vocabulary.n_vocab - 1], size)
    names = [vocabulary.tokenizer.id_to_token(one) for one in outer]
    how = f"ours are the original's and 2; 0 is {names[0]} and 1 is {names[1]}, which no text can spell"
    return Strings("hugging_face", saved, [*outer, *range(size)], how)


def _check(folder: Path, ids: list[Any], size: int) -> None:
    if not all(type(one) is int and 0 <= one < size for one in ids):
        raise UserError(f"{folder}: the ids of its tokenizer do not fit its {size} vectors")


def _any(folder: Path, kind: str) -> str:
    """A file of `tokenizers`. Raises UserError."""
    if (folder / "tokenizer.json").exists():
        return json.dumps(read_json(folder / "tokenizer.json"), ensure_ascii=False)
    if kind.startswith("clip") and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return clip_bpe(read_json(folder / "vocab.json"), _merges(folder))
    if (folder / "vocab.txt").exists():
        return word_piece(_lines(folder / "vocab.txt"), _optional_json(folder / "tokenizer_config.json"))
    raise UserError(f"{folder}: has no tokenizer.json (nor a vocab.txt of WordPiece), so that it reads ids only")


def word_piece(vocab: list[str], settings: dict[str, Any]) -> str:
    """BERT's WordPiece (Devlin et al. 2019) as a file of `tokenizers`."""
    ids = {line: number for number, line in enumerate(vocab) if line or number < len(vocab) - 1}
    special = ("[CLS]", "[SEP]", "[UNK]")
    if missing := [name for name in special if name not in ids]:
        raise UserError(f"its vocab.txt has no {missing[0]}")
    lower = settings.get("do_lower_case", True) is not False
    normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": lower}
    normalizer |= {"handle_chinese_chars": settings.get("tokenize_chinese_chars", True) is not False}
    strip = settings.get("strip_accents")
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": ids}
    saved = {
        "version": "1.0",
        "added_tokens": [_special(ids[name], name) for name in ("[PAD]", *special, "[MASK]") if name in ids],
        "normalizer": {**normalizer, "strip_accents": strip if isinstance(strip, bool) else None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _between("[CLS]", ids["[CLS]"], "[SEP]", ids["[SEP]"]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {**model, "max_input_chars_per_word": 100},
    }
    return json.dumps(saved, ensure_ascii=False)


def clip_bpe(vocab: dict[str, Any], merges: list[str]) -> str:
    """CLIP's BPE of lower-cased text, whose words end in </w> (Radford et al. 2021), as a file of `tokenizers`."""
    begin, end = "<|startoftext|>", "<|endoftext|>"
    if not all(isinstance(vocab.get(name), int) for name in (begin, end)):
        raise UserError(f"its vocab.json has no {begin} or no {end}")
    steps = [
        {"type": "Split", "pattern": {"Regex": CLIP_SPLIT}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    normalizers = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}]
    model = {"type": "BPE", "unk_token": end, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    saved = {
        "version": "1.0",
        "added_tokens": [_special(vocab[name], name) for name in (begin, end)],
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _between(begin, vocab[begin], end, vocab[end]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {**model, "fuse_unk": False, "vocab": vocab, "merges": merges},
    }
    return json.dumps(saved, ensure_ascii=False)


def _special(number: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": True, **flags}


def _between(begin: str, first: int, end: str, last: int) -> dict[str, Any]:
    """The step of `tokenizers` that puts special tokens around a text."""
    single = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": end, "type_id": 0}})
    special = {name: {"id": name, "ids": [own], "tokens": [name]} for name, own in ((begin, first), (end, last))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, single[-1]]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _byte_level(folder: Path) -> tuple[dict[str, Any], list[int]] | None:
    """A file of `tokenizers` with the bytes in the order of their values and then the merges in theirs, and the
    original's id of each of its tokens. None where the original is no byte-level BPE as GPT-2 has it."""
    if (folder / "tokenizer.json").exists():
        saved = read_json(folder / "tokenizer.json")
        model, step = _map(saved.get("model")), _map(saved.get("pre_tokenizer"))
        plain = step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space")
        if model.get("type", "BPE") != "BPE" or not plain or saved.get("normalizer"):
            return None
        vocab, merges = _map(model.get("vocab")), model.get("merges")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab, merges = read_json(folder / "vocab.json"), _merges(folder)
    else:
        return None
    pairs = [one.split(" ") if isinstance(one, str) else one for one in merges or []]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs):
        return None
    tokens = [*text.letters(), *("".join(pair) for pair in pairs)]
    if len(set(tokens)) < len(tokens) or not all(isinstance(vocab.get(token), int) for token in tokens):
        return None
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [" ".join(p) for p in pairs]}
    saved = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": step, "decoder": step}
    return {**saved, "model": model}, [vocab[token] for token in tokens]


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _merges(folder: Path) -> list[str]:
    return [line for line in _lines(folder / "merges.txt") if line and not line.startswith("#version")]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
