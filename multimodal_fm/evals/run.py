"""Runs the evaluators on a model and a corpus, and renders their figures as one table."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import sys
from pathlib import Path, PurePath
from typing import Any

from .. import evals
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..errors import UserError
from ..model import Model
from ..run_dir import checkpoint, trust
from .base import Evaluation, Evaluator
from .embed_corpus import EmbeddedCorpus, embed_corpus


def load_evaluations(folder: Path, trusted: bool = False) -> dict[str, Evaluation]:
    """The evaluations that a checkpoint's configuration names, by name.

    Raises UserError where the checkpoint is somebody else's and not `trusted`: reading their shards would open local
    files and URLs, write indexes beside them, and import evaluators, all of a stranger's choice.
    """
    evaluations = checkpoint.read_data(folder, "config").get("evaluate") or {}
    if evaluations and not trusted and not trust.is_own(folder, checkpoint.MANIFEST):
        raise UserError(
            f"{folder}: was not trained here by you, so what its config names under `evaluate` is not read: "
            "give --on SHARDS, or --trust to read the files and URLs, and import the evaluators, that it names"
        )
    try:
        return {name: Evaluation(**settings) for name, settings in evaluations.items()}
    except (TypeError, AttributeError):
        raise UserError(f"{folder}: its config has an `evaluate` that cannot be read; give --on SHARDS") from None


def evaluate(
    model: Model, objectives: dict[str, Any], evaluation: Evaluation, folder: Path | None = None
) -> tuple[dict[str, dict], EmbeddedCorpus]:
    """All figures that the corpus allows, by name, and the embedded corpus.

    Where `folder`, the model's checkpoint, was trained on shards of the corpus, each figure has `"trained_on": True`
    and the corpus a note that names them. Model and objectives are expected in eval mode. Raises UserError.
    """
    unknown = [modality for modality in evaluation.modalities if modality not in model.modalities]
    if unknown:
        raise UserError(f"this model reads {', '.join(model.modalities)}, not {', '.join(unknown)}")
    evaluators = [*_built_in(), *map(_load_evaluator, evaluation.evaluators)]
    corpus = Corpus(Source(evaluation.on, where=evaluation.where), "on")
    embedded = embed_corpus(model, corpus, evaluation.modalities, _progress())
    if not embedded.inputs:
        wanted = ", ".join(evaluation.modalities or model.modalities)
        raise UserError(f"nothing in {_names(evaluation.on)} can be read as {wanted}")
    for name in ("group", "within", "labels"):
        field = getattr(evaluation, name)
        if field and all(embedded.field(sample, field) is None for sample in range(len(corpus))):
            raise UserError(f"--{name} {field}: no sample of {_names(evaluation.on)} has this field")
    figures: dict[str, dict] = {}
    for evaluator in evaluators:
        names = {f.name for f in dataclasses.fields(evaluator.Config)}
        given = {n: v for n, v in dataclasses.asdict(evaluation).items() if n in names and v}
        figures |= evaluator.run(embedded, evaluator.Config(**given), model, objectives)
    seen = find_trained_on(corpus, folder) if folder else []
    if seen:
        figures = {name: figure | {"trained_on": True} for name, figure in figures.items()}
        more = f" and {len(seen) - 3} more" if len(seen) > 3 else ""
        names = f"{', '.join(seen[:3])}{more}"
        embedded.note(f"the model was trained on {names}: these figures say nothing about data that it has not seen")
    return figures, embedded


def _built_in() -> list[Evaluator]:
    """An evaluator of each file of this folder that defines one."""
    names = sorted(found.name for found in pkgutil.iter_modules(evals.__path__))
    modules = [importlib.import_module(f"{evals.__name__}.{name}") for name in names]
    classes: list[Any] = [getattr(module, "Evaluator", Evaluator) for module in modules]
    return [found() for found in classes if found is not Evaluator]


def _load_evaluator(name: str) -> Evaluator:
    """The evaluator of a module elsewhere. Raises UserError."""
    try:
        return importlib.import_module(name).Evaluator()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"evaluators: {name!r} is no module that defines an Evaluator ({error})") from None


def find_trained_on(corpus: Corpus, folder: Path) -> list[str]:
    """The shards of the corpus that the checkpoint was trained on.

    Told by their paths, and of a source as a whole by its fingerprint, wherever it lies by now. No file is opened that
    the checkpoint names. A source whose `where` asks for another value of a field had other samples of its shards.
    """
    shards = list(dict.fromkeys(index.shard for index in corpus.indexes))
    config, fingerprints = checkpoint.read_data(folder, "config"), checkpoint.read_data(folder, "state")["data"]
    seen = set()
    for name, source in config["sources"].items():
        if fingerprints.get(name) == corpus.fingerprint():
            return shards
        wanted, own = source["where"], corpus.config.where
        if all(wanted[field] == own[field] for field in wanted.keys() & own.keys()):
            patterns = [source["shards"]] if isinstance(source["shards"], str) else source["shards"]
            seen |= {shard for shard in shards if any(_matches(shard, pattern) for pattern in patterns)}
    return [shard for shard in shards if shard in seen]


def _matches(shard: str, pattern: str) -> bool:
    if "://" in shard or "://" in pattern:
        return shard == pattern or ("://" in shard and "://" in pattern and PurePath(shard).match(pattern))
    return PurePath(os.path.abspath(shard)).match(os.path.abspath(pattern))


def _names(on: str | list[str]) -> str:
    return on if isinstance(on, str) else ", ".join(on)


def _progress():
    shown = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if shown and (done % 64 == 0 or done == total):
            print(f"\rembedding {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def table(figures: dict[str, dict]) -> list[list[str]]:
    """Rows of text for a person, the header first: one row a direction of retrieval, one a figure of the rest."""
    rows = [["", "R@1", "R@5", "R@10", "95 % interval", "chance", "× chance", "median rank", "MRR", "n"]]
    for name in dict.fromkeys(n.rpartition("/")[0] for n in figures if n.startswith("retrieval/")):
        ten, queries = figures[f"{name}/r@10"], figures[f"{name}/mrr"]["n"]
        rows.append(
            [
                name.removeprefix("retrieval/").replace("_to_", " → "),
                *(f"{figures[f'{name}/r@{k}']['value']:.3f}" for k in (1, 5, 10)),
                *_interval_and_chance(ten),
                f"{figures[f'{name}/median_rank']['value']:.0f}",
                f"{figures[f'{name}/mrr']['value']:.3f}",
                str(ten["n"]) if ten["n"] == queries else f"{ten['n']} of {queries}",
            ]
        )
    for name, figure in figures.items():
        if not name.startswith("retrieval/"):
            cells = [f"{figure['value']:.3f}", "", "", *_interval_and_chance(figure), "", "", str(figure["n"])]
            rows.append([name.replace("/", " "), *cells])
    return rows


def _interval_and_chance(figure: dict) -> list[str]:
    chance = figure["chance"]
    return [
        f"{figure['low']:.3f} – {figure['high']:.3f}",
        "" if chance is None else f"{chance:.3f}",
        "" if not chance else f"{figure['value'] / chance:.1f}",
    ]


def drop_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    """The table without the columns that are empty throughout, but for their header."""
    kept = [c for c in range(len(rows[0])) if c == 0 or any(row[c] for row in rows[1:])]
    return [[row[c] for c in kept] for row in rows]


def render(rows: list[list[str]]) -> str:
    """The table as aligned columns."""
    rows = drop_empty_columns(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)
