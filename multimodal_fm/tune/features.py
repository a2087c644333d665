"""Adapting without training the backbone: its features are computed once, kept on disk, and read by scikit-learn.

probe: logistic or ridge regression, which becomes a head of the model. knn: the nearest neighbors' votes (Wu et al.
2018). prototypes: the nearest class mean (Snell et al. 2017), a head as well. zero-shot: the names of the classes in
sentences (Radford et al. 2021).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import objectives
from ..batch import MAX_TOKENS, Sample
from ..config import Plugin, to_data
from ..corpus.fields import label_text, label_texts
from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..errors import SampleError, UserError
from ..evals import heads as head_predictions
from ..evals import task_metrics
from ..evals.metrics import SEED, find_nearest
from ..evals.zero_shot import TEMPLATES, embed_classes
from ..heads import classify, regress
from ..lora import base_hash
from ..model import HEADS, Model, autocast
from ..objectives import supervised
from ..objectives.contrastive import MAX_SCALE
from ..run_dir import checkpoint, evaluations, predictions
from .data import TASKS, Prepared

WAYS = ("probe", "knn", "prototypes", "zero-shot")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the probe's regularization (C), chosen on the validation part
NEIGHBORS = (1, 5, 10, 20)
TEMPERATURE = 0.1


@dataclass
class Part:
    """The samples of one part that could be read and have a label."""

    corpus: Corpus
    samples: list[int]
    labels: list[Any]
    features: np.ndarray  # (N, D)
    skipped: list[dict]


def adapt(model: Model, prepared: Prepared, how: str, run_dir: Path, shots: int = 0, seed: int = 0) -> dict:
    """Fit on the training part, choose on the validation part, measure on the test part. Raises UserError."""
    head = TASKS[prepared.task]
    if head not in ("classify", "regress") or (head == "regress" and how != "probe"):
        raise UserError(f"--how {how} is for classification: {prepared.task} takes full, lora, prompt or probe")
    if prepared.head.get("multi_label") and how != "probe":
        raise UserError(f"--how {how} gives a sample one class, and these samples have several: take --how probe")
    text = model.tokenizers.get("text")
    if text is not None:
        model.tokenizers["text"] = text.replace(fields=["txt", "text"])
    parts = {
        name: read_part(model, prepared, name) for name in ("train", "validation", "test") if _shards(prepared, name)
    }
    if shots:
        parts["train"] = few(parts["train"], shots, seed)
    result: dict[str, Any] = {"fitted_on": len(parts["train"].samples)}
    if how == "knn":
        k, said = neighbors(parts, prepared)
        result["k"] = k
    elif how == "zero-shot":
        said = zero_shot(model, prepared, parts)
        result["fitted_on"] = 0
    else:
        model, chosen = with_fitted_head(model, prepared, parts, how)
        result |= chosen
        folder = save(model, prepared, run_dir, seed)
        return result | _measure_head(model, prepared, run_dir, folder)
    return result | _measure(said, parts, prepared, run_dir)


def _shards(prepared: Prepared, name: str) -> list[str]:
    return getattr(prepared, name)


def objective_of(prepared: Prepared) -> supervised.Config:
    return supervised.Config(head=TASKS[prepared.task], label=prepared.label, fuse=prepared.fuse)


def head_plugin(prepared: Prepared, **settings) -> Plugin:
    if TASKS[prepared.task] == "classify":
        return Plugin(HEADS, "classify", classify.Head, classify.Config(**prepared.head, **settings))
    return Plugin(HEADS, "regress", regress.Head, regress.Config(**settings))


def read_part(model: Model, prepared: Prepared, name: str) -> Part:
    """The features of a part's labeled samples, from the cache where the same model has read the same shards before."""
    corpus = Corpus(Source(_shards(prepared, name), where=prepared.where.get(name, {})), name)
    fingerprint = json.dumps(
        [base_hash(model.state_dict()), corpus.fingerprint(), to_data(model.config), prepared.label, prepared.fuse,
         list(prepared.modalities), prepared.head],
        sort_keys=True, default=str,
    )  # fmt: skip
    key = hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "multimodal_fm" / "features"
    cached = _load(folder / f"{key}.npz")
    bound = supervised.Bound(objective_of(prepared), head_plugin(prepared))
    samples, labels, skipped, held, size, rows = [], [], [], [], 0, {}
    windowed = not prepared.fuse

    def flush() -> None:
        nonlocal held, size
        for (owner, example), vector in zip(held, pool(model, [e for _, e in held]), strict=True):
            rows.setdefault(owner, []).append((vector, sum(map(len, example.inputs))))
        held, size = [], 0

    for number in range(len(corpus)):
        raw, failed = corpus.read(number)
        try:
            value = supervised.label_value(raw, prepared.label)
            views = head_predictions.read_views(model, prepared.modalities, raw, windowed) if cached is None else []
        except SampleError as error:
            cause = failed[0][1] if failed else error
            skipped.append({"key": corpus.key(number), "part": "label", "reason": cause.reason, "detail": str(cause)})
            continue
        if cached is not None and number not in cached:
            continue
        samples.append(number)
        labels.append(value)
        for view in views:
            held.append((number, supervised.Objective.arrange(bound, Sample(view))))
            size += sum(map(len, view.values()))
        if size >= MAX_TOKENS:
            flush()
    if held:
        flush()
    if cached is None:
        vectors = {n: np.average([v for v, _ in own], 0, [w for _, w in own]) for n, own in rows.items()}
        _store(folder / f"{key}.npz", vectors)
    else:
        vectors = cached
    return Part(corpus, samples, labels, np.stack([vectors[n] for n in samples]).astype(np.float64), skipped)


@torch.no_grad()
def pool(model: Model, examples: list) -> np.ndarray:
    """The mean-pooled output (B, D) of each example's one sequence."""
    batch = model.collate({"features": list(enumerate(examples))}, {"features": {}})
    with autocast(model.device, model.device.type == "cuda"):
        pooled = model(batch).mean_pool()
    return pooled.index_select(0, batch.tasks["features"].sequence).float().cpu().numpy()


def _load(file: Path) -> dict[int, np.ndarray] | None:
    try:
        with np.load(file, allow_pickle=False) as saved:
            return dict(zip(saved["samples"].tolist(), saved["features"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _store(file: Path, vectors: dict[int, np.ndarray]) -> None:
    """A cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(part, samples=np.array(list(vectors)), features=np.stack(list(vectors.values())))
        part.replace(file)
    except OSError:
        pass


def few(part: Part, shots: int, seed: int) -> Part:
    """So many samples of each class, drawn by the seed. Raises UserError where a class has fewer."""
    order, kept = np.random.default_rng(seed).permutation(len(part.labels)), []
    for name in sorted(set(map(str, part.labels))):
        own = [i for i in order if str(part.labels[i]) == name][:shots]
        if len(own) < shots:
            raise UserError(f"--shots {shots}: class {name!r} has {len(own)} samples to train")
        kept += own
    kept.sort()
    samples, labels = [part.samples[i] for i in kept], [part.labels[i] for i in kept]
    return Part(part.corpus, samples, labels, part.features[kept], part.skipped)


def numbers_of(labels: list[Any], prepared: Prepared) -> np.ndarray:
    """Class numbers (N,), with `multi_label` ones and zeros (N, C), or the numbers of a regression (N,)."""
    if TASKS[prepared.task] == "regress":
        return np.array([float(label) for label in labels])
    numbers = {name: number for number, name in enumerate(prepared.head["classes"])}
    if prepared.head.get("multi_label"):
        truth = np.zeros((len(labels), len(numbers)), int)
        for row, own in enumerate(labels):
            truth[row, [numbers[name] for name in label_texts(own)]] = 1
        return truth
    return np.array([numbers[label_text(label)] for label in labels])


def with_fitted_head(model: Model, prepared: Prepared, parts: dict[str, Part], how: str) -> tuple[Model, dict]:
    """The model with a head of fitted weights on its mean-pooled output, and what was chosen."""
    train, targets = parts["train"], numbers_of(parts["train"].labels, prepared)
    mean, std = train.features.mean(0), train.features.std(0) + 1e-6
    inputs = (train.features - mean) / std
    if how == "prototypes":
        centers = np.stack([inputs[targets == c].mean(0) for c in range(len(prepared.head["classes"]))])
        scale = 1 / train.features.shape[1] ** 0.5
        weight, bias, chosen = 2 * scale * centers, -scale * (centers**2).sum(1), {}
    else:
        strength = choose_strength(inputs, targets, parts, prepared, mean, std)
        weight, bias = fit_linear(inputs, targets, prepared, strength)
        chosen = {"C": strength}
    weight, bias = weight / std, bias - (weight / std) @ mean
    plugin = head_plugin(prepared)
    heads = {**model.config.heads, TASKS[prepared.task]: plugin}
    tokenizers = dict(model.tokenizers)
    adapted = Model(dataclasses.replace(model.config, heads=heads, tokenizers=tokenizers))
    adapted.load_state_dict(model.state_dict(), strict=False)
    linear = adapted.heads[TASKS[prepared.task]]
    layer: Any = linear.logits if TASKS[prepared.task] == "classify" else linear.value  # pyright: ignore
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(np.atleast_1d(bias)))
    return adapted.eval(), chosen


def fit_linear(inputs: np.ndarray, targets: np.ndarray, prepared: Prepared, strength: float):
    """Weights (C, D) and biases (C,) of logits."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # slow convergence
        if TASKS[prepared.task] == "regress":
            ridge: Any = Ridge(alpha=1 / strength).fit(inputs, targets)
            return ridge.coef_[None], np.array([ridge.intercept_])
        if prepared.head.get("multi_label"):
            many: Any = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=300)).fit(inputs, targets)
            return np.stack([e.coef_[0] for e in many.estimators_]), np.array(
                [e.intercept_[0] for e in many.estimators_]
            )
        one: Any = LogisticRegression(C=strength, max_iter=300).fit(inputs, targets)
    if len(one.coef_) == 1:  # two classes: the logit of the second
        return np.concatenate([0 * one.coef_, one.coef_]), np.concatenate([[0.0], one.intercept_])
    return one.coef_, one.intercept_


def choose_strength(inputs, targets, parts: dict[str, Part], prepared: Prepared, mean, std) -> float:
    """The C with the best score on the validation part; 0.1 where there is none."""
    held_out = parts.get("validation")
    if held_out is None:
        return 0.1
    truth = numbers_of(held_out.labels, prepared)
    given = (held_out.features - mean) / std
    scores = {}
    for strength in STRENGTHS:
        weight, bias = fit_linear(inputs, targets, prepared, strength)
        logits = given @ weight.T + bias
        if TASKS[prepared.task] == "regress":
            scores[strength] = -float(np.abs(logits[:, 0] - truth).mean())
        elif prepared.head.get("multi_label"):
            scores[strength] = float(((logits > 0) == truth).mean())
        else:
            scores[strength] = float((logits.argmax(1) == truth).mean())
    return max(scores, key=scores.__getitem__)


def neighbors(parts: dict[str, Part], prepared: Prepared) -> tuple[int, np.ndarray]:
    """The number of neighbors that was best on the validation part, and the classes' shares of the votes (N, C)."""
    train, classes = parts["train"], len(prepared.head["classes"])
    targets, mean = numbers_of(train.labels, prepared), train.features.mean(0)

    def unit(features: np.ndarray) -> Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(features - mean), dim=1, eps=1e-9)

    def vote(part: Part, k: int) -> np.ndarray:
        cosine, near = find_nearest(unit(part.features), unit(train.features), k)
        votes = torch.zeros(len(near), classes, dtype=torch.double)
        votes.scatter_add_(1, torch.from_numpy(targets)[near], torch.exp(cosine / TEMPERATURE))
        return (votes / votes.sum(1, keepdim=True)).numpy()

    counts = [k for k in NEIGHBORS if k <= len(targets)]
    k = min(10, counts[-1])
    if "validation" in parts:
        truth = numbers_of(parts["validation"].labels, prepared)
        scores = {k: float((vote(parts["validation"], k).argmax(1) == truth).mean()) for k in counts}
        k = max(scores, key=scores.__getitem__)
    return k, vote(parts["test"], k)


def zero_shot(model: Model, prepared: Prepared, parts: dict[str, Part]) -> np.ndarray:
    """The classes' probabilities (N, C) from their names alone."""
    if len(prepared.modalities) != 1 or prepared.modalities[0] == "text":
        raise UserError(f"--how zero-shot compares an image or a sound with sentences; {prepared.task} has none such")
    modality, part = prepared.modalities[0], parts["test"]
    names = [name.replace("_", " ") for name in prepared.head["classes"]]
    if any(name.isdecimal() for name in names):
        raise UserError("--how zero-shot needs classes with names, and these are numbers: name a field with --label")
    vectors_of_names = embed_classes(model, names, TEMPLATES[modality])
    inputs = []
    for number in part.samples:
        views = head_predictions.read_views(model, [modality], part.corpus.raw(number), True)
        inputs.append([view[modality] for view in views])
    vectors, _ = model.embed_sequences(modality, inputs)
    logits = vectors.double().cpu() @ vectors_of_names.double().T * MAX_SCALE
    return logits.softmax(1).numpy()


def save(model: Model, prepared: Prepared, run_dir: Path, seed: int) -> Path:
    """The adapted model as a run's only checkpoint, with the objective that its head belongs to."""
    from .run import save_checkpoint

    task = {
        "objectives": {"supervised": dict(vars(objective_of(prepared)))},
        "modalities": list(prepared.modalities),
        "batch_size": 1,
        "sources": {"train": 1},
    }
    config = {
        "model": to_data(model.config),
        "tasks": {"tune": task},
        "sources": {"train": to_data(Source(prepared.train))},
        "evaluate": {},
        "run_dir": str(run_dir),
        "seed": seed,
    }
    return save_checkpoint(checkpoint.folder_of(run_dir, 0), model, config, {"seed": seed})


def _measure_head(model: Model, prepared: Prepared, run_dir: Path, folder: Path) -> dict:
    from .run import _measure as measure

    trained = objectives.load(folder, model)
    head = model.heads[TASKS[prepared.task]]
    learned = sum(p.numel() for p in head.parameters())
    result = {"parameters": learned, "share_of_parameters": learned / sum(p.numel() for p in model.parameters())}
    return result | measure(model, trained, prepared, run_dir, folder)


def _measure(said: np.ndarray, parts: dict[str, Part], prepared: Prepared, run_dir: Path) -> dict:
    """Figures of probabilities (N, C) on the test part, written where those of a run are."""
    test, classes = parts["test"], prepared.head["classes"]
    truth = numbers_of(test.labels, prepared)
    figures = {f"classify/{n}": f for n, f in task_metrics.classification(said, truth, classes).items()}
    entry = {"on": list(prepared.test), "step": 0, "seed": SEED, "figures": figures, "notes": []}
    evaluations.write(run_dir, "test", entry)
    rows = [
        {
            "key": test.corpus.key(sample),
            "label": str(label),
            "predicted": classes[int(p.argmax())],
            "score": float(classes[int(p.argmax())] == str(label)),
            "confidence": float(p.max()),
        }
        for sample, label, p in zip(test.samples, test.labels, said, strict=True)
    ]
    predictions.write(run_dir, "test", rows)
    return {"parameters": 0, "share_of_parameters": 0.0, "metric": "classify/accuracy", "test": figures}
