"""One page about a run: what the model finds, how well, how it was trained, and how to reproduce it.

The page is a single file that needs no network: pictures and sounds are in it as data URIs, curves as SVG.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
import random
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from .. import __version__, objectives
from ..corpus.fields import lookup
from ..corpus.storage import write_atomic
from ..errors import SampleError, UserError, printable
from ..evals.base import Evaluation
from ..evals.embed_corpus import EmbeddedCorpus, split_inputs
from ..evals.metrics import TIE, rank_first, score_blocks
from ..evals.retrieval import SearchTask, search_tasks
from ..evals.run import drop_empty_columns, evaluate, keep, load_evaluations, render, table
from ..model import Model, load
from ..run_dir import checkpoint
from ..run_dir.records import Skipped, read_jsonl
from ..tokenizers.text import USUAL_FIELDS
from . import page
from .page import DASHES, LINES, Media, format_number, format_time, mark_steps, plot, program, relative, smooth

SEED = 0  # of the draw of the gallery's queries
NEAREST = 5  # answers that the gallery shows for each query
DIRECTIONS = (("audio", "image"), ("text", "image"), ("image", "text"), ("image", "audio"))
DIRECTIONS_WITHOUT_IMAGES = (("text", "audio"), ("audio", "text"))
MAX_BYTES = 8_000_000
MAX_ACTS = 100  # of monitors that are shown
SIZES = ((6, 30_000, 300_000), (6, 10_000, 40_000), (3, 10_000, 40_000))
"""Queries a direction, and the most bytes of a picture and of a sound: the first that fit into MAX_BYTES are taken."""


def write(run: str | Path, device: str = "auto", trusted: bool = False) -> Path:
    """Measure the run's newest checkpoint and write RUN/report.html, RUN/evaluations.json and RUN/config.yaml.

    Prints each table, then the page's path and three commands to try. Raises UserError where the run's configuration
    has no `evaluate`, or where it is somebody else's and not `trusted`.
    """
    run = Path(run)
    folder = checkpoint.newest(run)
    evaluations = load_evaluations(folder, trusted)
    if not evaluations:
        raise UserError(f"{run}: its config has no `evaluate`, so nothing to report on; try `mmfm evaluate` with --on")
    model = load(folder, device=device)
    results = []
    for name, evaluation in evaluations.items():
        figures, embedded = evaluate(model, objectives.load(folder, model), evaluation, folder)
        keep(name, evaluation, figures, embedded)
        results.append(Result(name, evaluation, figures, embedded))
        if embedded.skipped:
            print("\n".join(Skipped(embedded.skipped).lines()), file=sys.stderr)
        print(f"\n{printable(name)}", render(table(figures)), sep="\n")
        for note in embedded.notes:
            print(f"note: {printable(note)}")
    config = config_yaml(run, folder)
    write_atomic(run / "config.yaml", config.encode())
    tries = commands(run, folder, model, results[0])
    path = run / "report.html"
    write_atomic(path, _page(run, folder, model, results, config, tries).encode("utf-8", "replace"))
    print(f"\n{printable(str(path))}\n\nTry next:")
    for line in tries:
        print(f"  {printable(line)}")
    return path


@dataclass
class Result:
    """One evaluation of the run: its settings, its figures, and the corpus that they were measured on."""

    name: str
    evaluation: Evaluation
    figures: dict[str, dict]
    embedded: EmbeddedCorpus

    @property
    def shards(self) -> list[str]:
        on = self.evaluation.on
        return [on] if isinstance(on, str) else on


def _page(run: Path, folder: Path, model: Model, results: list[Result], config: str, tries: list[str]) -> str:
    """The page; where it grows too large, with smaller pictures, shorter sounds and fewer queries."""
    state = checkpoint.read_data(folder, "state")
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row["step"] <= state["step"]]
    template = page.template("run.html")
    values = {
        "name": run.resolve().name,
        "facts": facts(model, rows, state["step"]),
        "curves": curves(rows),
        "monitors": _monitors(run),
        "skipped": _skipped(run, results),
        "folder": folder,
        "seed": state["seed"],
        "yaml": config,
        "again": f"{program()} pretrain {shlex.quote(f'{run}/config.yaml')} {shlex.quote(f'run_dir={run}-again')}",
        "tries": tries,
    }
    for count, picture, sound in SIZES:
        media = Media(picture, sound)
        evaluations = [_describe(model, result, count, media) for result in results]
        text = template.render(**values, evaluations=evaluations, nearest=NEAREST)
        if len(text) <= MAX_BYTES:
            break
    return text


def _describe(model: Model, result: Result, count: int, media: Media) -> dict:
    """What the page shows of one evaluation."""
    retrieval = {key: figure for key, figure in result.figures.items() if key.startswith("retrieval/")}
    others = {key: figure for key, figure in result.figures.items() if key not in retrieval}
    other_rows = [[cell.replace("_", " ") for cell in row] for row in table(others)]
    tens = [figure for key, figure in retrieval.items() if key.endswith("/r@10")]
    return {
        "name": result.name,
        "settings": result.evaluation,
        "on": result.shards,
        "count": len(result.embedded.metadata),
        "inputs": {m: len(inputs.texts) for m, inputs in result.embedded.inputs.items()}
        if result.embedded.is_read
        else {},
        "gallery": gallery(model, result, count, media),
        "retrieval": table(retrieval) if retrieval else [],
        "bars": [(row[0], ten) for row, ten in zip(table(retrieval)[1:], tens, strict=True)],
        "others": drop_empty_columns(other_rows) if others else [],
        "notes": result.embedded.notes,
    }


def facts(model: Model, rows: list[dict], step: int) -> dict[str, str]:
    """What the model is and what it took to train it, as far as metrics.jsonl tells."""
    cuda = model.device.type == "cuda"
    shown = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "modalities": ", ".join(model.modalities),
        "steps": f"{step:,}",
    }
    rows = [row for row in rows if "tokens" in row]  # the others are figures of validation
    if rows:
        shown |= {
            "tokens seen": _format_count(sum(row["tokens"] for row in rows)),
            "training time": format_time(sum(row["seconds"] for row in rows)),
            "tokens/s (median)": f"{np.median([row['tokens_per_second'] for row in rows]):,.0f}",
        }
    return shown | {
        "date": datetime.date.today().isoformat(),
        "versions": f"multimodal_fm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "measured on": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {os.cpu_count()} cores",
    }


def _format_count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,.0f}"


# The gallery


def gallery(model: Model, result: Result, count: int, media: Media) -> list[dict]:
    """For each direction that the corpus allows: random queries with their nearest answers, as retrieval ranks them."""
    embedded, evaluation = result.embedded, result.evaluation
    if not embedded.is_read or not embedded.has_vectors:
        return []
    directions = DIRECTIONS if "image" in embedded.inputs else DIRECTIONS_WITHOUT_IMAGES
    shown = []
    for ask, answer in (pair for pair in directions if embedded.inputs.keys() >= set(pair)):
        tasks = list(search_tasks(embedded, evaluation.group, evaluation.within, ask, answer))
        pool = [(task, number) for task in tasks for number in task.queries]
        drawn = random.Random(f"{SEED} {ask} {answer}").sample(pool, min(count, len(pool)))
        if drawn:
            queries = [_query(model, result, task, number, media) for task, number in drawn]
            shown.append({"ask": ask, "answer": answer, "queries": queries, "pool": len(pool)})
    return shown


def _query(model: Model, result: Result, task: SearchTask, number: int, media: Media) -> dict:
    """One query with its nearest answers and the rank of its first right one; a tie counts against the query."""
    embedded, groups = result.embedded, task.queries[number]
    query = embedded.inputs[task.query].vectors[number : number + 1]
    vectors = embedded.inputs[task.answer].vectors[list(task.gallery)]
    right = torch.tensor([[bool(own & groups) for own in task.gallery.values()]])
    rank = int(rank_first(query, vectors, lambda rows: right)[0])
    scores = next(score_blocks(query, vectors))[1][0].nan_to_num(nan=-math.inf)
    order = torch.where(right[0], scores - TIE, scores)  # so that the order agrees with the rank
    ranked = sorted(zip((-order).tolist(), right[0].tolist(), task.gallery, scores.tolist(), strict=True))[:NEAREST]
    samples = set(task.samples)

    def show(modality: str, shown: int) -> dict:
        holders = [sample for sample in embedded.inputs[modality].samples[shown] if sample in samples]
        fitting = (i for i in holders if embedded.groups(i, result.evaluation.group) & groups)
        return _show(model, embedded, modality, shown, next(fitting, holders[0]), media)

    return {
        "query": show(task.query, number),
        "answers": [{**show(task.answer, t), "score": score, "right": is_right} for _, is_right, t, score in ranked],
        "rank": rank,
        "size": len(task.gallery),
    }


def _show(model: Model, embedded: EmbeddedCorpus, modality: str, number: int, sample: int, media: Media) -> dict:
    """An input for the page: its text or its sample's caption, and the picture or sound."""
    text, source = embedded.inputs[modality].texts[number], ""
    if text is None:
        text = _caption(model, embedded, sample)
        try:
            raw = embedded.load(model, modality, number)
            source = media.uri(modality, model.tokenizers[modality].extensions, raw)
        except SampleError:  # the shard has changed since it was read
            source = ""
    language = _language(embedded.metadata[sample], text)
    return {"modality": modality, "text": text, "language": language, "source": source}


def _caption(model: Model, embedded: EmbeddedCorpus, sample: int) -> str:
    """The sample's first text, whether or not the evaluation reads texts; its key where it has none."""
    texts = embedded.texts(sample)
    if not texts and "text" in model.tokenizers:
        try:
            texts = split_inputs(model.tokenizers["text"], embedded.corpus.raw(sample))
        except SampleError:
            texts = []
    return next((text for text in texts if isinstance(text, str)), embedded.key(sample))


def _language(row: dict, text: str) -> str:
    """The text's language as far as the sample's JSON says: by its key in a map of texts, or by a field."""
    for name in USUAL_FIELDS:
        if isinstance(row.get(name), dict):
            tags = dict.fromkeys(re.split("[_@-]", tag)[0] for tag, value in row[name].items() if value == text)
            if tags:
                return ", ".join(list(tags)[:3])
    usual = ("language", "lang", "original_data.language", "original_data.lang")
    return next((value for value in (lookup(row, name) for name in usual) if isinstance(value, str)), "")


# Curves


def curves(rows: list[dict]) -> list[dict]:
    """Small plots with a title, the last value and an SVG each: losses, accuracies, learning rate, tokens a second."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    plots: dict[str, list[str]] = {}
    plots |= {name: [name] for name in names if re.fullmatch("(validation/)?loss(/[^/]+/[^/]+)?", name)}
    for name in names:
        if name.endswith("_accuracy"):
            plots.setdefault(f"{name.rpartition('/')[0].removeprefix('loss/')}: accuracy", []).append(name)
    plots |= {name: [name] for name in ("lr", "tokens_per_second") if name in names}
    titles: dict[str, str] = {"loss": "loss, all tasks", "lr": "learning rate", "tokens_per_second": "tokens/s"}
    titles["validation/loss"] = "validation loss, all tasks"
    return [_curve(number, titles.get(t, t), rows, plotted) for number, (t, plotted) in enumerate(plots.items())]


def _curve(number: int, title: str, rows: list[dict], names: list[str]) -> dict:
    """One plot: a smoothed line for each name, over the raw values where it is alone."""
    rows = [row for row in rows if any(name in row for name in names)]
    steps = np.array([row["step"] for row in rows])
    raw = {name: np.array([row.get(name, math.nan) for row in rows], dtype=float) for name in names}
    lines = {name: values if name == "lr" else smooth(values) for name, values in raw.items()}
    labels = [name.rpartition("/")[2].removesuffix("_accuracy").replace("_", " – ") for name in names]
    last = [format_number(line[-1]) for line in lines.values()]
    if len(names) > 1:
        last = [f"{label} {value}" for label, value in zip(labels, last, strict=True)]

    def paint(axes) -> None:
        for label, name, color, dash in zip(labels, names, LINES * len(names), DASHES * len(names)):
            if len(names) == 1:
                axes.plot(steps, raw[name], color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, lines[name], dash, color=color, linewidth=1.6, label=label)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        mark_steps(axes)

    description = f"{title}, over {len(rows):,} steps, at the end: {', '.join(last)}"
    svg = plot(f"curve{number}", description, paint)
    return {"title": title, "last": last[0] if len(last) == 1 else "", "svg": svg}


# What was skipped, and how to go on


def _skipped(run: Path, results: list[Result]) -> list[tuple[str, list[str]]]:
    """Lines for what training skipped, and for what each evaluation did."""
    skipped = [("training", Skipped(read_jsonl(run / "quarantine.jsonl")).lines())]
    return skipped + [(result.name, Skipped(result.embedded.skipped).lines()) for result in results]


def _monitors(run: Path) -> list[list[str]]:
    """A table, the header first, of each time that a monitor acted; of very many the first."""
    rows = [["", "monitor", "figure", "value", "is", "done"]]
    for act in itertools.islice(read_jsonl(run / "monitors.jsonl"), MAX_ACTS):
        value = "" if act["value"] is None else format_number(act["value"])
        done = str(act["action"]).replace("_", " ")
        if "to" in act:
            done += f" to step {act['to']}, without the data of steps {act['skipped'][0]} to {act['skipped'][1]}"
        rows.append([str(act["step"]), act["monitor"], act["figure"], value, act["why"], done])
    return rows


def config_yaml(run: Path, folder: Path) -> str:
    """The checkpoint's configuration as YAML, with its run folder and its tokenizers' files where they now are."""
    data = checkpoint.read_data(folder, "config")
    data["run_dir"] = str(run)
    for modality, settings in data["model"]["tokenizers"].items():
        if settings.get("file"):
            files = (checkpoint.tokenizer_file(parent, modality, settings["file"]) for parent in (run, folder))
            settings["file"] = str(next((file for file in files if file.exists()), settings["file"]))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def commands(run: Path, folder: Path, model: Model, result: Result) -> list[str]:
    """Three commands that work for this run when copied; they measure and search what `result` was measured on."""
    evaluation, embedded, called = result.evaluation, result.embedded, program()
    where = [part for key, value in evaluation.where.items() for part in ("--where", f"{key}={value}")]
    fields = [(name, getattr(evaluation, name)) for name in ("group", "within", "labels")]
    flags = [part for name, value in fields if value for part in (f"--{name}", value)]
    for name in ("modalities", "evaluators", "measure", "subgroups"):
        if getattr(evaluation, name):
            flags += [f"--{name}", *getattr(evaluation, name)]
    settings = checkpoint.read_data(folder, "config")
    step = checkpoint.read_data(folder, "state")["step"]
    more = [] if step < settings["steps"] else [f"steps={2 * step}"]
    python = f"from multimodal_fm.model import load; print(load({str(run)!r}))"
    tries = [
        [called, "evaluate", str(run), "--on", *result.shards, *where, *flags],
        [called, "pretrain", f"{run}/config.yaml", *more, "--resume"],
        [shlex.quote(relative(sys.executable)), "-c", python],
    ]
    if "text" in model.modalities:
        words = _caption(model, embedded, random.Random(SEED).randrange(len(embedded.metadata)))
        words = "".join(c if c.isprintable() else " " for c in words[:60].encode("utf-8", "replace").decode())
        tries.insert(0, [called, "search", str(run), "--in", *result.shards, *where, "--", " ".join(words.split())])
    return [" ".join([one[0], *map(shlex.quote, one[1:])]) for one in tries[:3]]
