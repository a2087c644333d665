"""One checkpoint, adapted to vision, sound, language and retrieval, against random weights and plain floors.

    python -m data.small FOLDER && mmfm pretrain configs/small.yaml
    python benchmarks/adapt.py runs/small                      # all cells that are not in adapt.json yet, then adapt.md
    python benchmarks/adapt.py runs/small --only cifar10/full  # one cell; --only cifar10: those of a task
    python benchmarks/adapt.py runs/small --forgetting         # what a tune forgets, and what rehearsal keeps

A cell is a task and a way. Each is kept as soon as it is done, so that a stopped run goes on. Budgets are steps of a
task, equal for the checkpoint and for random weights; checkpoints are chosen on a part of the training data.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import first_line, markdown

import multimodal_fm as mmfm
from multimodal_fm import objectives
from multimodal_fm.corpus import shards
from multimodal_fm.evals import compare
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.metrics import estimate, estimate_difference
from multimodal_fm.evals.run import evaluate
from multimodal_fm.lora import base_hash
from multimodal_fm.model import load
from multimodal_fm.run_dir import checkpoint, evaluations, predictions

ROOT = Path(__file__).parents[1]
SHARDS = ROOT / "data/small/shards"


@dataclass(frozen=True)
class Task:
    """What is learned, and by how much work."""

    task: str  # of `mmfm tune`
    train: str  # shards, below the folder of the data
    tests: dict[str, str]  # by name of the row, the shards of a test part
    steps: int
    validation: str = ""  # shards; empty: a tenth of `train` is split off
    batch_size: int = 32
    label: str = "label"
    floor: str = ""  # the plain way: pixels, sounds or words; empty: there is none but chance
    published: dict[str, tuple[float, str]] = field(default_factory=dict)  # by row: a floor measured elsewhere, and how
    overrides: tuple[str, ...] = ()  # of the tunes with gradients


FLIP = "sources.train.augment={image: {hflip: 0.5}}"
TASKS = {
    "cifar10": Task(
        "image-classification",
        "subsets/cifar10-train.tar",
        {"cifar10": "subsets/cifar10-test.tar"},
        400,
        validation="subsets/cifar10-validation.tar",
        overrides=(FLIP,),
        floor="pixels",
        published={"cifar10": (0.393, "16x16 pixels and logistic regression, 10,000 to train, the official test part")},
    ),
    "esc10": Task(
        "audio-classification",
        "esc10/train-*.tar",
        {"esc10": "esc10/test-*.tar"},
        250,
        floor="sounds",
        published={"esc10": (0.875, "log-mel statistics and SVM, folds 1 to 4 to train, fold 5 to test")},
    ),
    "digits": Task(
        "audio-classification",
        "digits/train-*.tar",
        {"digits": "digits/test-*.tar", "digits, new speaker": "digits/speaker-*.tar"},
        400,
        floor="sounds",
        published={
            "digits": (0.983, "log-mel statistics and SVM, takes 5 to 49 to train, takes 0 to 4 to test"),
            "digits, new speaker": (0.674, "log-mel statistics and SVM, mean of six speakers left out"),
        },
    ),
    "sst2": Task(
        "text-classification",
        "sst2/train-*.jsonl",
        {"sst2": "sst2/test-*.jsonl"},
        400,
        floor="words",
        published={"sst2": (0.802, "tf-idf and a linear classifier, the official test part")},
    ),
    "trec": Task(
        "text-classification",
        "trec/train-*.jsonl",
        {"trec": "trec/test-*.jsonl"},
        400,
        floor="words",
        published={"trec": (0.890, "tf-idf and a linear classifier, the official test part")},
    ),
    "flickr8k": Task(
        "retrieval",
        "flickr8k/train-*.tar",
        {
            "flickr8k, text to image": "flickr8k/validation-*.tar",
            "flickr8k, image to text": "flickr8k/validation-*.tar",
        },
        200,
        label="",
        # The checkpoint knows the pictures that it was pretrained on by heart: they cannot tell which step is the best.
        overrides=(FLIP, "best=''", "evaluate_every=0"),
    ),
    "pairs": Task(
        "pair-classification",
        "subsets/pairs-train.tar",
        {"pairs": "subsets/pairs-test.tar"},
        400,
        overrides=(FLIP,),
    ),
}
SUBSETS = {"cifar10-train": 10_000, "cifar10-validation": 500, "cifar10-test": 2_000}  # the first so many of the part
DIRECTIONS = {"flickr8k, text to image": "text_to_image", "flickr8k, image to text": "image_to_text"}


@dataclass(frozen=True)
class Way:
    how: str  # of `mmfm tune`; `floor`: without our model; `as it is`: without tuning
    random: bool = False  # from random weights
    overrides: tuple[str, ...] = ()
    remedy: bool = False  # only where it is asked for by name


WAYS = {
    "floor": Way("floor"),
    "untuned": Way("as it is"),
    "random probe": Way("probe", random=True),
    "random full": Way("full", random=True),
    "knn": Way("knn"),
    "probe": Way("probe"),
    "lora": Way("lora"),
    "full": Way("full"),
}
SLOW = ("optim.lr=0.0005",)  # a quarter of the rate
MUON = ("optim.name=muon", "optim.muon_lr=0.005")  # the optimizer of the pretraining
WAYS |= {
    "slow full": Way("full", overrides=(*SLOW, "optim.layer_decay=0.8"), remedy=True),
    "random slow full": Way("full", random=True, overrides=SLOW, remedy=True),
    "muon full": Way("full", overrides=MUON, remedy=True),
    "random muon full": Way("full", random=True, overrides=MUON, remedy=True),
}


def cells(only: list[str]) -> Iterator[tuple[str, str]]:
    """The tasks and ways that there are, of those that are asked for: TASK or TASK/WAY."""
    for name, task in TASKS.items():
        for way, settings in WAYS.items():
            fits = {"floor": bool(task.floor), "as it is": task.task == "retrieval"}.get(
                settings.how, task.task != "retrieval" or settings.how in ("full", "lora")
            )
            asked = f"{name}/{way}" in only or (not settings.remedy and (not only or name in only))
            if fits and asked:
                yield name, way


# ----------------------------------------------------------------------------------------------------------------- data


def make_subsets(data: Path, work: Path, quick: bool) -> None:
    """The parts of CIFAR-10 that are read, and pictures of Flickr8k with their own captions or those of others."""
    folder = work / "subsets"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in SUBSETS.items():
        part = mmfm.samples(str(data / f"{name.replace('-', '/')}-*.tar"))
        _write(folder / f"{name}.tar", (s for _, s in zip(range(count // 50 if quick else count), part)))
    for name, part in {"train": "train", "test": "validation"}.items():
        _write(folder / f"pairs-{name}.tar", match_captions(str(data / f"flickr8k/{part}-*.tar"), 40 if quick else 0))


def _write(file: Path, samples: Iterator[dict]) -> None:
    if not file.exists():
        shards.write(part := file.with_suffix(".part"), samples)
        part.rename(file)


def match_captions(pattern: str, most: int = 0) -> Iterator[dict]:
    """Each picture with each of its captions; every second caption is one of the picture half the part further on.

    Each caption occurs once, so that none gives its label away.
    """
    found = list(mmfm.samples(pattern))[: most or None]
    captions = [(n, text) for n, sample in enumerate(found) for text in json.loads(sample["json"])["captions_en"]]
    swapped = range(0, len(captions), 2)
    given = dict(zip(swapped, np.roll(swapped, len(swapped) // 2).tolist()))
    for number, (owner, _) in enumerate(captions):
        label = "swapped" if number in given else "matched"
        text = captions[given.get(number, number)][1]
        key = f"{found[owner]['__key__']}-{number}"
        yield {"__key__": key, "jpg": found[owner]["jpg"], "txt": text, "json": {"label": label}}


@dataclass
class Bench:
    """The run that is adapted, where things are, and how much is done."""

    run: str
    data: Path
    work: Path
    file: Path
    quick: bool

    def __post_init__(self):
        self.checkpoint = checkpoint.newest(self.run)
        self.hash = base_hash(checkpoint.read_tensors(self.checkpoint, "ema"))
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.results.setdefault("cells", {})

    def path(self, pattern: str) -> str:
        return str((self.work if pattern.startswith("subsets/") else self.data) / pattern)

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        part.rename(self.file)

    def steps(self, task: Task) -> int:
        return 6 if self.quick else task.steps


# ---------------------------------------------------------------------------------------------------------------- cells


def run_cell(bench: Bench, name: str, way_name: str, rehearsal: float = 0.0, more: tuple[str, ...] = ()) -> dict:
    """Adapt and measure; the scores of each sample go to the cell's folder, and the rest is returned."""
    task, way = TASKS[name], WAYS[way_name]
    folder = bench.work / f"{name}-{way_name}{f'-rehearsal-{rehearsal}' if rehearsal else ''}".replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    cell: dict[str, Any] = {}
    if way.how == "floor":
        scores = measure_floor(bench, task)
    elif way.how == "as it is":
        folder.mkdir(parents=True)
        scores = measure_retrieval(bench, task, bench.checkpoint)
    else:
        steps, every = bench.steps(task), max(1, bench.steps(task) // (2 if bench.quick else 4))
        overrides = [
            f"steps={steps}", f"tasks.tune.batch_size={task.batch_size}", f"optim.warmup_steps={max(1, steps // 10)}",
            f"ema_decay={min(0.999, max(0.9, 1 - 10 / steps))}", f"save_every={every}", f"evaluate_every={every}",
        ]  # fmt: skip
        kwargs: dict[str, Any] = {"label": task.label, "rehearsal": rehearsal}
        if way.random:
            kwargs["like"] = bench.run
        result = mmfm.tune(
            "none" if way.random else bench.run,
            bench.path(task.train),
            task.task,
            way.how,
            [bench.path(task.validation)] if task.validation else [],
            [bench.path(pattern) for pattern in dict.fromkeys(task.tests.values())],
            str(folder),
            [*overrides, *task.overrides, *way.overrides, *more],
            **kwargs,
        )
        kept = ("parameters", "share_of_parameters", "best_step", "adapter_bytes", "k", "C")
        cell = {key: result[key] for key in kept if result.get(key) is not None}
        if "steps" in result:
            cell |= {"steps": result["steps"], "batch_size": task.batch_size}
            cell["overrides"] = [*task.overrides, *way.overrides]
        cell["train"] = result["data"]["counts"]["train"]
        chosen_on = evaluations.read(folder).get("validation", {}).get("figures", {}).get(result["metric"])
        if chosen_on:
            cell["validation"] = chosen_on["value"]
        scores = (
            measure_retrieval(bench, task, folder) if task.task == "retrieval" else read_scores(bench, task, folder)
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    cell["rows"] = {
        row: estimate(np.array(s["scores"]), np.array(s["clusters"]), s["chance"]) for row, s in scores.items()
    }
    return {"seconds": time.monotonic() - began, **cell, "base": "none" if way.random else bench.hash}


def read_scores(bench: Bench, task: Task, folder: Path) -> dict[str, dict]:
    """By row: right (1) or wrong (0) for each sample of the test part, and what the bootstrap draws together."""
    rows = {row["key"]: row for row in predictions.read(folder)["test"]}
    found = {}
    for name, pattern in task.tests.items():
        keys = [sample["__key__"] for sample in mmfm.samples(bench.path(pattern))]
        keys = [key for key in keys if key in rows]
        labels = Counter(rows[key]["label"] for key in keys)
        found[name] = {
            "scores": [rows[key]["score"] for key in keys],
            "clusters": [key.rpartition("-")[0] if task.task == "pair-classification" else key for key in keys],
            "chance": max(labels.values()) / len(keys),
        }
    return found


def measure_retrieval(bench: Bench, task: Task, run: Path) -> dict[str, dict]:
    """By row: whether one of the first ten is right, for each query."""
    model, found = load(run), {}
    evaluation = Evaluation(bench.path(next(iter(task.tests.values()))), modalities=["text", "image"])
    _, embedded = evaluate(model, {}, dataclasses.replace(evaluation, measure=["retrieval"]))
    for row in task.tests:
        scores = embedded.scores[f"retrieval/{DIRECTIONS[row]}/r@10"]
        columns = {"scores": scores.values.tolist(), "clusters": scores.clusters.tolist()}
        found[row] = columns | {"chance": float(scores.chances.mean())}
    return found


def measure_floor(bench: Bench, task: Task) -> dict[str, dict]:
    """The plain way without pretraining, on the very same parts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    from sklearn.svm import SVC

    read, classifier = {
        "pixels": (shrink_pixels, make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))),
        "sounds": (summarize_sound, make_pipeline(StandardScaler(), SVC(C=10.0))),
        "words": (
            lambda sample: json.loads(sample["json"])["text"],
            make_pipeline(
                FunctionTransformer(),
                TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                LogisticRegression(C=10.0),
            ),
        ),
    }[task.floor]

    def part(pattern: str) -> tuple[Any, list[str], list[str]]:
        samples = list(mmfm.samples(bench.path(pattern)))
        features = [read(sample) for sample in samples]
        labels = [str(json.loads(sample["json"])[task.label]) for sample in samples]
        return features, labels, [sample["__key__"] for sample in samples]

    features, labels, _ = part(task.train)
    classifier.fit(features, labels)
    found = {}
    for name, pattern in task.tests.items():
        features, labels, keys = part(pattern)
        right = [float(said == label) for said, label in zip(classifier.predict(features), labels)]
        found[name] = {"scores": right, "clusters": keys, "chance": max(Counter(labels).values()) / len(labels)}
    return found


def shrink_pixels(sample: dict) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB").resize((16, 16)), float).ravel() / 255


def summarize_sound(sample: dict) -> np.ndarray:
    """Mean, deviation, least and most over time of 64 log-mel bands."""
    import soundfile
    import torchaudio

    raw = next(sample[name] for name in ("flac", "ogg", "wav") if name in sample)
    wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    wave = torchaudio.functional.resample(torch.from_numpy(wave).mean(1), rate, 16_000)
    mel = _mel()(wave).clamp(min=1e-8).log().numpy()
    return np.concatenate([mel.mean(1), mel.std(1), mel.min(1), mel.max(1)])


def _mel() -> Callable:
    import torchaudio

    return torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, n_mels=64, f_min=20.0
    )


# ----------------------------------------------------------------------------------------------------------- forgetting


FORGETTING = {"sst2": "text", "cifar10": "image"}  # the tune, and the modality that it is for
SHARES = (0.25, 0.5)  # of the base's tasks that go on in every step


def suite(bench: Bench) -> dict[str, Evaluation]:
    """What the base can do, by modality."""

    def on(pattern: str, *modalities: str, **settings) -> Evaluation:
        return Evaluation(bench.path(pattern), modalities=list(modalities), **settings)

    return {
        "flickr8k": on("flickr8k/validation-*.tar", "text", "image", measure=["retrieval"]),
        "stamps": on("tuxpaint/validation-*.tar", "text", "image", measure=["retrieval"]),
        "spoken": on("tuxtri/validation-*.tar", "text", "audio", measure=["retrieval"], within="original_data.lang"),
        "texts": on("texts/validation-*.jsonl", "text", measure=["bits_per_byte"]),
        "cifar10": on("subsets/cifar10-test.tar", "image", measure=["knn"], labels="label"),
        "esc10": on("esc10/*.tar", "audio", measure=["knn"], labels="label"),
    }


def measure_suite(bench: Bench, run: Path, to: Path) -> None:
    """Write the figures of the suite to `to`. Readouts that the run has no longer are the base's own, and every run
    reads the texts that the base reads."""
    base, model = load(bench.checkpoint), load(run)
    model.tokenizers.update({modality: base.tokenizers[modality] for modality in base.tokenizers})
    trained = objectives.load(bench.checkpoint, model)
    own = objectives.load(run, model)
    trained |= {name.removeprefix("base-"): objective for name, objective in own.items()}
    to.mkdir(parents=True, exist_ok=True)
    for name, evaluation in suite(bench).items():
        figures, embedded = evaluate(model, trained, evaluation)
        entry = {"on": [evaluation.on], "step": 0, "seed": 0, "figures": figures, "notes": embedded.notes}
        evaluations.write(to, name, entry)


def run_forgetting(bench: Bench) -> None:
    """The suite of the base, and of each tune without and with rehearsal."""
    done = bench.results.setdefault("forgetting", {})
    base = bench.work / "forgetting" / f"base-{bench.hash[:8]}"
    if not base.exists():
        began = time.monotonic()
        measure_suite(bench, bench.checkpoint, part := base.with_suffix(".part"))
        part.rename(base)
        print(f"the base: {time.monotonic() - began:.0f} s", flush=True)
    # A tune on labels reads `txt` and `text` alone; rehearsal is to read what the base read.
    fields = checkpoint.read_data(bench.checkpoint, "config")["model"]["tokenizers"]["text"].get("fields")
    for name, modality in FORGETTING.items():
        for share in (0.0, *SHARES):
            key = f"{name}, rehearsal {share:g}"
            if done.get(key, {}).get("base") == bench.hash and done[key]["steps"] == bench.steps(TASKS[name]):
                continue
            more = (f"model.tokenizers.text.fields={json.dumps(fields)}",) if share and fields else ()
            if share:
                cell = run_cell(bench, name, "full", share, more)
            else:
                if not is_done(bench, name, "full"):
                    keep_cell(bench, name, "full")
                cell = bench.results["cells"][f"{name}/full"]
            suffix = f"-rehearsal-{share}" if share else ""
            to = bench.work / "forgetting" / f"{name}{suffix}"
            shutil.rmtree(to, ignore_errors=True)
            measure_suite(bench, bench.work / f"{name}-full{suffix}", to)
            found = compare.measure_forgetting(base, to)
            rows = [
                {k: v for k, v in row.items() if k != "modalities"} | {"of": row["modalities"]} for row in found["rows"]
            ]
            others = [row["lost"] for row in rows if modality not in row["of"] and row["lost"] is not None]
            done[key] = {
                "base": bench.hash,
                "steps": cell["steps"],
                "seconds": cell["seconds"],
                "score": cell["rows"][name],
                "rows": rows,
                "modalities": found["modalities"],
                "lost": float(np.mean([row["lost"] for row in rows if row["lost"] is not None])),
                "lost by others": float(np.mean(others)),
            }
            bench.save()
            print(f"{key}: {cell['rows'][name]['value']:.3f}, lost {done[key]['lost']:+.0%}", flush=True)


# --------------------------------------------------------------------------------------------------------------- report


def compare_cells(bench: Bench) -> None:
    """Paired differences of the ways of a row, in `results`; those whose scores are no longer there are kept."""
    found = bench.results.setdefault("differences", {})
    for name, task in TASKS.items():
        scores = {way: bench.work / f"{name}-{way}".replace(" ", "-") / "scores.json" for way in WAYS}
        read = {
            way: json.loads(file.read_text())
            for way, file in scores.items()
            if file.exists() and is_done(bench, name, way)
        }
        own = [way for way in WAYS if way in read and not WAYS[way].random and way != "floor"]
        pairs = [(way, before) for way in own for before in (f"random {way}", "floor", "untuned")]
        for after, before in [*pairs, ("lora", "random full"), ("lora", "full")]:
            for row in task.tests if after in read and before in read else ():
                a, b = read[before][row], read[after][row]
                if a["clusters"] != b["clusters"]:
                    print(f"{row}: {after} and {before} are of other samples, and are not compared", file=sys.stderr)
                    continue
                found.setdefault(row, {})[f"{after} - {before}"] = estimate_difference(
                    a["scores"], b["scores"], np.unique(a["clusters"], return_inverse=True)[1]
                )


def is_done(bench: Bench, name: str, way: str) -> bool:
    """Whether the cell was measured for this checkpoint and this budget."""
    cell = bench.results["cells"].get(f"{name}/{way}", {})
    fits = cell.get("base") == ("none" if WAYS[way].random else bench.hash) or WAYS[way].how == "floor"
    budget = (bench.steps(TASKS[name]), [*TASKS[name].overrides, *WAYS[way].overrides])
    return "rows" in cell and fits and ("steps" not in cell or (cell["steps"], cell.get("overrides", [])) == budget)


def keep_cell(bench: Bench, name: str, way: str) -> None:
    cell = run_cell(bench, name, way)
    bench.results["cells"][f"{name}/{way}"] = cell
    bench.save()
    said = ", ".join(f"{row} {one['value']:.3f}" for row, one in cell["rows"].items())
    print(f"{name}/{way}: {said} ({cell['seconds']:.0f} s)", flush=True)


def best_way(bench: Bench, name: str) -> str:
    """The way with the best score on the validation part, of those that start from the checkpoint."""
    cells = {way: bench.results["cells"].get(f"{name}/{way}", {}) for way in WAYS if not WAYS[way].random}
    found = {way: cell["validation"] for way, cell in cells.items() if "validation" in cell}
    return max(found, key=lambda way: found[way]) if found else "full"


def tables(bench: Bench) -> dict[str, list[list]]:
    cells, differences = bench.results["cells"], bench.results.get("differences", {})
    ways = [way for way in WAYS if any(key.endswith(f"/{way}") for key in cells)]
    scores, verdicts = [["", "n", "chance", *ways]], [["", "pretraining above random weights", "above the floor"]]
    lora = [["", "parameters", "of the model", "adapter file", "lora", "full", "lora / full", "lora - full"]]
    for name, task in TASKS.items():
        best = best_way(bench, name)
        for row in task.tests:
            own = {way: cells[f"{name}/{way}"] for way in ways if f"{name}/{way}" in cells}
            if not own:
                continue
            figures = {way: cell["rows"][row] for way, cell in own.items()}
            first = next(iter(figures.values()))
            scores.append(
                [row, first["n"], f"{first['chance']:.3f}", *(_cell(figures.get(w), own.get(w)) for w in ways)]
            )
            found = differences.get(row, {})
            said = [_difference(found, f"{way} - random {way}") for way in WAYS]
            floors = [_difference(found, f"{way} - floor") for way in dict.fromkeys(("full", best))]
            if row in task.published and best in figures:
                value, how = task.published[row]
                above = "above" if figures[best]["value"] > value else "below"
                floors.append(f"{best} {figures[best]['value']:.3f} is {above} {value:.3f} ({how})")
            if not task.floor and best in figures:
                figure = figures[best]
                floors.append(f"chance {figure['chance']:.3f}: {'above' if figure['low'] > figure['chance'] else 'no'}")
            verdicts.append([row, "; ".join(filter(None, said)), "; ".join(filter(None, floors))])
            if {"lora", "full"} <= own.keys():
                a, b, cell = figures["lora"]["value"], figures["full"]["value"], own["lora"]
                size = f"{cell['adapter_bytes'] / 1024:.0f} KiB"
                learned, share = f"{cell['parameters']:,}", f"{cell['share_of_parameters']:.1%}"
                change = _difference(found, "lora - full")
                lora.append([row, learned, share, size, f"{a:.3f}", f"{b:.3f}", f"{a / b:.1%}", change])
    result = {"Scores, 95 % intervals, seconds": scores, "Verdicts": verdicts, "LoRA": lora}
    if forgetting := bench.results.get("forgetting"):
        result["Forgetting"] = forgetting_table(forgetting)
    return {title: rows for title, rows in result.items() if len(rows) > 1}


def _cell(figure: dict | None, cell: dict | None) -> str:
    if not figure or not cell:
        return ""
    return f"{figure['value']:.3f} ({figure['low']:.3f} – {figure['high']:.3f}), {cell['seconds']:.0f} s"


def _difference(found: dict, name: str) -> str:
    if name not in found:
        return ""
    one = found[name]
    verdict = "no difference" if one["low"] <= 0 <= one["high"] else "yes" if one["value"] > 0 else "no"
    return f"{name}: {one['value']:+.3f} ({one['low']:+.3f} – {one['high']:+.3f}), {verdict}"


def forgetting_table(forgetting: dict) -> list[list]:
    names = list(forgetting)
    rows = [["", "base", *names]]
    for number, row in enumerate(forgetting[names[0]]["rows"]):
        cells = [forgetting[name]["rows"][number] for name in names]
        rows.append([row["name"], f"{row['a']:.3f}", *(f"{c['b']:.3f}{_lost(c['lost'])}" for c in cells)])
    for modality in forgetting[names[0]]["modalities"]:
        lost = [forgetting[name]["modalities"][modality]["lost"] for name in names]
        rows.append([f"lost of {modality}", "", *("" if one is None else f"{one:+.0%}" for one in lost)])
    rows.append(
        ["lost, without figures of the tuned modality", "", *(f"{forgetting[n]['lost by others']:+.0%}" for n in names)]
    )
    rows.append(["lost, all", "", *(f"{forgetting[n]['lost']:+.0%}" for n in names)])
    rows.append(["score of the tune", "", *(f"{forgetting[n]['score']['value']:.3f}" for n in names)])
    rows.append(["seconds", "", *(f"{forgetting[n]['seconds']:.0f}" for n in names)])
    return rows


def _lost(lost: float | None) -> str:
    return "" if lost is None else f" ({lost:+.0%})"


def draw(bench: Bench, file: Path) -> None:
    """A dot and an interval for each row and way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = [way for way, settings in WAYS.items() if way != "untuned" and not settings.remedy]
    rows = [
        (name, row) for name, task in TASKS.items() for row in task.tests if f"{name}/full" in bench.results["cells"]
    ]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(rows)))
    for number, way in enumerate(ways):
        found = [
            (place, bench.results["cells"].get(f"{name}/{way}", {}).get("rows", {}).get(row))
            for place, (name, row) in enumerate(rows)
        ]
        found = [(place, one) for place, one in found if one]
        if not found:
            continue
        x = [one["value"] for _, one in found]
        spread = [[v - one["low"] for v, (_, one) in zip(x, found)], [one["high"] - v for v, (_, one) in zip(x, found)]]
        y = [-place + 0.3 - 0.6 * number / (len(ways) - 1) for place, _ in found]
        marker = "x" if way == "floor" else "o"
        axes.errorbar(x, y, xerr=spread, fmt=marker, markersize=4, linewidth=1, label=way)
    for place, (name, row) in enumerate(rows):
        chance = bench.results["cells"][f"{name}/full"]["rows"][row]["chance"]
        axes.plot([chance, chance], [-place - 0.35, -place + 0.35], color="gray", linewidth=1, linestyle=":")
    axes.set(yticks=[-place for place in range(len(rows))], yticklabels=[row for _, row in rows], xlim=(0, 1))
    axes.set_xlabel("accuracy, or recall at 10; dotted: chance")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def write_report(bench: Bench) -> None:
    compare_cells(bench)
    bench.save()
    about, seconds = bench.results["about"], sum(cell["seconds"] for cell in bench.results["cells"].values())
    lines = [
        "# One checkpoint, adapted",
        "",
        f"`python benchmarks/adapt.py {about['run']}`, step {about['step']} ({about['parameters']:,} parameters, "
        f"{about['hash'][:12]}), {about['threads']} threads of {about['machine']}, PyTorch {about['torch']}, "
        f"{seconds / 60:.0f} minutes for the cells of the first table. benchmarks/README.md says what is measured.",
        "",
    ]
    for title, rows in tables(bench).items():
        lines += [f"## {title}", "", markdown(rows), ""]
    bench.file.with_suffix(".md").write_text("\n".join(lines))
    draw(bench, bench.file.with_suffix(".svg"))
    print("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/small")
    parser.add_argument("--only", nargs="+", default=[], metavar="TASK or TASK/WAY")
    parser.add_argument("--forgetting", action="store_true", help="the matrix of forgetting, in place of the cells")
    parser.add_argument("--report", action="store_true", help="write adapt.md from adapt.json, and run nothing")
    parser.add_argument("--quick", action="store_true", help="six steps and little data: does it work at all?")
    parser.add_argument("--data", type=Path, default=SHARDS, help="what `python -m data.small` made")
    parser.add_argument("--work", type=Path, help="where the tuned runs go (runs/adapt)")
    parser.add_argument("--out", type=Path, help="the folder for adapt.json and adapt.md (benchmarks/results)")
    given = parser.parse_args()
    known = {*TASKS, *(f"{name}/{way}" for name in TASKS for way in WAYS)}
    if unknown := [name for name in given.only if name not in known]:
        parser.error(f"--only: there is no {unknown[0]}; there are {', '.join(sorted(known))}")
    work = given.work or Path("runs/adapt-quick" if given.quick else "runs/adapt")
    out = given.out or (work if given.quick else ROOT / "benchmarks/results")
    bench = Bench(given.run, given.data, work, out / "adapt.json", given.quick)
    model = load(bench.checkpoint)
    bench.results["about"] = {
        "run": given.run,
        "step": checkpoint.read_data(bench.checkpoint, "state")["step"],
        "hash": bench.hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "torch": torch.__version__,
        "subsets": SUBSETS,
    }
    failed = []
    if not given.report:
        make_subsets(given.data, work, given.quick)
    if given.forgetting and not given.report:
        run_forgetting(bench)
    for name, way in cells(given.only) if not given.forgetting and not given.report else ():
        if is_done(bench, name, way):
            continue
        try:
            keep_cell(bench, name, way)
        except Exception as error:  # the other cells go on
            failed.append(f"{name}/{way}: {first_line(error)}")
            print(failed[-1], file=sys.stderr, flush=True)
    write_report(bench)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
