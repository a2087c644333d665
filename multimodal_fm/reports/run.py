"""One page about a run: what the model finds, how well, how it was trained, and how to make it again.

The page is a single file that needs no network: pictures and sounds are in it as data URIs, curves as SVG.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from .. import __version__
from ..config import Evaluation
from ..corpus.fields import lookup
from ..corpus.storage import put
from ..errors import SampleError, UserError
from ..evals import retrieval
from ..evals.embed_corpus import Encoded, things_in
from ..evals.run import evaluate, render, table
from ..model import Model, load
from ..run_dir import checkpoint
from ..run_dir.records import Skipped, rows_of
from ..tokenizers.text import USUAL_FIELDS
from . import page
from .page import DASHES, LINES, STYLE, Media, inline

SEED = 0  # of the draw of the gallery's queries
NEAREST = 5  # answers that the gallery shows for each query
DIRECTIONS = (("audio", "image"), ("text", "image"), ("image", "text"), ("image", "audio"))
WITHOUT_IMAGES = (("text", "audio"), ("audio", "text"))
MOST_BYTES = 8_000_000
FITS = ((6, 30_000, 300_000), (6, 10_000, 40_000), (3, 10_000, 40_000))  # queries; the most bytes a picture, a sound


def write(run: str | Path, device: str = "auto") -> Path:
    """Measure the run's newest checkpoint and write RUN/report.html, RUN/evaluation.json and RUN/config.yaml.

    Prints each table, then the page's path and three commands to try. Raises UserError where the run's configuration has
    no `evaluate`.
    """
    run = Path(run)
    folder = checkpoint.newest(run)
    model = load(folder, device=device)
    if not model.evaluations:
        raise UserError(f"{run}: its config has no `evaluate`, so nothing to report on; try `mmfm evaluate` with --on")
    measured = {}
    for name, evaluation in model.evaluations.items():
        figures, encoded = measured[name] = evaluate(model, evaluation)
        if encoded.lost:
            print("\n".join(Skipped(encoded.lost).lines()), file=sys.stderr)
        print(f"\n{name}", render(table(figures)), sep="\n")
    data = {name: figures for name, (figures, _) in measured.items()}
    put(run / "evaluation.json", json.dumps(data, indent=1).encode())
    written = _config(run, folder)
    put(run / "config.yaml", written.encode())
    tries = commands(run, folder, model, measured)
    path = run / "report.html"
    put(path, _page(run, folder, model, measured, written, tries).encode("utf-8", "replace"))
    print(f"\n{path}\n\nTry next:")
    for line in tries:
        print(f"  {line}")
    return path


def _page(run: Path, folder: Path, model: Model, measured: dict, written: str, tries: list[str]) -> str:
    """The page; where it grows too large, with smaller pictures, shorter sounds and fewer queries."""
    state = checkpoint.read_data(folder, "state")
    rows = [row for row in rows_of(run / "metrics.jsonl") if row["step"] <= state["step"]]
    template = page.template("run.html")
    given = {
        "name": run.resolve().name,
        "facts": facts(model, rows, state["step"]),
        "curves": curves(rows),
        "skipped": _skipped(run, measured),
        "folder": folder,
        "seed": state["seed"],
        "yaml": written,
        "again": f"{_program()} pretrain {shlex.quote(f'{run}/config.yaml')} {shlex.quote(f'run={run}-again')}",
        "tries": tries,
    }
    for count, picture, sound in FITS:
        media = Media(picture, sound)
        sections = [_section(name, model, *found, count, media) for name, found in measured.items()]
        text = template.render(**given, sections=sections, nearest=NEAREST)
        if len(text) <= MOST_BYTES:
            break
    return text


def _section(name: str, model: Model, figures: dict, encoded: Encoded, count: int, media: Media) -> dict:
    """What the page says of one evaluation."""
    evaluation = model.evaluations[name]
    found = {key: value for key, value in figures.items() if key.startswith("retrieval/")}
    rest = {key: value for key, value in figures.items() if key not in found}
    others = [[cell.replace("_", " ") for cell in row] for row in table(rest)]
    others[0][1] = "value"
    return {
        "name": name,
        "evaluation": evaluation,
        "on": [evaluation.on] if isinstance(evaluation.on, str) else evaluation.on,
        "count": len(encoded.held),
        "modalities": {modality: len(things.raw) for modality, things in encoded.things.items()},
        "gallery": gallery(model, encoded, evaluation, count, media),
        "retrieval": table(found) if found else [],
        "bars": [(row[0], found[key]) for row, key in zip(table(found)[1:], _tens(found), strict=True)],
        "others": _filled(others) if rest else [],
    }


def _tens(figures: dict) -> list[str]:
    return [key for key in figures if key.endswith("/r@10")]


def _filled(rows: list[list[str]]) -> list[list[str]]:
    """The columns that say something."""
    kept = [c for c in range(len(rows[0])) if any(row[c] for row in rows[1:])]
    return [[row[c] for c in kept] for row in rows]


def facts(model: Model, rows: list[dict], step: int) -> dict[str, str]:
    """What the model is and what it took to train it, as far as metrics.jsonl tells."""
    cuda = model.device.type == "cuda"
    found = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "modalities": ", ".join(model.modalities),
        "steps": f"{step:,}",
    }
    if rows:
        found |= {
            "tokens seen": _count(sum(row["tokens"] for row in rows)),
            "training time": _clock(sum(row["seconds"] for row in rows)),
            "tokens/s (median)": f"{np.median([row['tokens_per_second'] for row in rows]):,.0f}",
        }
    return found | {
        "date": datetime.date.today().isoformat(),
        "versions": f"multimodal_fm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "measured on": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {os.cpu_count()} cores",
    }


def _count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,.0f}"


def _clock(seconds: float) -> str:
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{hours} h {minutes - 60 * hours} min"


# The gallery


def gallery(model: Model, encoded: Encoded, evaluation: Evaluation, count: int, media: Media) -> list[dict]:
    """For each direction that the data has: random queries with their nearest things, searched as the eval searches."""
    modalities = encoded.things
    directions = DIRECTIONS if "image" in modalities else WITHOUT_IMAGES
    shown = []
    for ask, answer in (pair for pair in directions if pair[0] in modalities and pair[1] in modalities):
        pool = _pool(encoded, evaluation, ask, answer)
        drawn = random.Random(f"{SEED} {ask} {answer}").sample(pool, min(count, len(pool)))
        if drawn:
            queries = [_query(model, encoded, evaluation, ask, answer, media, *one) for one in drawn]
            shown.append({"ask": ask, "answer": answer, "queries": queries, "pool": len(pool)})
    return shown


def _pool(encoded: Encoded, evaluation: Evaluation, ask: str, answer: str) -> list[tuple]:
    """All queries that have a right answer: the thing, its groups, its gallery's things with theirs, its samples."""
    pool = []
    for samples in retrieval.shares(encoded, evaluation.within):
        asks = retrieval.grouped(encoded, evaluation.group, ask, samples)
        answers = retrieval.grouped(encoded, evaluation.group, answer, samples)
        known = set().union(*answers.values())
        pool += [(thing, groups, answers, set(samples)) for thing, groups in asks.items() if groups & known]
    return pool


def _query(model, encoded, evaluation, ask, answer, media, thing, groups, answers, samples) -> dict:
    """One query with its nearest answers and the rank of its first right one; ties count against it, as in the eval."""
    scores = encoded.things[answer].vectors[list(answers)].double() @ encoded.things[ask].vectors[thing].double()
    scored = zip(scores.tolist(), answers, strict=True)
    ranked = sorted((-score, bool(answers[t] & groups), t) for score, t in scored)

    def show(modality: str, t: int) -> dict:
        holders = [sample for sample in encoded.things[modality].samples[t] if sample in samples]
        sample = next((i for i in holders if encoded.groups(i, evaluation.group) & groups), holders[0])
        return _show(model, encoded, modality, t, sample, media)

    return {
        "query": show(ask, thing),
        "answers": [{**show(answer, t), "score": -s, "right": right} for s, right, t in ranked[:NEAREST]],
        "rank": 1 + next(place for place, (_, right, _) in enumerate(ranked) if right),
        "size": len(ranked),
    }


def _show(model: Model, encoded: Encoded, modality: str, thing: int, sample: int, media: Media) -> dict:
    """A thing for the page: its text or caption, and the picture or sound."""
    raw = encoded.things[modality].raw[thing]
    text = raw if modality == "text" else _caption(model, encoded, sample)
    source = "" if modality == "text" else media.uri(modality, model.tokenizers[modality].extensions, raw)
    return {"modality": modality, "text": text, "language": _language(encoded.rows[sample], text), "source": source}


def _caption(model: Model, encoded: Encoded, sample: int) -> str:
    """The sample's first text, whether or not the evaluation reads texts; its key where it has none."""
    texts = encoded.texts(sample)
    if not texts and "text" in model.tokenizers:
        try:
            texts = things_in(model.tokenizers["text"], encoded.corpus.raw(sample))
        except SampleError:
            texts = []
    return next((text for text in texts if isinstance(text, str)), encoded.key(sample))


def _language(row: dict, text: str) -> str:
    """The text's language as far as the sample's JSON says: by its key in a map of texts, or by a field."""
    for name in USUAL_FIELDS:
        if isinstance(row.get(name), dict):
            tags = dict.fromkeys(re.split("[_@-]", tag)[0] for tag, value in row[name].items() if value == text)
            if tags:
                return ", ".join(list(tags)[:3])
    usual = ("language", "lang", "original_data.language", "original_data.lang")
    return next((found for found in (lookup(row, name) for name in usual) if isinstance(found, str)), "")


# Curves


def curves(rows: list[dict]) -> list[dict]:
    """Small figures with a name, the last value and an SVG each: losses, accuracies, learning rate, pace."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [name for name in names if re.fullmatch("loss(/[^/]+)?", name)]
    groups = {name: [name] for name in losses}
    for name in names:
        if name.endswith("_accuracy"):
            groups.setdefault(f"{name.rpartition('/')[0].removeprefix('loss/')}: accuracy", []).append(name)
    groups |= {name: [name] for name in ("lr", "tokens_per_second") if name in names}
    titles = {"loss": "loss, all sections", "lr": "learning rate", "tokens_per_second": "tokens/s"}
    return [_curve(number, titles.get(t, t), rows, of) for number, (t, of) in enumerate(groups.items())]


def _curve(number: int, title: str, rows: list[dict], names: list[str]) -> dict:
    """One figure: a smoothed line for each name, over the raw values where it is alone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = np.array([row["step"] for row in rows])
    last = []
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.7, 2.1), layout="constrained")
        axes = figure.subplots()
        for name, color, dash in zip(names, LINES * len(names), DASHES * len(names)):
            values = np.array([row.get(name, math.nan) for row in rows], dtype=float)
            line = values if name == "lr" else smooth(values)
            if len(names) == 1:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            label = name.rpartition("/")[2].removesuffix("_accuracy").replace("_", " – ")
            axes.plot(steps, line, dash, color=color, linewidth=1.6, label=label)
            last.append(_tick(line[-1]) if len(names) == 1 else f"{label} {_tick(line[-1])}")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    said = f"{title}, over {len(rows):,} steps, at the end: {', '.join(last)}"
    svg = inline(out.getvalue(), f"curve{number}", said)
    return {"title": title, "last": last[0] if len(last) == 1 else "", "svg": svg}


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the run around each step, of what is finite."""
    window = np.ones(max(1, len(values) // 20))
    if len(window) % 2 == 0:
        window = window[1:]
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    with np.errstate(invalid="ignore"):
        return sums / np.convolve(finite.astype(float), window, "same")


# What was left out, and how to go on


def _skipped(run: Path, measured: dict) -> list[tuple[str, list[str]]]:
    """Lines for each: what training left out, and each evaluation."""
    skipped = [("training", Skipped(rows_of(run / "quarantine.jsonl")).lines())]
    return skipped + [(name, Skipped(encoded.lost).lines()) for name, (_, encoded) in measured.items()]


def _config(run: Path, folder: Path) -> str:
    """The checkpoint's configuration as YAML, its run and its tokenizers' files where they now lie."""
    data = checkpoint.read_data(folder, "config")
    data["run"] = str(run)
    for modality, settings in data["tokenizers"].items():
        if settings.get("file"):
            places = (checkpoint.tokenizer_file(where, modality, settings["file"]) for where in (run, folder))
            settings["file"] = str(next((place for place in places if place.exists()), settings["file"]))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def commands(run: Path, folder: Path, model: Model, measured: dict) -> list[str]:
    """Three commands that work for this run when copied."""
    name, (_, encoded) = next(iter(measured.items()))
    evaluation, program = model.evaluations[name], _program()
    shards = [evaluation.on] if isinstance(evaluation.on, str) else evaluation.on
    where = [part for key, value in evaluation.where.items() for part in ("--where", f"{key}={value}")]
    flags = [
        part
        for flag in ("group", "within", "labels")
        if (value := getattr(evaluation, flag))
        for part in (f"--{flag}", value)
    ]
    modalities = ["--modalities", *evaluation.modalities] if evaluation.modalities else []
    settings = checkpoint.read_data(folder, "config")
    step = checkpoint.read_data(folder, "state")["step"]
    on = [] if step < settings["steps"] else [f"steps={2 * step}"]
    python = f"from multimodal_fm.model import load; print(load({str(run)!r}))"
    tries = [
        [program, "evaluate", str(run), "--on", *shards, *where, *flags, *modalities],
        [program, "pretrain", f"{run}/config.yaml", *on, "--resume"],
        [shlex.quote(_near(sys.executable)), "-c", python],
    ]
    if "text" in model.modalities:
        word = _caption(model, encoded, random.Random(SEED).randrange(len(encoded.held)))
        word = " ".join(word[:60].encode("utf-8", "replace").decode().split())
        tries.insert(0, [program, "search", str(run), "--in", *shards, *where, "--", word])
    return [" ".join([one[0], *map(shlex.quote, one[1:])]) for one in tries[:3]]


def _program() -> str:
    """How the command line is called from here: by its name where that finds it, else by its path."""
    called = Path(sys.argv[0])
    script = called if called.name == "mmfm" else Path(sys.executable).with_name("mmfm")
    found = shutil.which("mmfm")
    if found and script.exists() and Path(found).resolve() == script.resolve():
        return "mmfm"
    return shlex.quote(_near(script)) if script.exists() else f"{shlex.quote(_near(sys.executable))} -m multimodal_fm"


def _near(path: str | Path) -> str:
    """The path from the working directory where it lies below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
