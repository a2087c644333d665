"""What tiny models learn in context, against the exact references: recall, Markov chains, linear regression.

    python -m data.in_context
    python benchmarks/in_context.py                          # widths 32 and 64 of configs/in_context.yaml
    python benchmarks/in_context.py --widths 64 --rules recall --steps 800

A run that is there already is measured and not trained again. Writes in_context.json and in_context.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import markdown

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data.in_context import rules  # noqa: E402
from multimodal_fm import objectives  # noqa: E402
from multimodal_fm.batch import Sample, count_targets  # noqa: E402
from multimodal_fm.corpus.shards import Config as Source  # noqa: E402
from multimodal_fm.corpus.shards import Corpus  # noqa: E402
from multimodal_fm.evals.metrics import estimate  # noqa: E402
from multimodal_fm.model import Model, load  # noqa: E402
from multimodal_fm.run_dir import checkpoint  # noqa: E402
from multimodal_fm.tokens import constant  # noqa: E402
from multimodal_fm.train.config import TrainConfig  # noqa: E402
from multimodal_fm.train.config import load as load_config  # noqa: E402
from multimodal_fm.train.loop import pretrain  # noqa: E402

BATCH = 64
KS = (0, 1, 2, 4)  # earlier occurrences of a key


@torch.no_grad()
def predict(model: Model, objective, modality: str, inputs: list) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of equally long inputs but the first: its nats or error (P, N - 1), and the outputs (P, N - 1, V)
    that foretell it: logits of text, numbers."""
    tokenizer, number, scores, outputs = model.tokenizers[modality], model.modalities.index(modality), [], []
    layer = objective.predictors[modality]
    layer = layer.logits if modality == "text" else layer.project
    for start in range(0, len(inputs), BATCH):
        tokens = [tokenizer.read(one)[0] for one in inputs[start : start + BATCH]]
        samples = [Sample({modality: t.replace(modality=constant(number, len(t)))}) for t in tokens]
        examples = [objective.arrange(objective.config, sample) for sample in samples]
        batch = model.collate({"t": list(enumerate(examples))}, {"t": count_targets(examples, model.modalities)})
        output, targets = model(batch), batch.tasks["t"]
        vectors = output.tokens.content.index_select(0, targets.rows[modality])
        scores.append(objective.score(output, targets, modality).view(len(tokens), -1))
        outputs.append(layer(vectors).view(len(tokens), scores[-1].shape[1], -1))
    return torch.cat(scores).double().numpy(), torch.cat(outputs).double().numpy()


def measure_recall(model: Model, objective, texts: list[str]) -> dict:
    """Accuracy of a value by how often its key has come before, and of the last one where the others were shuffled."""
    times = np.stack([rules.count_occurrences(text) for text in texts])
    right = _right_values(model, objective, texts)
    sequence = np.broadcast_to(np.arange(len(texts))[:, None], right.shape)
    chance = 1 / len(rules.VALUES)
    figures = {}
    for k in KS:
        at = times == k if k < max(KS) else times >= k
        figures[f"{k}{'+' * (k == max(KS))} before"] = estimate(right[at].astype(float), sequence[at], chance)
    draw, known = np.random.default_rng(0), times[:, -1] > 0
    shuffled = [rules.shuffle_values(text, draw) for text in texts]
    share = np.mean([text[1:-1:2].count(text[-1]) / (rules.PAIRS - 1) for text in texts])  # of the value, any key's
    controls = {"last": (right, chance), "last, shuffled values": (_right_values(model, objective, shuffled), share)}
    for name, (own, guess) in controls.items():
        figures[name] = estimate(own[known, -1].astype(float), np.flatnonzero(known), guess)
    return figures


def _right_values(model: Model, objective, texts: list[str]) -> np.ndarray:
    """Whether the likeliest token is the value, of each pair (P, n)."""
    _, logits = predict(model, objective, "text", texts)
    ids = np.array([model.tokenizers["text"].encode(text) for text in texts])
    return (logits.argmax(2)[:, : ids.shape[1]] == ids)[:, 1::2]


def measure_chain(model: Model, objective, rows: list[dict]) -> dict:
    """Nats a state in the second half of a chain: of the model, and of those who know more and less."""
    texts = [row["text"] for row in rows]
    scores, _ = predict(model, objective, "text", texts)
    nats = {"model": scores[:, 1 : rules.LENGTH]}
    references = [rules.chain_references(row["text"], np.array(row["transitions"])) for row in rows]
    nats |= {name: np.stack([one[name] for one in references]) for name in references[0]}
    late = rules.LENGTH // 2
    figures = {name: estimate(own[:, late:].mean(1), np.arange(len(own)), None) for name, own in nats.items()}
    early = nats["model"][:, :8].mean(1) - nats["bigram"][:, :8].mean(1)
    return figures | {"model above bigram, states 2 to 9": estimate(early, np.arange(len(early)), None)}


def measure_regression(model: Model, objective, arrays: list[np.ndarray]) -> dict:
    """Squared errors, in parts of that of always saying 0, after so many points; least squares beside them."""
    draw = np.random.default_rng(0)
    least = np.stack([rules.least_squares_errors(rows) for rows in arrays]) / rules.DIMS
    figures = {}
    for name, own in (("", arrays), (", shuffled targets", [rules.shuffle_targets(rows, draw) for rows in arrays])):
        _, outputs = predict(model, objective, "numbers", own)
        y = np.stack([rows[1::2, 0] for rows in own])
        errors = (outputs[:, ::2, 0] - y) ** 2 / rules.DIMS
        for k in (0, 2, 3, 4, 8, rules.POINTS - 1) if not name else (rules.POINTS - 1,):
            figures[f"{k} points{name}"] = estimate(errors[:, k], np.arange(len(errors)), 1.0)
        if not name:
            gap = errors[:, rules.DIMS :] - least[:, rules.DIMS :]  # least squares make no error there
            figures["gap to least squares, from 4 points on"] = estimate(gap.mean(1), np.arange(len(gap)), None)
    for k in (2, 3):
        figures[f"{k} points, least squares"] = estimate(least[:, k], np.arange(len(least)), 1.0)
    return figures


def measure(run: Path, config: TrainConfig) -> dict[str, dict]:
    """The figures of each rule that the run was trained on, on its validation shards."""
    model = load(run, device="cpu")
    trained, found = objectives.load(run, model), {}
    for name in config.tasks:
        corpus = Corpus(Source(config.sources[name].validation), name, config.model.tokenizers.values())
        objective, rows = trained[f"{name}/causal"], range(len(corpus))
        if name == "regression":
            arrays = [np.load(io.BytesIO(corpus.raw(i)["npy"])) for i in rows]
            found[name] = measure_regression(model, objective, arrays)
        else:
            own = [corpus.json(i) for i in rows]
            texts = [row["text"] for row in own]
            found[name] = (
                measure_recall(model, objective, texts) if name == "recall" else measure_chain(model, objective, own)
            )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/in_context.yaml"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rules", nargs="+", default=["recall", "chain", "regression"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--set", nargs="*", default=[], help="further key=value settings of the runs")
    parser.add_argument("--to", type=Path, default=Path("runs/in_context"), help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder of the tables")
    return parser.parse_args()


def train(options: argparse.Namespace, width: int) -> tuple[Path, TrainConfig, float]:
    run = options.to / f"{width}x{options.depth}-{'-'.join(options.rules)}"
    settings = [f"run_dir={run}", f"steps={options.steps}", f"model.backbone.width={width}"]
    settings += [f"model.backbone.depth={options.depth}", f"model.backbone.num_heads={max(1, width // 16)}"]
    config = load_config(options.config, [*settings, *options.set])
    config.tasks = {name: config.tasks[name] for name in options.rules}
    used = {m for task in config.tasks.values() for m in task.modalities}
    config.model.tokenizers = {name: t for name, t in config.model.tokenizers.items() if name in used}
    config.sources = {name: config.sources[name] for name in options.rules}
    began = time.monotonic()
    if not checkpoint.folder_of(run, config.steps).exists():
        pretrain(config, resume="auto")
    return run, config, time.monotonic() - began


def main() -> None:
    options = parse()
    results: dict = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    results |= {"steps": options.steps, "depth": options.depth, "runs": {}}
    for width in options.widths:
        run, config, seconds = train(options, width)
        results["runs"][str(width)] = {"seconds": seconds, "figures": measure(run, config)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "in_context.json").write_text(json.dumps(results, indent=1))
    lines = [f"# In context: depth {options.depth}, {options.steps} steps, {results['cores']} cores", ""]
    for rule in options.rules:
        figures = {width: own["figures"][rule] for width, own in results["runs"].items()}
        names = next(iter(figures.values()))
        rows = [[rule, *(f"width {width}" for width in figures)]]
        rows += [[name, *(cell(own[name]) for own in figures.values())] for name in names]
        lines += [f"## {rule}", "", markdown(rows), ""]
    (options.out / "in_context.md").write_text("\n".join(lines))
    print("\n".join(lines))


def cell(figure: dict) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} – {figure['high']:.3f})"


if __name__ == "__main__":
    main()
