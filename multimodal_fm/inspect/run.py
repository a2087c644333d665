"""The command `mmfm inspect`."""

from __future__ import annotations

import json as json_
import sys

from ..config import build, read_yaml
from ..corpus.index import PIECE_BYTES
from ..corpus.shards import list_shards
from ..errors import UserError, printable
from ..model import ModelConfig
from ..stream.cluster import open_executor
from ..stream.tasks import TaskConfig
from ..tokenizers import audio, image, text
from .orders import order_tables
from .page import write_page
from .samples import describe_samples
from .stats import count_corpus
from .summary import format_row, summarize
from .verify import Damage, open_indexes


def inspect(
    patterns: list[str],
    config: str = "",
    html: str = "",
    verify: bool = False,
    rebuild: bool = False,
    json: bool = False,
    samples: bool = False,
    piece: int = PIECE_BYTES,
    tasks: dict[str, TaskConfig] | None = None,
    heads: dict | None = None,
    workers: int = 0,
    cluster: str = "",
) -> int:
    """Runs the command and returns its exit code: 1 where `verify` finds damage. Raises UserError.

    tasks, heads: those of `config`, of which the order tables are shown, and nothing else. workers, cluster: where
    shards are read through, see `stream.cluster.open_executor`; ranks but the first return 0.
    """
    if not patterns:
        raise UserError("name at least one shard: a .tar, .jsonl or .txt file, a pattern or a URL")
    if verify and rebuild:
        raise UserError("--verify compares with the index that --rebuild would replace: give one of them")
    if workers < 0:
        raise UserError("--workers is at least 0")
    if piece < 16:
        raise UserError("--piece is at least 16 bytes")
    if html and samples:
        raise UserError("--samples writes no page: leave out --html")
    files, tokenizers = list(dict.fromkeys(list_shards(patterns))), load_tokenizers(config)
    damage = Damage() if verify else None
    with open_executor(cluster, workers) as executor:
        if executor is None:
            return 0
        indexes = open_indexes(files, piece, rebuild, damage, tokenizers.values(), executor)
    if tasks:
        for line in order_tables(tasks, tokenizers, heads or {}, indexes):
            print(printable(line))
    elif samples:
        for row in describe_samples(indexes, tokenizers):
            print(json_.dumps(row))
        for row in damage.rows if damage else []:
            print(printable(format_row(row)), file=sys.stderr)
    else:
        stats = count_corpus(indexes, tokenizers, config)
        if damage is not None:
            stats.data["damage"] = {"count": damage.count, "new_shards": damage.new_shards, "first": damage.rows}
        print(json_.dumps(stats.data) if json else "\n".join(map(printable, summarize(stats.data))))
        if html:
            write_page(html, patterns, indexes, tokenizers, stats)
            print(html, file=sys.stderr if json else sys.stdout)
    return 1 if damage is not None and damage.count else 0


def load_tokenizers(config: str = "") -> dict:
    """The tokenizers of a run's YAML file by modality; by default text, image and audio. Raises UserError."""
    model = read_yaml(config).get("model") if config else None
    data = {"tokenizers": model.get("tokenizers") or {}} if isinstance(model, dict) else {}
    tokenizers = build(ModelConfig, data, f"{config}: model").tokenizers
    for tokenizer in tokenizers.values():
        if tokenizer.file:
            tokenizer.check()
    return tokenizers or {"text": text.Tokenizer(), "image": image.Tokenizer(), "audio": audio.Tokenizer()}
