"""A real run of some minutes: `mmfm pretrain` on whatever corpora lie in carry/ (else on scenes made here), measured by
`mmfm evaluate` on their validation shards."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from common import save

from multimodal_fm.config import to_data
from multimodal_fm.corpus.shards import Config as Source
from multimodal_fm.corpus.shards import Corpus
from multimodal_fm.train.config import load

ROOT = Path(__file__).parents[1]
TRIAL = 30  # steps of the run that measures how many steps fit


def run(out: Path, small: bool, seconds: int = 240) -> bool:
    """Train for about `seconds`, evaluation included, with as many steps as fit."""
    out, began = out.resolve(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources = corpora(work, small)
        data = recipe(sources, small)
        steps = 10 if small else fitting(data, work, began + seconds * 0.8)
        data |= {"run_dir": str(work / "run"), "steps": steps, "save_every": steps}
        (work / "run.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        start = time.monotonic()
        mmfm("pretrain", str(work / "run.yaml"))
        trained = time.monotonic() - start
        rows = metrics(work / "run")
        figures = {name: evaluate(work / "run", on) for name, on in measured(sources).items()}
    curve(rows, out)
    tokens, pace = sum(row["tokens"] for row in rows), [row["tokens_per_second"] for row in rows[len(rows) // 5 :]]
    later = rows[len(rows) // 5 :]
    waiting = sum(row["data_wait"] for row in later) / sum(row["seconds"] for row in later)
    results = {"config": data, "seconds": trained, "tokens": tokens, "tokens per second": statistics.median(pace)}
    results["waiting for data"] = waiting
    losses = [rows[0]["loss"], statistics.mean(row["loss"] for row in rows[-10:])]
    chosen = [
        [name, key.removeprefix("retrieval/"), f"{one['value']:.3f}", f"{one['chance'] or 0:.3f}", one["n"]]
        for name, found in figures.items()
        for key, one in found.items()
        if key.endswith("/r@10") or not key.startswith("retrieval/")
    ]
    tables = {
        "The run": [
            ["steps", "seconds", "tokens", "tokens/s, median", "waiting for data", "first loss", "last loss"],
            [
                steps,
                f"{trained:.0f}",
                f"{tokens:,}",
                f"{statistics.median(pace):,.0f}",
                f"{waiting:.1%}",
                *(f"{v:.3f}" for v in losses),
            ],
        ],
        "Validation shards": [["data", "figure", "value", "chance (0: none known)", "n"], *chosen],
    }
    save(out, "pretrain", results | {"figures": figures}, tables)
    return bool(chosen)


def corpora(work: Path, small: bool) -> dict[str, dict[str, list[str]]]:
    """name -> split -> shards, of every folder under carry/ that holds train-*.tar; else of scenes made here."""
    found = split(ROOT / "carry")
    if not found:
        sizes = ("60", "30") if small else ("4000", "400")
        command = [sys.executable, "-m", "data.scenes", "--seed", "0", "--train", sizes[0], "--validation", sizes[1]]
        subprocess.run([*command, "--to", str(work / "scenes")], check=True, cwd=ROOT)
        found = {"scenes": next(iter(split(work / "scenes").values()))}
    return found


def split(folder: Path) -> dict[str, dict[str, list[str]]]:
    homes = sorted({path.parent for path in folder.rglob("train-*.tar")})
    names = {home: "_".join(home.relative_to(folder).parts) or folder.name for home in homes}
    return {
        names[home]: {part: sorted(map(str, home.glob(f"{part}-*.tar"))) for part in ("train", "validation")}
        for home in homes
    }


def recipe(sources: dict, small: bool) -> dict:
    """The plain data of a mid-size run: the demo's tasks over all sources, a larger model and batch, bfloat16."""
    data, cuda = to_data(load(ROOT / "configs" / "demo.yaml")), torch.cuda.is_available()
    data["sources"] = {n: {"shards": parts["train"], "group": group(parts["train"])} for n, parts in sources.items()}
    for task in data["tasks"].values():
        task["batch_size"] = 8 if small else 4 * task["batch_size"]
        task["sources"] = dict.fromkeys(sources, 1)
    data["model"]["tokenizers"]["image"]["max_tokens"] = 36 if small else 144
    data["optim"]["warmup_steps"] = 2 if small else 100
    size = (64, 2, 2) if small else (512, 8, 8)
    data["model"]["backbone"] = dict(zip(("width", "depth", "num_heads"), size, strict=True))
    data["model"]["heads"] = {"retrieval": {"embed_dim": 256}}
    data |= {
        "validate_every": 0,
        "ema_decay": 0.9 if small else 0.995,
        "precision": "bfloat16" if cuda else "float32",
        "round_to": 128 if cuda else 1,
        "num_workers": 1 if small else max(1, (os.cpu_count() or 1) - 2),
        "evaluate": {},
    }
    return data


def group(shards: list[str]) -> str:
    """The field that says which samples mean the same, where the shards have it."""
    return "caption" if "caption" in (Corpus(Source(shards), "look").json(0) or {}) else ""


def measured(sources: dict) -> dict[str, list[str]]:
    """Arguments of `mmfm evaluate` for each source and, where the samples have roles, each role."""
    found = {}
    for name, parts in sources.items():
        if not parts["validation"]:
            continue
        corpus = Corpus(Source(parts["validation"]), name)
        roles = Counter((corpus.json(i) or {}).get("role") for i in range(len(corpus)))
        grouped = ["--group", "caption"] if group(parts["validation"]) else []
        for role in sorted(roles, key=str):
            where = ["--where", f"role={role}"] if role else []
            found[f"{name}, {role}" if role else name] = ["--on", *parts["validation"], *where, *grouped]
    return found


def fitting(data: dict, work: Path, until: float) -> int:
    """How many steps fit until then, from a short trial run."""
    trial = {**data, "run_dir": str(work / "trial"), "steps": TRIAL, "save_every": TRIAL}
    (work / "trial.yaml").write_text(yaml.safe_dump(trial, sort_keys=False))
    start = time.monotonic()
    mmfm("pretrain", str(work / "trial.yaml"))
    whole = time.monotonic() - start
    pace = [row["seconds"] for row in metrics(work / "trial")]
    a_step = statistics.mean(pace[TRIAL // 3 :])
    overhead = max(0.0, whole - sum(pace)) + sum(pace[: TRIAL // 3])
    return max(TRIAL, int((until - time.monotonic() - overhead) / a_step))


def mmfm(*arguments: str) -> str:
    """Run the command line; its standard error goes on to ours."""
    done = subprocess.run(
        [sys.executable, "-m", "multimodal_fm", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def evaluate(run_folder: Path, on: list[str]) -> dict:
    return json.loads(mmfm("evaluate", str(run_folder), *on, "--json").splitlines()[-1])


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def curve(rows: list[dict], out: Path) -> None:
    """metrics.jsonl with at most 300 rows, and curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    thin = rows[:: max(1, len(rows) // 300)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thin))
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name in (key for key in thin[-1] if key.startswith("loss/") and key.count("/") == 2):
        points = [(row["step"], row[name]) for row in thin if name in row]
        axes.plot(*zip(*points, strict=True), label=name[5:], linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)
