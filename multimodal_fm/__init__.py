"""Pretrain one Transformer on text, images and audio; search across the three.

*Tokenizers* turn raw text, images and audio into tokens; one shared *backbone* reads them; *objectives* train it on
*shards*; *heads* adapt it to a use.
"""

from __future__ import annotations

import dataclasses
import os

from . import search as _search  # noqa: F401  as the next two are
from . import stream as _stream  # noqa: F401  so that no later import of a room puts it in place of a function below
from . import tune as _tune  # noqa: F401

__version__ = "0.1.0"


def load(run, ema: bool = True, device: str = "auto", plugins: bool = False, adapter=""):
    """The model of a run's newest whole checkpoint, or of `hf:user/name` on the Hub; see `multimodal_fm.model.load`."""
    from .model import load

    return load(run, ema, device, plugins, adapter)


def export(run, to: str, out, modalities=()) -> dict:
    """Write a run's weights as files of another library; see `multimodal_fm.interop.export_base.export`."""
    from .interop.export_base import export

    return export(run, to, out, modalities)


def push_to_hub(run, name: str, private: bool = False, revision=None) -> str:
    """Publish a run, or a folder that `export` wrote, as user/name on the Hugging Face Hub; returns its address. See
    `multimodal_fm.run_dir.hub.push`."""
    from .run_dir.hub import push

    return push(run, name, private, revision)


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
        config.tasks,
        corpora,
        tokenizers,
        config.seed,
        config.microbatches,
        config.round_to,
        rank,
        ranks,
        heads=config.model.heads,
    )
    loader = Loader(dataset, start, config.steps, config.num_workers)
    try:
        for step in loader:
            yield [with_counts(batch, step.counts) for batch in step.batches]
    finally:
        loader.close()


def tune(
    model, data, task: str, how: str = "full", validation=(), test=(), run_dir: str = "", overrides=(), **settings
) -> dict:
    """Adapt a model to labeled data; returns what RUN/tune.json says, with the figures of the test part under `test`.

    model: a run, a checkpoint, a model in memory, or "none" with `like=RUN`. data, validation, test: shards, folders,
    tables or `hf:OWNER/NAME`, one or a list. task, how, settings: as `mmfm tune --help` says. The adapted model is read
    with `multimodal_fm.load(run_dir)`. Raises UserError.
    """
    import json

    from .tune.run import FILE, Settings
    from .tune.run import tune as adapt

    names = {field.name for field in dataclasses.fields(Settings)}
    own = {name: value for name, value in settings.items() if name in names}
    columns = {name: value for name, value in settings.items() if name not in names}
    parts = [[part] if isinstance(part, (str, os.PathLike)) else list(part) for part in (data, validation, test)]
    data, validation, test = ([str(name) for name in part] for part in parts)
    how_to = Settings(how=how, run_dir=run_dir, overrides=tuple(overrides), **own)
    folder = adapt(model, data, task, how_to, validation, test, **columns)
    return {"run": str(folder), **json.loads((folder / FILE).read_text(encoding="utf-8"))}


def open_index(place):
    """A collection that can be searched: a folder that `mmfm embed` made, or a URL of PostgreSQL.

    The URL is postgresql://USER:PASSWORD@HOST/DATABASE?collection=NAME. Returns a `multimodal_fm.search.base.Index`.
    Raises UserError.
    """
    from .search.index import open_index

    return open_index(place)


def search(index, *parts, top: int = 10, to: str = "", where=None, model=None, **options):
    """What is nearest to a text, a picture, a sound, or a sum of them: `search("DIR", "at night", to="image")`.

    index: a collection, or where one is (see `open_index`). parts: texts; pictures and sounds as `pathlib.Path`; dicts
    like {"image": Path("bus.jpg"), "weight": 0.5}, {"text": "people", "weight": -1}, {"id": "..."}, which are added up
    (`multimodal_fm.search.query.parse_query`). model: what made the collection; it is loaded from where the collection
    says it is, each time, unless it is passed. options: fold, near and min_score of
    `multimodal_fm.search.engine.attempt_many`. Returns its `Results`: `results["image"][0].item`. Raises UserError.
    """
    from .search import query as queries
    from .search.engine import search

    query = queries.parse_query([queries.to_part(part) for part in parts])
    opened = open_index(index) if isinstance(index, (str, os.PathLike)) else index
    try:
        if model is None and any(part.modality != queries.ID for part in query.parts):
            model = queries.load_model(opened)
        return search(opened, model, query, top, to, where=where, **options)
    finally:
        if opened is not index:
            opened.close()


def embed(run, sources, out, dtype: str = "float16", where=None, device: str = "auto", **settings) -> dict:
    """Embed shards, folders or tables into the collection in the folder `out`, as `mmfm embed --help` says.

    run: a run, a checkpoint, or a model in memory. sources: one or a list. where: keep the samples whose JSON has these
    values. settings: fields of `search.embed.Settings` (workers, batch_tokens, image_column, ...). Returns {"out",
    "items", "counts" (by modality), "added", "skipped" (rows as in quarantine.jsonl)}. Raises UserError.
    """
    from .model import Model
    from .search.embed import Settings
    from .search.embed import embed as write

    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    how = Settings([str(one) for one in given], dict(where or {}), dtype, **settings)
    if isinstance(run, Model):
        return write(run, str(run.origin[0]) if run.origin else "a model in memory", out, how)
    return write(load(run, device=device), str(run), out, how)


def samples(shards, where=None):
    """The samples of a corpus one by one: dicts with `__key__` and the members by extension, as bytes.

    shards: paths, patterns or URLs of .tar, .jsonl or .txt files. where: keep the samples whose JSON has these values.
    What cannot be read is left out. Raises UserError where there are no samples.
    """
    from .corpus.shards import Config, Corpus

    corpus = Corpus(Config(shards, where=where or {}), "samples")
    for number in range(len(corpus)):
        yield {"__key__": corpus.key(number), **corpus.raw(number)}
