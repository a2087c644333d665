"""One page about an adapted run: how well it does its task, what it gets wrong, and how to do the same again.

It is made of tune.json, evaluations.json, metrics.jsonl and predictions-test.jsonl of the run folder, and of the
samples of the test shards, so that it needs no model: neighbors and class names have no checkpoint.
"""

from __future__ import annotations

import datetime
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import __version__
from ..corpus.fields import parse_map
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..corpus.storage import write_atomic
from ..errors import SampleError, UserError
from ..run_dir import checkpoint, evaluations, predictions, trust
from ..run_dir.records import Skipped, read_jsonl
from ..tokenizers import audio, image, text
from . import page

FILE = "tune.json"
SHOWN = 12  # mistakes
MAX_CLASSES = 20  # that a matrix shows; of more the largest confusions are listed
BINS = 10  # of confidence, in the calibration plot
CONTEXT = 160  # characters around the answers, of a long text
TEXT = 600  # characters of other texts
PICTURE, SOUND = 12_000, 60_000  # bytes, from which on they are reduced
WORSE = {"mae", "loss", "bits_per_token", "ece", "aurc", "median_rank"}  # figures of which less is better
READERS = {"image": image.Tokenizer.extensions, "audio": audio.Tokenizer.extensions}


def write(run: str | Path, trusted: bool = False) -> Path:
    """Write RUN/report.html. Raises UserError where RUN is not the folder of a finished tune.

    The samples of the test shards are shown where the run is the user's own, or `trusted`.
    """
    run = Path(run)
    about = read(run)
    rows, notes = predictions.read(run).get("test", []), []
    samples: list[Found | None] = [None] * len(rows)
    try:
        samples = find_samples(run, rows, trusted)
    except UserError as error:
        notes.append(f"The samples themselves are not shown: {error}.")
    html = page.template("tune.html").render(**_values(run, about, rows, samples, notes))
    path = run / "report.html"
    write_atomic(path, html.encode("utf-8", "replace"))
    return path


def read(run: Path) -> dict:
    """What RUN/tune.json says. Raises UserError."""
    file = run / FILE
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}: the tune has not finished; `mmfm tune` with --resume ends it"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: is no JSON ({error})") from None
    if not isinstance(about, dict) or not all(name in about for name in ("task", "how", "metric", "data")):
        raise UserError(f"{file}: is not what `mmfm tune` writes")
    return about


Found = tuple[Corpus, int]


def find_samples(run: Path, rows: list[dict], trusted: bool = False) -> list[Found | None]:
    """The corpus and number of each prediction's sample; None where its key is gone. Raises UserError."""
    shards = evaluations.read(run).get("test", {}).get("on") or []
    if not shards or not rows:
        return [None] * len(rows)
    if not trusted and not _is_own(run):
        raise UserError(f"{run} was not tuned here by you; --trust reads the shards that it names")
    corpus = Corpus(Source(shards), "test", write_index=False)
    found: list[Found | None] = []
    places: dict[str, list[int]] = {}
    for number in reversed(range(len(corpus))):
        places.setdefault(corpus.key(number), []).append(number)
    for row in rows:  # in the order of the corpus: of equal keys the first comes first
        left = places.get(row["key"])
        found.append((corpus, left.pop()) if left else None)
    return found


def _is_own(run: Path) -> bool:
    """Whether this user's tune wrote the run: its tune.json is signed, or its checkpoint."""
    if trust.is_own(run, FILE):
        return True
    try:
        return trust.is_own(checkpoint.newest(run), checkpoint.MANIFEST)
    except UserError:
        return False


def _values(run: Path, about: dict, rows: list[dict], samples: list[Found | None], notes: list[str]) -> dict:
    """All that the template shows."""
    entries, kind = evaluations.read(run), about["metric"].partition("/")[0]
    test, validation = (entries.get(part, {}).get("figures", {}) for part in ("test", "validation"))
    test = test or about.get("test", {})
    for part in ("test", "validation"):
        notes += [f"{part}: {note}" for note in entries.get(part, {}).get("notes", [])]
    metric = test.get(about["metric"])
    pairs = list(label_pairs(kind, rows))
    classes = order_classes(pairs)
    counts = about["data"].get("counts", {})
    if rows and counts.get("test", 0) > len(rows):
        notes.append(f"{counts['test'] - len(rows):,} of {counts['test']:,} test samples could not be read.")
    config = _config(run)
    return {
        "name": run.resolve().name,
        "about": about,
        "kind": kind,
        "metric": {"name": title_of(about["metric"]), **metric} if metric else None,
        "facts": facts(about),
        "figures": figure_rows(test, validation),
        "curves": curves(run, about),
        "pairs": len(pairs),
        "unit": "words" if kind == "tag" else "samples",
        "classes": classes,
        "matrix": matrix(pairs, classes) if 1 < len(classes) <= MAX_CLASSES else [],
        "confusions": confusions(pairs),
        "by_class": by_class(kind, rows, pairs),
        "calibration": calibration(kind, rows),
        "scatter": scatter(kind, rows),
        "mistakes": mistakes(about, kind, rows, samples),
        "tags": {tag: tag_color(tag) for tag in classes if tag != "O"} if kind == "tag" else {},
        "skipped": Skipped(_whole(read_jsonl(run / "quarantine.jsonl"))).lines(),
        "notes": notes,
        "command": command(run, about),
        "tries": tries(run, about, kind),
        "yaml": config,
    }


def _whole(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row.keys() >= {"source", "shard", "key", "part", "reason", "detail"}]


NAMES = {
    "ece": "expected calibration error",
    "aurc": "area under risk over coverage",
    "mae": "mean absolute error",
    "map": "mean average precision",
    "mcc": "Matthews' correlation",
    "r2": "R²",
    "selective_accuracy@80": "accuracy of the surest 80 %",
}


def title_of(figure: str) -> str:
    """The name of a figure in words."""
    if (name := figure.rpartition("/")[2]) in NAMES:
        return NAMES[name]
    return figure.partition("/")[2].replace("_", " ").replace("/", " ").replace("f1", "F1") or figure


def facts(about: dict) -> dict[str, str]:
    counts = about["data"].get("counts", {})
    shown = {
        "task": about["task"].replace("-", " "),
        "way of adapting": about["how"],
        "base": f"{about.get('base', '')} {str(about.get('base_hash', ''))[:12]}".strip(),
        "samples": ", ".join(f"{counts[part]:,} {part}" for part in ("train", "validation", "test") if part in counts),
    }
    if about.get("parameters") is not None:
        share = about.get("share_of_parameters", 0.0)
        shown["parameters trained"] = f"{about['parameters']:,} ({share:.2%})" if about["parameters"] else "none"
    if about.get("steps"):
        best = about.get("best_step")
        shown["steps"] = f"{about['steps']:,}" + (f", the best {best:,}" if best is not None else "")
    for name, label in (("k", "neighbors"), ("C", "regularization C"), ("fitted_on", "samples fitted on")):
        if name in about:
            shown[label] = f"{about[name]:,}" if isinstance(about[name], int) else f"{about[name]:g}"
    if about.get("adapter"):
        shown["adapter"] = f"{about['adapter']}, {format_bytes(about['adapter_bytes'])}"
    return shown | {
        "time": page.format_time(about.get("seconds", 0.0)),
        "seed": str(about.get("seed", 0)),
        "date": datetime.date.today().isoformat(),
        "version": f"multimodal_fm {__version__}",
    }


def format_bytes(count: float) -> str:
    for size, unit in ((1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def figure_rows(test: dict[str, dict], validation: dict[str, dict]) -> list[list[str]]:
    """A row for each figure, the header first; columns that nothing fills are left out."""
    rows = [["", "test", "95 % interval", "chance", "n", "validation", "95 % interval", "n"]]
    for name in dict.fromkeys([*test, *validation]):
        own, other = _cells(test.get(name)), _cells(validation.get(name))
        less = " (less is better)" if name.rpartition("/")[2] in WORSE else ""
        rows.append([title_of(name) + less, *own, *other[:2], other[3]])
    kept = [column for column in range(len(rows[0])) if not column or any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows] if rows[1:] else []


def _cells(figure: dict | None) -> list[str]:
    if figure is None:
        return [""] * 4
    chance = "" if figure.get("chance") is None else f"{figure['chance']:.3f}"
    return [f"{figure['value']:.3f}", f"{figure['low']:.3f} – {figure['high']:.3f}", chance, f"{figure['n']:,}"]


# Curves


def curves(run: Path, about: dict) -> list[dict]:
    """The loss of training, and the figure that the best step was chosen by, with that step marked."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if isinstance(row.get("step"), int)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    loss = next((name for name in names if name.startswith("loss/tune/") and not name.endswith("accuracy")), "loss")
    chosen = f"evaluate/validation/{about['metric']}"
    chosen = chosen if chosen in names else "validation/loss"
    shown = [(loss, "training loss")] if loss in names else []
    shown += [(chosen, f"validation {title_of(about['metric']) if '/' in chosen[11:] else 'loss'}")] * (chosen in names)
    best = about.get("best_step")
    return [_curve(number, title, name, rows, best) for number, (name, title) in enumerate(shown)]


def _curve(number: int, title: str, name: str, rows: list[dict], best: int | None) -> dict:
    last_step = max(row["step"] for row in rows)
    points = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), (int, float))]
    steps, values = np.array(points).T
    measured = name.startswith(("evaluate/", "validation/"))
    marked = [(step, value) for step, value in points if step == best] if measured else []

    def paint(axes) -> None:
        color = page.LINES[number]
        if measured:
            axes.plot(steps, values, "o-", color=color, linewidth=1.4, markersize=3)
        else:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, page.smooth(values), color=color, linewidth=1.6)
        if best is not None:
            axes.axvline(best, color=page.INK, linewidth=0.8, linestyle=":")
        for step, value in marked:
            axes.plot([step], [value], "o", color=page.LINES[2], markersize=7, markerfacecolor="none")
        axes.set_xlim(0, last_step * 1.02)
        page.mark_steps(axes)

    value = marked[-1][1] if marked else (values if measured else page.smooth(values))[-1]
    last = f"{page.format_number(value)} at {f'step {best:,}, the best' if marked else 'the end'}"
    return {"title": title, "last": last, "svg": page.plot(f"curve{number}", f"{title}: {last}", paint)}


# Classes


def label_pairs(kind: str, rows: list[dict]) -> Iterator[tuple[str, str]]:
    """The right class and the predicted one of each sample, or of each word that is tagged."""
    for row in rows:
        label: Any = row.get("label")
        said: Any = row.get("predicted")
        if kind == "classify" and not isinstance(label, list):
            yield str(label), str(said)
        elif kind == "tag":
            said = list(map(str, said or [])) + ["O"] * len(label)  # words beyond what the model reads have no tag
            yield from zip(map(str, label), said)


def order_classes(pairs: list[tuple[str, str]]) -> list[str]:
    """Those that occur or were predicted; numbers in their order."""
    found = {one for pair in pairs for one in pair}
    return sorted(found, key=lambda name: (int(name) if name.isdecimal() else -1, name))


def matrix(pairs: list[tuple[str, str]], classes: list[str]) -> list[dict]:
    """A row for each right class: how many of it were told as which, and their shares of the row."""
    counts = Counter(pairs)
    totals = Counter(label for label, _ in pairs)
    rows = []
    for label in classes:
        cells = [(counts[label, said], counts[label, said] / max(1, totals[label]), said == label) for said in classes]
        rows.append({"label": label, "count": totals[label], "cells": cells})
    return rows


def confusions(pairs: list[tuple[str, str]]) -> list[tuple[str, str, int, float]]:
    """The right class, the predicted one, how often, and the share of the right class; the most frequent first."""
    totals = Counter(label for label, _ in pairs)
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    order = sorted(wrong, key=lambda pair: (-wrong[pair], pair))
    most = 5 if len(totals) <= MAX_CLASSES else 20
    return [(label, said, wrong[label, said], wrong[label, said] / totals[label]) for label, said in order[:most]]


def by_class(kind: str, rows: list[dict], pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Precision, recall and F1 of each class, the worst first; of samples with several classes too."""
    hits: Counter[str] = Counter()
    true: Counter[str] = Counter()
    said: Counter[str] = Counter()
    sets = [({label}, {guess}) for label, guess in pairs]
    if kind == "classify" and not pairs:
        sets = [(set(map(str, row["label"])), set(map(str, row["predicted"]))) for row in rows]
    for label, guess in sets:
        hits.update(label & guess)
        true.update(label)
        said.update(guess)
    scored = [(2 * hits[c] / max(1, true[c] + said[c]), c) for c in order_classes([(c, c) for c in {*true, *said}])]
    header = ["class", "F1", "precision", "recall", "right", "predicted"]
    cells = [
        [c, f"{f1:.3f}", _share(hits[c], said[c]), _share(hits[c], true[c]), f"{true[c]:,}", f"{said[c]:,}"]
        for f1, c in sorted(scored, key=lambda pair: pair[0])
    ]
    return [header, *cells] if cells else []


def _share(count: int, of: int) -> str:
    return f"{count / of:.3f}" if of else ""


def calibration(kind: str, rows: list[dict]) -> dict | None:
    """Accuracy over confidence, with how many samples there are of each."""
    told = [(row["confidence"], row["score"]) for row in rows if isinstance(row.get("confidence"), (int, float))]
    if kind != "classify" or not told:
        return None
    confidence, right = np.array(told, dtype=float).T
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    held = counts > 0
    means = [np.bincount(bins, weights=values, minlength=BINS)[held] / counts[held] for values in (confidence, right)]
    centers = (np.arange(BINS) + 0.5) / BINS

    def paint(axes, below) -> None:
        axes.plot([0, 1], [0, 1], ":", color=page.INK, linewidth=0.8)
        axes.plot(*means, "o-", color=page.LINES[0], linewidth=1.4, markersize=4)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy")
        below.bar(centers, counts, 0.9 / BINS, color=page.LINES[0], alpha=0.5)
        below.set_ylabel("samples")
        below.set_xlabel("confidence")
        below.set_xlim(0, 1)

    said = f"mean confidence {confidence.mean():.3f}, accuracy {right.mean():.3f}"
    svg = page.plot("calibration", f"accuracy over confidence: {said}", paint, (3.7, 3.2), (3, 1))
    return {"svg": svg, "said": said}


def scatter(kind: str, rows: list[dict]) -> dict | None:
    """The predicted number over the right one, of a regression."""
    if kind != "regress" or not rows:
        return None
    right, said = (np.array([float(row[name]) for row in rows]) for name in ("label", "predicted"))
    ends = [min(right.min(), said.min()), max(right.max(), said.max())]

    def paint(axes) -> None:
        axes.plot(ends, ends, ":", color=page.INK, linewidth=0.8)
        axes.plot(right, said, "o", color=page.LINES[0], alpha=0.4, markersize=4, markeredgewidth=0)
        axes.set_xlabel("right")
        axes.set_ylabel("predicted")

    error = f"mean absolute error {page.format_number(float(np.abs(right - said).mean()))}"
    return {"svg": page.plot("scatter", f"predicted over right numbers: {error}", paint, (3.7, 3.2)), "said": error}


# Mistakes


def mistakes(about: dict, kind: str, rows: list[dict], samples: list[Found | None]) -> list[dict]:
    """The worst: wrong at the highest confidence, or with the lowest score; with what the sample holds."""
    wrong = [i for i, row in enumerate(rows) if row["score"] < 1 and (kind != "regress" or row["score"] < 0)]

    def order(i: int) -> tuple:
        confidence = rows[i].get("confidence")
        worth = confidence if isinstance(confidence, (int, float)) else 0.0
        return (-worth, i) if kind == "classify" and worth else (rows[i]["score"], -worth, i)

    media = page.Media(PICTURE, SOUND)
    return [_mistake(about, kind, rows[i], samples[i], media) for i in sorted(wrong, key=order)[:SHOWN]]


def _mistake(about: dict, kind: str, row: dict, found: Found | None, media: page.Media) -> dict:
    label, said = (_words_of(row.get(name)) for name in ("label", "predicted"))
    shown: dict[str, Any] = {"key": row["key"], "label": label, "predicted": said, "said": _confidence(kind, row)}
    shown |= {"pictures": [], "sounds": [], "parts": [], "words": []}
    if found is None:
        return shown
    corpus, number = found
    raw, modalities = corpus.raw(number), about["data"].get("modalities") or ["image", "audio", "text"]
    for modality, name in (("image", "pictures"), ("audio", "sounds")):
        members = {ending: raw[ending] for ending in READERS[modality] if ending in raw}
        if members and modality in modalities:
            try:
                shown[name].append(media.uri(modality, READERS[modality], members))
            except (SampleError, OSError, ValueError, RuntimeError):  # soundfile's errors are RuntimeErrors
                shown[name].append("")
    if "text" in modalities:
        try:
            words = text.Tokenizer(text.Config(fields=["txt", "text"])).describe(raw) or ""
        except SampleError:
            words = ""
        if kind == "tag":
            shown["words"] = tagged_words(words, parse_map(raw.get("json")), row)
        elif kind == "span":
            shown["parts"] = marked_answers(words, parse_map(raw.get("json")).get("answer"), row)
        else:
            shown["parts"] = [(words[:TEXT] + "…" * (len(words) > TEXT), "")]
    return shown


def _words_of(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return page.format_number(value)
    return "no answer" if value in (None, "") else str(value)


def _confidence(kind: str, row: dict) -> str:
    if kind == "classify" and isinstance(row.get("confidence"), (int, float)):
        return f"confidence {row['confidence']:.3f}"
    if kind == "regress":
        return f"off by {page.format_number(-row['score'])}"
    name = {"tag": "share of right tags", "span": "F1", "classify": "F1"}[kind]
    return f"{name} {row['score']:.2f}"


def tagged_words(words: str, fields: dict, row: dict) -> list[dict]:
    """Each word with its predicted and its right tag, and the color of the former."""
    listed: Any = fields.get("words")
    listed = listed if isinstance(listed, list) else words.split(" ")
    said = [*map(str, row["predicted"]), *["O"] * len(row["label"])]
    return [
        {
            "word": str(word),
            "said": guess,
            "right": str(right),
            "color": tag_color(guess),
            "other": tag_color(str(right)),
        }
        for word, right, guess in zip(listed, row["label"], said)
    ]


def tag_color(tag: str) -> int | None:
    """The hue of a tag: one for B- and I- of a type, none for O."""
    kind = tag.partition("-")[2] if tag[:2] in ("B-", "I-") else tag
    return None if tag == "O" else sum(ord(c) * 37 for c in kind) * 61 % 360


def marked_answers(words: str, answer: Any, row: dict) -> list[tuple[str, str]]:
    """The text in pieces, each with a class of the page: `right`, `said`, `both`, or none."""
    begin = words.find("\n") + 1  # of the context
    spans = {"right": (0, 0), "said": (0, 0)}
    if isinstance(answer, dict) and all(isinstance(answer.get(name), int) for name in ("start", "end")):
        spans["right"] = (answer["start"], answer["end"])
    if said := row.get("predicted"):
        at = (
            spans["right"][0]
            if words.startswith(said, spans["right"][0]) and row.get("label")
            else words.find(said, begin)
        )
        at = at if at >= 0 else words.find(said)
        spans["said"] = (at, at + len(said)) if at >= 0 else (0, 0)
    held = [span for span in spans.values() if span[1] > span[0]]
    first = max(begin, min((start for start, _ in held), default=begin) - CONTEXT)
    last = min(len(words), max((end for _, end in held), default=begin + CONTEXT) + CONTEXT)
    edges = sorted({first, last, *(edge for span in held for edge in span if first <= edge <= last)})
    pieces = [(words[:begin], "question"), ("…", "")] if first > begin else [(words[:begin], "question")]
    for start, end in zip(edges, edges[1:]):
        inside = [name for name, span in spans.items() if span[0] <= start and end <= span[1]]
        pieces.append((words[start:end], "both" if len(inside) == 2 else "".join(inside)))
    return [*pieces, ("…", "")] if last < len(words) else pieces


# How to do the same again


def command(run: Path, about: dict) -> str:
    """The command line that does the same into another folder; empty for a model that was given in memory."""
    if about.get("base") == "a model in memory":
        return ""
    given = about.get("arguments", {})
    words = [str(about.get("base", "")), "--task", about["task"], "--how", about["how"]]
    for name, values in (
        ("data", about["data"].get("given", [])),
        *((n, given.get(n)) for n in ("validation", "test")),
    ):
        words += [f"--{name}", *map(str, values)] if values else []
    for name, value in given.items():
        if value and name not in ("validation", "test", "overrides"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--seed", str(about.get("seed", 0)), *map(str, given.get("overrides", [])), f"run_dir={run}-again"]
    return f"{page.program()} tune {' '.join(map(shlex.quote, words))}"


def tries(run: Path, about: dict, kind: str) -> list[str]:
    """Lines of Python that use what was learned."""
    if not (run / "checkpoints").is_dir():
        return []
    lines = [f"model = multimodal_fm.load({str(run)!r})"]
    if about.get("adapter") and about.get("base") not in ("none", "a model in memory"):
        lines.append(f"model = multimodal_fm.load({about['base']!r}, adapter={about['adapter']!r})  # the same")
    if kind == "classify" and len(about["data"].get("modalities", [])) == 1:
        lines.append(
            "model.classify([...])  # "
            + {"image": "pictures", "audio": "sounds", "text": "texts"}.get(about["data"]["modalities"][0], "inputs")
        )
    return lines


def _config(run: Path) -> str:
    """The configuration of the run's checkpoint; empty where there is none."""
    try:
        data = checkpoint.read_data(checkpoint.newest(run), "config")
    except UserError:
        return ""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
