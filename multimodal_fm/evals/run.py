"""A checkpoint through the evals, into one table."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys

from .. import evals
from ..config import Evaluation
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..errors import UserError
from ..model import Model
from .embed_corpus import Encoded, encode


def evaluate(model: Model, evaluation: Evaluation) -> tuple[dict[str, dict], Encoded]:
    """All figures that the data allows, by name, and the encoded data. Raises UserError."""
    unknown = [part for part in evaluation.modalities if part not in model.modalities]
    if unknown:
        raise UserError(f"this model reads {', '.join(model.modalities)}, not {', '.join(unknown)}")
    corpus = Corpus(Source(evaluation.on, where=evaluation.where), "on")
    encoded = encode(model, corpus, evaluation.modalities, _counter())
    if not encoded.things:
        raise UserError(
            f"nothing in {evaluation.on} can be read as {', '.join(evaluation.modalities or model.modalities)}"
        )
    for name, field in (("group", evaluation.group), ("within", evaluation.within), ("labels", evaluation.labels)):
        if field and all(encoded.value(sample, field) is None for sample in range(len(corpus))):
            raise UserError(f"--{name} {field}: no sample of {evaluation.on} has this field")
    figures = {}
    for module in _evals():
        names = {f.name for f in dataclasses.fields(module.Config)}
        given = {n: v for n, v in dataclasses.asdict(evaluation).items() if n in names and v}
        figures |= module.run(encoded, module.Config(**given), model)
    return figures, encoded


def _evals() -> list:
    own = ("embed_corpus", "run")  # what the measurements share
    names = sorted(m.name for m in pkgutil.iter_modules(evals.__path__) if m.name not in own)
    return [importlib.import_module(f"{evals.__name__}.{name}") for name in names]


def _counter():
    shown = sys.stderr.isatty()

    def count(done: int, total: int) -> None:
        if shown and (done % 64 == 0 or done == total):
            print(f"\rencoding {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return count


def table(figures: dict[str, dict]) -> list[list[str]]:
    """Rows of text for a person, the header first: one row a direction of retrieval, one a figure of the rest."""
    rows = [["", "R@1", "R@5", "R@10", "95 % interval", "chance", "× chance", "median rank", "MRR", "n"]]
    for name in dict.fromkeys(n.rpartition("/")[0] for n in figures if n.startswith("retrieval/")):
        ten, queries = figures[f"{name}/r@10"], figures[f"{name}/mrr"]["n"]
        rows.append(
            [
                name.removeprefix("retrieval/").replace("_to_", " → "),
                *(f"{figures[f'{name}/r@{k}']['value']:.3f}" for k in (1, 5, 10)),
                f"{ten['low']:.3f} – {ten['high']:.3f}",
                f"{ten['chance']:.3f}",
                f"{ten['value'] / ten['chance']:.1f}",
                f"{figures[f'{name}/median_rank']['value']:.0f}",
                f"{figures[f'{name}/mrr']['value']:.3f}",
                str(ten["n"]) if ten["n"] == queries else f"{ten['n']} of {queries}",
            ]
        )
    for name, one in figures.items():
        if not name.startswith("retrieval/"):
            chance = one["chance"]
            rows.append(
                [
                    name.replace("/", " "),
                    f"{one['value']:.3f}",
                    "",
                    "",
                    f"{one['low']:.3f} – {one['high']:.3f}",
                    "" if chance is None else f"{chance:.3f}",
                    "" if not chance else f"{one['value'] / chance:.1f}",
                    "",
                    "",
                    str(one["n"]),
                ]
            )
    return rows


def render(rows: list[list[str]]) -> str:
    """Aligned columns; those that are empty throughout are left out."""
    kept = [c for c in range(len(rows[0])) if any(row[c] for row in rows[1:])]
    widths = [max(len(row[c]) for row in rows) for c in kept]
    lines = []
    for row in rows:
        cells = [row[c].ljust(w) if c == 0 else row[c].rjust(w) for c, w in zip(kept, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
