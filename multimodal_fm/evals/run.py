"""Runs the evaluators on a model and a corpus, and renders their figures as one table."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from .. import evals
from ..config import build, read_yaml
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..errors import UserError
from ..model import Model
from ..run_dir import checkpoint, evaluations, trust
from .base import Evaluation, Evaluator
from .embed_corpus import EmbeddedCorpus, embed_corpus
from .metrics import SEED


def load_evaluations(folder: Path, trusted: bool = False) -> dict[str, Evaluation]:
    """The evaluations that a checkpoint's configuration names, by name.

    Raises UserError where the checkpoint is somebody else's and not `trusted`: reading their shards would open local
    files and URLs, write indexes beside them, and import evaluators, all of a stranger's choice.
    """
    found = checkpoint.read_data(folder, "config").get("evaluate") or {}
    if found and not trusted and not trust.is_own(folder, checkpoint.MANIFEST):
        raise UserError(
            f"{folder}: was not trained here by you, so what its config names under `evaluate` is not read: "
            "give --on SHARDS, or --trust to read the files and URLs, and import the evaluators, that it names"
        )
    try:
        return {name: Evaluation(**settings) for name, settings in found.items()}
    except (TypeError, AttributeError):
        raise UserError(f"{folder}: its config has an `evaluate` that cannot be read; give --on SHARDS") from None


QUICK = ("retrieval", "knn", "bits_per_byte", "heads")
"""The evaluators of the suite `quick`, those of them that there are: nothing is fitted, and the corpus is read once."""


def load_suite(name: str, folder: Path, trusted: bool = False) -> dict[str, Evaluation]:
    """The evaluations of a suite: a YAML file with a map of them, as under `evaluate` in a config; or the `evaluate` of
    the checkpoint's config with a `quick` set of evaluators, or with all of them, `full`.

    Raises UserError.
    """
    if name in ("quick", "full"):
        configured, known = load_evaluations(folder, trusted), list(built_in())
        if not configured:
            raise UserError(f"--suite {name}: the run's config has no `evaluate`; give a file, or --on SHARDS")
        chosen = known if name == "full" else [one for one in known if one in QUICK]
        return {key: dataclasses.replace(one, measure=chosen) for key, one in configured.items()}
    if not Path(name).is_file():
        raise UserError(f"--suite {name}: is neither `quick` nor `full`, nor a file")
    suite = build(_Suite, {"evaluate": read_yaml(name)}, name).evaluate
    if not suite:
        raise UserError(f"--suite {name}: names no evaluation; write NAME: {{on: SHARDS}}")
    return suite


@dataclasses.dataclass
class _Suite:
    evaluate: dict[str, Evaluation]


def keep(name: str, evaluation: Evaluation, figures: dict[str, dict], embedded: EmbeddedCorpus) -> None:
    """Write the figures into the evaluations.json of the checkpoint's run; a note says so where that cannot be."""
    on = [evaluation.on] if isinstance(evaluation.on, str) else evaluation.on
    entry = {"on": on, "seed": SEED, "figures": figures, "notes": list(embedded.notes)}
    if embedded.folder and (why := evaluations.keep(embedded.folder, name or " ".join(map(str, on)), entry)):
        embedded.note(why)


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
    evaluators = [*_built_in(evaluation.measure), *map(_load_evaluator, evaluation.evaluators)]
    corpus = Corpus(Source(evaluation.on, where=evaluation.where), "on")
    embedded = embed_corpus(model, corpus, evaluation.modalities, _progress())
    embedded.folder = folder
    for name in ("group", "within", "labels", "subgroups"):
        given = getattr(evaluation, name)
        for field in filter(None, [given] if isinstance(given, str) else given):
            if all(embedded.field(sample, field) is None for sample in range(len(corpus))):
                raise UserError(f"--{name} {field}: no sample of {_names(evaluation.on)} has this field")
    if evaluation.train:
        train = Corpus(Source(evaluation.train, where=evaluation.where), "train")
        embedded.train = embed_corpus(model, train, evaluation.modalities, _progress())
    for evaluator in [one for one in evaluators if one.needs_vectors and "retrieval" not in model.heads]:
        embedded.note(f"no {_name(evaluator)}: this model has no retrieval head, so its vectors are not comparable")
        evaluators.remove(evaluator)

    def measure(view: EmbeddedCorpus, chosen: Callable[[Evaluator], bool]) -> dict[str, dict]:
        figures: dict[str, dict] = {}
        for evaluator in filter(chosen, evaluators):
            names = {f.name for f in dataclasses.fields(evaluator.Config)}
            given = {n: v for n, v in dataclasses.asdict(evaluation).items() if n in names and v}
            figures |= evaluator.run(view, evaluator.Config(**given), model, objectives)
        return figures

    embedded.remeasure = lambda view, pairs: measure(view, lambda e: not e.after_others and e.needs_vectors == pairs)
    figures = measure(embedded, lambda e: not e.after_others)
    figures |= measure(embedded, lambda e: e.after_others)
    if embedded.is_read and not embedded.inputs:
        wanted = ", ".join(evaluation.modalities or model.modalities)
        raise UserError(f"nothing in {_names(evaluation.on)} can be read as {wanted}")
    if embedded.train is not None:
        embedded.skipped += embedded.train.skipped
    seen = find_trained_on(corpus, folder) if folder else []
    if seen:
        figures = {name: figure | {"trained_on": True} for name, figure in figures.items()}
        more = f" and {len(seen) - 3} more" if len(seen) > 3 else ""
        names = f"{', '.join(seen[:3])}{more}"
        embedded.note(f"the model was trained on {names}: these figures say nothing about data that it has not seen")
    return figures, embedded


def built_in() -> dict[str, Evaluator]:
    """The evaluators of this folder by the name of their file."""
    names = sorted(found.name for found in pkgutil.iter_modules(evals.__path__))
    modules = {name: importlib.import_module(f"{evals.__name__}.{name}") for name in names}
    classes: dict[str, Any] = {name: getattr(module, "Evaluator", Evaluator) for name, module in modules.items()}
    return {name: found() for name, found in classes.items() if found is not Evaluator}


def _built_in(measure: list[str]) -> list[Evaluator]:
    """Those of the given names, or else those of every day. Raises UserError."""
    known = built_in()
    for name in measure:
        if name not in known:
            raise UserError(f"measure: there is no evaluator {name!r}; there are {', '.join(known)}")
    return [evaluator for name, evaluator in known.items() if (name in measure if measure else evaluator.default)]


def _name(evaluator: Evaluator) -> str:
    return type(evaluator).__module__.rpartition(".")[2]


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
    """Rows of text for a person, the header first: one row a direction of retrieval, one a figure of the rest.

    Of robustness only what is lost is among them.
    """
    first = "R@1" if any(name.startswith("retrieval/") for name in figures) else "value"
    rows = [["", first, "R@5", "R@10", "95 % interval", "chance", "× chance", "median rank", "MRR", "n"]]
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
        if not name.startswith("retrieval/") and (name.endswith("/drop") or not name.startswith("robustness/")):
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
