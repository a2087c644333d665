"""Pretrain one Transformer on text, images and audio; search across the three.

*Tokenizers* turn raw text, images and audio into tokens; one shared *backbone* reads them; *objectives* train it on
*shards*; *heads* adapt it to a use.
"""

from __future__ import annotations

from . import stream as _room  # noqa: F401  so that no later import of the room puts it in place of the function below

__version__ = "0.1.0"


def load(run, ema: bool = True, device: str = "auto", plugins: bool = False):
    """The model of a run's newest whole checkpoint; see `multimodal_fm.model.load`."""
    from .model import load

    return load(run, ema, device, plugins)


def stream(config, overrides=(), start: int = 0, rank: int = 0, ranks: int = 1):
    """The batches that a run of this configuration reads, for a training loop of your own.

    config: a YAML file, or a `multimodal_fm.train.config.TrainConfig`. Yields the lists of microbatches
    (`multimodal_fm.batch.Batch`) of the steps from `start` to `config.steps`, exactly as a run would see them, read
    ahead by `num_workers` processes. With several ranks each yields its own microbatches, whose counts of target tokens
    are this rank's: add them up over the ranks (`multimodal_fm.batch.with_counts`) before a loss. A text tokenizer
    without a file learns its merges first, in `run_dir`. Raises UserError.
    """
    from pathlib import Path

    from .batch import with_counts
    from .stream.loader import Loader
    from .stream.tasks import build_stream, fit_tokenizers
    from .train.config import TrainConfig
    from .train.config import load as load_config
    from .train.setup import open_sources

    config = config if isinstance(config, TrainConfig) else load_config(config, list(overrides))
    corpora = open_sources(config)
    tokenizers = config.model.tokenizers
    if any(tokenizer.learns for tokenizer in tokenizers.values()):
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        tokenizers = fit_tokenizers(config.tasks, corpora, tokenizers, config.seed, Path(config.run_dir))
    dataset = build_stream(
        config.tasks, corpora, tokenizers, config.seed, config.microbatches, config.round_to, rank, ranks
    )
    loader = Loader(dataset, start, config.steps, config.num_workers)
    try:
        for step in loader:
            yield [with_counts(batch, step.counts) for batch in step.batches]
    finally:
        loader.close()


def samples(shards, where=None):
    """The samples of a corpus one by one: dicts with `__key__` and the members by extension, as bytes.

    shards: paths, patterns or URLs of .tar, .jsonl or .txt files. where: keep the samples whose JSON has these values.
    What cannot be read is left out. Raises UserError where there are no samples.
    """
    from .corpus.shards import Config, Corpus

    corpus = Corpus(Config(shards, where=where or {}), "samples")
    for number in range(len(corpus)):
        yield {"__key__": corpus.key(number), **corpus.raw(number)}
