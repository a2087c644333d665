"""`mmfm inspect`."""

from __future__ import annotations

import json as json_
import sys

from ..corpus import index
from ..corpus.shards import find
from ..errors import UserError
from ..tokenizers import audio, image, text
from .lines import lines, said_of
from .page import write
from .samples import every_sample
from .stats import survey
from .verify import Damage, open_all


def inspect(
    patterns: list[str],
    config: str = "",
    html: str = "",
    verify: bool = False,
    rebuild: bool = False,
    json: bool = False,
    samples: bool = False,
    piece: int = index.PIECE,
) -> int:
    """What `mmfm inspect` does; its exit code: 1 where `verify` finds damage. Raises UserError."""
    if not patterns:
        raise UserError("name at least one shard: a .tar, .jsonl or .txt file, a pattern or a URL")
    if verify and rebuild:
        raise UserError("--verify compares with the index that --rebuild would replace: give one of them")
    if piece < 16:
        raise UserError("--piece is at least 16 bytes")
    if html and samples:
        raise UserError("--samples writes no page: leave out --html")
    tokenizers = plugins(config)
    files = list(dict.fromkeys(find(patterns)))
    damage = Damage() if verify else None
    indexes = open_all(files, piece, rebuild, damage)
    if samples:
        for row in every_sample(indexes, tokenizers):
            print(json_.dumps(row))
        for one in damage.rows if damage else []:
            print(said_of(one), file=sys.stderr)
    else:
        found = survey(indexes, tokenizers, config)
        if damage is not None:
            found.data["damage"] = {"count": damage.count, "new_shards": damage.new, "first": damage.rows}
        print(json_.dumps(found.data) if json else "\n".join(lines(found.data)))
        if html:
            write(html, patterns, indexes, tokenizers, found)
            print(html, file=sys.stderr if json else sys.stdout)
    return 1 if damage is not None and damage.count else 0


def plugins(config: str = "") -> dict:
    """The tokenizers of a configuration, by modality; without one text, image and audio as they come. Raises UserError."""
    from ..config import load

    if config:
        found = load(config).tokenizers
        for plugin in found.values():
            if plugin.file:
                plugin.check()
        return found
    return {modality: module.Tokenizer() for modality, module in _OWN.items()}


_OWN = {"text": text, "image": image, "audio": audio}
