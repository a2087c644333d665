"""Adapts a checkpoint to labeled data: the loop of pretraining with a head and an objective for it, or no loop at all.

`tune` is what `mmfm tune` calls. The run folder is one like any other, with the adapted model in its checkpoints, and
beside them tune.json, the figures of the test part in evaluations.json and what was said of each of its samples in
predictions-test.jsonl.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import lora, objectives
from ..config import apply_overrides, name_problem, to_data
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..corpus.storage import write_atomic
from ..errors import SampleError, UserError
from ..evals import heads as predictions_of_heads
from ..evals.base import Evaluation
from ..evals.run import evaluate, keep
from ..model import Model, ModelConfig, load, read_config
from ..objectives.supervised import label_value
from ..reports import tune as page
from ..run_dir import checkpoint, predictions, trust
from ..train import config as train_config
from ..train.loop import pretrain
from . import features
from .data import TASKS, Prepared, prepare

FILE = page.FILE
GRADIENT_WAYS = ("full", "lora", "prompt")
WAYS = (*GRADIENT_WAYS, *features.WAYS)
RATES = {"full": 2e-3, "lora": 2e-3, "prompt": 1e-2, "probe": 1e-3}
"""The highest learning rate of each way for a backbone of width 192, chosen on validation parts (benchmarks/LOG.md);
that of a wider one is lower in proportion (after Yang et al. 2022)."""
DEEP, LAYER_DECAY = 8, 0.8  # of a backbone with so many blocks, early ones learn slower
METRICS = {"classify": "accuracy", "tag": "token_accuracy", "span": "f1", "regress": "mae"}
LOWER = ("mae", "loss")
EPOCHS = ((200, 40), (2_000, 20), (10_000, 8), (math.inf, 4))  # up to so many samples: so many epochs
MIN_STEPS = 60
MAX_TEXT = 1024  # tokens of a text whose words are tagged or that holds an answer
SAMPLED = 2000  # training texts whose lengths are looked at


@dataclass
class Settings:
    """What a tune is told beside its data."""

    how: str = "full"
    run_dir: str = ""
    like: str = ""  # for a random start: the run whose architecture and tokenizers are taken
    rehearsal: float = 0.0  # the share of each of the base's own tasks that goes on in every step
    shots: int = 0  # samples of each class that are learned from; 0: all
    seed: int = 0
    overrides: Sequence[str] = field(default_factory=tuple)  # key=value for the run's configuration
    resume: bool = False

    def check(self) -> None:
        """Raises UserError."""
        if problem := name_problem([self.how], WAYS, "way of adapting"):
            raise UserError(f"--how {problem}")
        if not 0 <= self.rehearsal <= 1:
            raise UserError("--rehearsal is a share from 0 to 1")
        if self.rehearsal and self.how not in GRADIENT_WAYS:
            raise UserError(f"--rehearsal goes on with the base's tasks while weights learn: not with --how {self.how}")
        if self.shots < 0 or (self.shots and self.how in GRADIENT_WAYS):
            raise UserError(f"--shots is a whole number from 1 up, for --how {', '.join(features.WAYS)}")


def tune(
    base: str | Path | Model,
    data: Sequence[str],
    task: str,
    settings: Settings | None = None,
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    **columns: str,
) -> Path:
    """Adapt a run, a checkpoint or a model to labeled data and measure it on the test part; returns the run folder.

    base: "none" starts from random weights, with the architecture and tokenizers of `settings.like`. columns: as for
    `data.prepare`. Raises UserError.
    """
    settings, began = settings or Settings(), time.monotonic()
    settings.check()
    run_dir = Path(settings.run_dir or f"runs/{task}-{settings.how}")
    if (run_dir / FILE).exists():
        raise UserError(f"{run_dir}: holds a finished tune; name another folder with run_dir=FOLDER, or remove it")
    run_dir.mkdir(parents=True, exist_ok=True)
    start = find_base(base, settings, run_dir)
    prepared = prepare(task, data, run_dir, validation, test, seed=settings.seed, **columns)
    for note in prepared.notes:
        print(note, flush=True)
    check_modalities(start, prepared)
    if settings.how in features.WAYS and not (settings.how == "probe" and TASKS[task] in ("tag", "span")):
        result = features.adapt(start.model(), prepared, settings.how, run_dir, settings.shots, settings.seed)
    else:
        result = _train(start, prepared, settings, run_dir)
    about = {
        "task": task,
        "how": settings.how,
        "base": start.name,
        "base_hash": start.hash,
        "seed": settings.seed,
        "data": {
            "given": list(data),
            "counts": prepared.counts,
            "label": prepared.label,
            "modalities": prepared.modalities,
            "notes": prepared.notes,
        },
        "arguments": arguments(settings, validation, test, columns),
        "seconds": time.monotonic() - began,
        **result,
    }
    written = json.dumps(about, indent=1, ensure_ascii=False).encode("utf-8", "replace")
    write_atomic(run_dir / trust.SIGNATURE, trust.sign(written).encode())
    write_atomic(run_dir / FILE, written)
    page.write(run_dir)
    return run_dir


def arguments(settings: Settings, validation: Sequence[str], test: Sequence[str], columns: dict[str, str]) -> dict:
    """What else the tune was told, as far as it is not the default: for whoever wants to do the same again."""
    told = {"validation": list(validation), "test": list(test), **columns}
    told |= {name: getattr(settings, name) for name in ("like", "rehearsal", "shots")}
    return {name: value for name, value in {**told, "overrides": list(settings.overrides)}.items() if value}


@dataclass
class Base:
    """Where a tune starts: a checkpoint's folder, or an architecture with random weights."""

    name: str
    config: ModelConfig
    folder: Path | None  # of the checkpoint; None: random weights
    seed: int = 0

    @property
    def hash(self) -> str:
        return lora.base_hash(checkpoint.read_tensors(self.folder, "ema")) if self.folder else ""

    def model(self) -> Model:
        if self.folder:
            return load(self.folder)
        import torch

        torch.manual_seed(self.seed)
        return Model(self.config).eval()


def find_base(base: str | Path | Model, settings: Settings, run_dir: Path) -> Base:
    """Raises UserError."""
    if isinstance(base, Model):
        folder = run_dir / "base"
        if not folder.exists():
            save_checkpoint(folder, base, to_data(base.config), {})
        return Base("a model in memory", read_config(folder), folder)
    if str(base) == "none":
        config = read_config(checkpoint.newest(settings.like)) if settings.like else ModelConfig()
        if not settings.like:
            raise UserError("a random start needs --like RUN, whose architecture and tokenizers it takes")
        return Base("none", config, None, settings.seed)
    folder = checkpoint.newest(base)
    return Base(str(base), read_config(folder), folder)


def check_modalities(base: Base, prepared: Prepared) -> None:
    """Raises UserError where the base cannot read the data."""
    missing = [modality for modality in prepared.modalities if modality not in base.config.tokenizers]
    if missing:
        raise UserError(
            f"{base.name}: reads {', '.join(base.config.tokenizers)}, not {' and '.join(missing)}, which "
            f"{prepared.task} needs: tune a checkpoint that was trained on it"
        )


def _train(start: Base, prepared: Prepared, settings: Settings, run_dir: Path) -> dict:
    """Train with gradients, keep the best checkpoint by validation, and measure it on the test part."""
    config = train_config.build(configure(start, prepared, settings, run_dir), f"mmfm tune {prepared.task}")
    pretrain(config, "auto" if settings.resume else False)
    folder = keep_best(run_dir)
    model = load(folder)
    trained = objectives.load(folder, model)
    learned = sum(p.numel() for n, p in model.named_parameters() if _learns(n, config.trainable))
    result: dict[str, Any] = {
        "parameters": learned,
        "share_of_parameters": learned / max(1, sum(p.numel() for p in model.parameters())),
        "steps": config.steps,
        "best_step": int(folder.name[5:]) if folder.name[5:].isdigit() else None,
    }
    if settings.how in ("lora", "prompt"):
        names = [name for name, _ in model.named_parameters() if _learns(name, config.trainable)]
        result["adapter"] = str(lora.save_adapter(model, run_dir / "adapter", names))
        result["adapter_bytes"] = (run_dir / "adapter" / "adapter.safetensors").stat().st_size
    return result | _measure(model, trained, prepared, run_dir, folder)


def _learns(name: str, trainable: Sequence[str]) -> bool:
    return not trainable or any(fnmatch.fnmatchcase(name, pattern) for pattern in trainable)


def _measure(model: Model, trained: dict, prepared: Prepared, run_dir: Path, folder: Path) -> dict:
    """Figures of the validation and test parts, and what was said of each sample of the latter."""
    figures: dict[str, dict] = {}
    for part in ("validation", "test"):
        shards = getattr(prepared, part)
        if not shards:
            continue
        evaluation = Evaluation(shards, prepared.where.get(part, {}), **evaluation_settings(prepared))
        figures, embedded = evaluate(model, trained, evaluation, folder)
        keep(part, evaluation, figures, embedded)
        for found in embedded.predictions.values() if part == "test" else ():
            predictions.write(run_dir, "test", predictions_of_heads.rows_of(model, found, embedded.corpus))
    return {"metric": metric_name(prepared), "test": figures}


def evaluation_settings(prepared: Prepared) -> dict:
    """How a part of the data is measured, as under `evaluate` in a config."""
    head = TASKS[prepared.task]
    measure = ["heads"] if head else ["captions" if prepared.task == "captioning" else "retrieval"]
    return {"labels": prepared.label, "measure": measure, "modalities": list(prepared.modalities)}


def metric_name(prepared: Prepared) -> str:
    """The figure that a task is judged by."""
    head = TASKS[prepared.task]
    if head == "classify" and prepared.head.get("multi_label"):
        return "classify/map"
    if head:
        return f"{head}/{METRICS[head]}"
    if prepared.task == "captioning":
        return "captions/bits_per_token"
    first, other = sorted(prepared.modalities, key=lambda modality: modality != "text")[:2]
    return f"retrieval/{first}_to_{other}/r@10"


def configure(start: Base, prepared: Prepared, settings: Settings, run_dir: Path) -> dict:
    """The configuration of a tune, in plain data: sensible settings for the size of the data, then the user's own."""
    head, count, how = TASKS[prepared.task], prepared.counts["train"], settings.how
    model = to_data(start.config)
    objective = _choose_objective(model, start.config, prepared)
    trainable = _choose_trainable(model, prepared, how)
    batch_size = max(2, min(64, count // 4))
    epochs = next(epochs for most, epochs in EPOCHS if count <= most)
    steps = max(MIN_STEPS, math.ceil(count * epochs / batch_size))
    steps = apply_overrides({"steps": steps}, [one for one in settings.overrides if one.startswith("steps=")])["steps"]
    every = max(1, steps // 10)
    random_start, deep = start.folder is None, start.config.backbone.depth >= DEEP
    data: dict[str, Any] = {
        "sources": {"train": {"shards": prepared.train, **({"validation": prepared.validation} if not head else {})}},
        "tasks": {
            "tune": {
                "objectives": objective,
                "modalities": prepared.modalities,
                "batch_size": batch_size,
                "sources": {"train": 1},
            }
        },
        "model": model,
        "trainable": trainable,
        "init": str(start.folder) if start.folder else "",
        "run_dir": str(run_dir),
        "seed": settings.seed,
        "optim": {
            "name": "adamw",
            "lr": RATES[how] * 192 / start.config.backbone.width,
            "layer_decay": LAYER_DECAY if how == "full" and deep and not random_start else 1.0,
            "warmup_steps": max(1, steps // 10),
            "schedule": "cosine",
        },
        "steps": steps,
        "ema_decay": min(0.999, max(0.9, 1 - 10 / steps)),
        "save_every": every,
        "track": [],
        "best_mode": "min" if metric_name(prepared).endswith(LOWER) else "max",
    }
    if prepared.task == "captioning":
        data |= {"validate_every": every, "best": "validation/loss", "best_mode": "min"}
    elif prepared.validation:
        data["evaluate"] = {"validation": {"on": prepared.validation, **evaluation_settings(prepared)}}
        data |= {"evaluate_every": every, "best": f"evaluate/validation/{metric_name(prepared)}"}
    if settings.rehearsal:
        _add_rehearsal(data, start, settings.rehearsal)
    return apply_overrides(data, settings.overrides)


def _choose_objective(model: dict, base: ModelConfig, prepared: Prepared) -> dict:
    """The objective of a tune, in plain data; `model` is given the head that it needs."""
    head = TASKS[prepared.task]
    if head:
        model["heads"][head] = {"head": head, **prepared.head, **_label_statistics(prepared)}
        _read_labeled_text(model, base, prepared)
        return {"supervised": {"head": head, "label": prepared.label, "fuse": prepared.fuse}}
    if prepared.task == "captioning":
        others = [modality for modality in prepared.modalities if modality != "text"]
        return {"causal": {"fuse": True, "prefix": others}}
    model["heads"].setdefault("retrieval", {"head": "retrieval"})
    return {"contrastive": {}}


def _choose_trainable(model: dict, prepared: Prepared, how: str) -> list[str]:
    """Patterns of the parameters that learn, of which none stand for all; `model` is given those that `how` adds."""
    own = TASKS[prepared.task] or ("retrieval" if prepared.task == "retrieval" else "")
    patterns = [f"heads.{own}.*"] if own else []
    if how == "lora":
        model["lora"] = {"rank": 4, "alpha": 8.0}
        patterns = ["*lora_*", *patterns]
    elif how == "prompt":
        model["tokenizers"]["prompt"] = {"tokenizer": "prompt", "count": 8}
        patterns = ["embedders.prompt.*", "modality_vectors.prompt", *patterns]
    elif how != "probe":
        return []
    return [*patterns, "objectives.*"] if patterns and prepared.task == "captioning" else patterns


def _read_labeled_text(model: dict, base: ModelConfig, prepared: Prepared) -> None:
    """Labels are of the text that a shard holds as such, not of a caption in another language; and where they are of
    places in it, all of it is read at once, as far as `MAX_TEXT` tokens go."""
    text = model["tokenizers"].get("text")
    if not text:
        return
    text["fields"] = ["txt", "text"]
    if TASKS[prepared.task] not in ("tag", "span"):
        return
    corpus = Corpus(Source(prepared.train), "train")
    reader: Any = base.tokenizers["text"].replace(fields=text["fields"], max_tokens=MAX_TEXT)
    longest = 0
    for number in range(0, len(corpus), max(1, len(corpus) // SAMPLED)):
        with contextlib.suppress(SampleError):
            longest = max([longest, *map(len, reader.read(corpus.raw(number))[:1])])
    text["max_tokens"] = max(text["max_tokens"], longest)


def _label_statistics(prepared: Prepared) -> dict:
    """The mean and the standard deviation of the training labels of a regression."""
    if TASKS[prepared.task] != "regress":
        return {}
    corpus = Corpus(Source(prepared.train), "train")
    values = np.array([float(label_value(corpus.raw(i), prepared.label)) for i in range(len(corpus))])
    return {"mean": float(values.mean()), "std": float(values.std()) or 1.0}


def _add_rehearsal(data: dict, start: Base, share: float) -> None:
    """The base's own tasks and sources go on, each with a share of its batch size. Raises UserError."""
    if start.folder is None:
        raise UserError("--rehearsal goes on with the tasks of a base, and a random start has none")
    if not trust.is_own(start.folder, checkpoint.MANIFEST):
        raise UserError(f"{start.name}: was not trained here by you, so the sources that its config names are not read")
    base = checkpoint.read_data(start.folder, "config")
    for name, task in base.get("tasks", {}).items():
        own = name if name not in data["tasks"] else f"base-{name}"  # by its name what it has learned is found
        data["tasks"][own] = task | {
            "batch_size": max(4, round(task["batch_size"] * share)),
            "sources": {f"base-{source}": weight for source, weight in task["sources"].items()},
        }
    data["sources"] |= {f"base-{name}": source for name, source in base.get("sources", {}).items()}


def keep_best(run_dir: Path) -> Path:
    """The folder of the best checkpoint by validation, or else the last; later ones are removed, so that whoever opens
    the run takes the best."""
    best = checkpoint.read_best(run_dir)
    if best:
        for folder in checkpoint.steps(run_dir):
            if int(folder.name[5:]) > best["step"]:
                shutil.rmtree(folder)
    return checkpoint.newest(run_dir)


def save_checkpoint(folder: Path, model: Model, config: dict, state: dict) -> Path:
    """Write a model as a checkpoint's folder, from which `load` and `init` read it."""
    tensors = model.state_dict()
    files = {modality: t.file for modality, t in model.tokenizers.items() if t.file}
    data = {"config": {"model": config} if "model" not in config else config, "model": to_data(model.config)}
    data["state"] = {"step": 0, "seed": 0, "data": {}, "origin": {"step": 0, "drawn": {}}, "drawn": {}} | state
    data["config"] = {"tasks": {}, "sources": {}, **data["config"]}
    empty: dict[str, Any] = {"objectives": {}, "ema_objectives": {}, "optimizer": {}}
    return checkpoint.save(folder, {"model": tensors, "ema": tensors, **empty}, data, files)
