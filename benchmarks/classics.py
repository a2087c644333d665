"""Every classic of configs/, trained on real data, and measured on held-out data beside its baseline.

    python -m data.small FOLDER
    mmfm pack data/small/shards/texts/train-*.jsonl --text-block 2000 --to data/small/shards/blocks
    python benchmarks/classics.py                       # what is not measured yet: trains, evaluates, tunes
    python benchmarks/classics.py --only bert mae       # some of them; --table: the tables of what was measured
    python benchmarks/classics.py --only gpt --nanogpt FOLDER   # its own code too, a clone of karpathy/nanoGPT

Each row is made by the commands that a reader would type; runs that are there are taken as they are. `untrained` is the
same configuration after one step at a learning rate of 0, and what is tuned from it gets the same steps of labels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import markdown

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results"
SHARDS = "data/small/shards"
UNTRAINED = ["steps=1", "optim.lr=0", "optim.muon_lr=0", "validate_every=0", "evaluate_every=0", "monitors={}"]


@dataclass(frozen=True)
class Figure:
    """A figure of `mmfm evaluate`, and what it is to beat."""

    name: str  # as `mmfm evaluate --json` has it
    says: str
    baseline: str = "chance"  # `chance`: the figure's own; a configuration: that one, untrained; or a number
    unit: float = 1.0  # is multiplied with the figure
    lower: bool = False  # is better


@dataclass(frozen=True)
class Row:
    """A configuration: the figures of its evaluations, and the tasks that it is tuned to."""

    figures: tuple[Figure, ...] = ()
    tune: dict[str, str] = field(default_factory=dict)  # by name of the task: what is trained for it
    overrides: tuple[str, ...] = ()  # of the run
    run: str = ""  # its name, where it is not the configuration's
    config: str = ""
    steps: int = 300  # of a tune


def probes(untrained: str, *sets: str) -> tuple[Figure, ...]:
    return tuple(
        Figure(f"{name}/{way}/{part}/accuracy", f"{name}, {said}", untrained)
        for name, part in ((one, "image" if one == "cifar10" else "audio") for one in sets)
        for way, said in (("knn", "kNN"), ("probe", "linear probe"))
    )


TUNED = {"sst2": "SST-2, tuned", "trec": "TREC, tuned"}
RETRIEVAL = tuple(
    Figure(f"{name}/retrieval/{a}_to_{b}/r@10", f"{said}, {a} to {b}, R@10")
    for name, said, pair in (
        ("flickr8k", "Flickr8k", ("text", "image")),
        ("stamps", "Tux Paint's stamps", ("text", "image")),
        ("spoken", "spoken captions within a language", ("text", "audio")),
    )
    for a, b in (pair, pair[::-1])
)
ROWS = {
    "bert": Row(tune=TUNED),
    "roberta": Row(tune=TUNED),
    "bart": Row((
        Figure("restored/denoise/infilling/exact", "originals restored exactly; copying"),
        Figure("restored/denoise/infilling/chrf", "chrF of what it restores; copying"),
    )),
    "t5": Row((
        Figure("restored/denoise/spans/exact", "all missing spans exactly right; copying"),
        Figure("sst2/text_to_text/sst2/accuracy", "SST-2 as text, in pretraining; the commonest class"),
        Figure("trec/text_to_text/trec/accuracy", "TREC as text, in pretraining; the commonest class"),
    )),
    "t5_tasks": Row((
        Figure("sst2/text_to_text/sst2/accuracy", "SST-2 as text, tuned; unpretrained", "t5_tasks_none"),
        Figure("trec/text_to_text/trec/accuracy", "TREC as text, tuned; unpretrained", "t5_tasks_none"),
    )),
    "t5_tasks_none": Row(config="t5_tasks", run="t5_tasks_none", overrides=("init=''",)),
    "ul2": Row(tune={"trec": "TREC, tuned"}),
    "gpt": Row((
        Figure("shakespeare/text/bits_per_byte", "tinyshakespeare, nats a character; nanoGPT's CPU recipe", "1.88",
               math.log(2), True),
    )),
    "mae": Row(probes("mae", "cifar10")),
    "audio_mae": Row(probes("audio_mae", "esc10", "digits")),
    "data2vec": Row(probes("data2vec", "cifar10", "esc10", "digits")),
    "views": Row(probes("views", "cifar10", "esc10", "digits")),
    "clip": Row((
        *RETRIEVAL,
        Figure("cifar10/zero_shot/image/accuracy", "CIFAR-10 zero-shot, prompt ensemble"),
        Figure("esc10/zero_shot/audio/accuracy", "ESC-10 zero-shot, prompt ensemble"),
    )),
    "codes": Row((
        Figure("photos/reconstruction/image/psnr", "PSNR of held-out photos, dB; their mean color"),
        Figure("photos/reconstruction/image/psnr", "the same; the aim", "22"),
        Figure("all/reconstruction/image/codebook_use", "codes used by all held-out pictures; the aim", "0.9"),
    )),
    "audio_codes": Row((
        Figure("spoken/reconstruction/audio/snr", "signal to noise of words' log-mel spectrograms, dB; their mean"),
        Figure("spoken/reconstruction/audio/codebook_use", "codes used by held-out words; the aim", "0.9"),
    )),
    "scene_codes": Row((
        Figure("scenes/reconstruction/image/psnr", "PSNR of held-out scenes, dB; their mean color"),
    )),
}  # fmt: skip

FOUNDATION = "foundation"
REMEDIES = {  # what is changed in configs/foundation.yaml
    "foundation_balance": (
        "loss balance",
        "monitors.balance={figure: grad_share/*/*, below: 0.08, every: 10, after: 20, action: reweigh}",
    ),
    "foundation_experts": ("experts", "model.backbone.experts=true"),
    "foundation_shares": (
        "shares",
        "tasks.words.batch_size=72", "tasks.next.batch_size=8", "tasks.restore.batch_size=8",
        "tasks.captions.batch_size=8", "tasks.patches.batch_size=64", "tasks.sounds.batch_size=40",
        "tasks.latents.batch_size=12", "tasks.views.batch_size=16", "tasks.pairs.batch_size=48",
    ),
}  # fmt: skip
SPECIALISTS = {  # what configs/foundation.yaml is compared with, figure by figure
    "mae": probes("mae", "cifar10"),
    "views": probes("views", "cifar10"),
    "audio_mae": probes("audio_mae", "esc10", "digits"),
    "clip": RETRIEVAL,
}
ROWS |= {
    name: Row(
        (*RETRIEVAL, *probes(FOUNDATION, "cifar10", "esc10", "digits"),
         Figure("captions/captions/chrf", "captions of Flickr8k, chrF; those of other pictures")),
        config=FOUNDATION, run=name, overrides=tuple(overrides[1:]),
        tune={} if overrides else {"trec": TUNED["trec"]},
    )
    for name, overrides in {FOUNDATION: (), **REMEDIES}.items()
}  # fmt: skip


class Bench:
    """What was measured, in benchmarks/results/classics.json; it is written after each command."""

    def __init__(self, file: Path):
        self.file = file
        self.results = json.loads(file.read_text()) if file.exists() else {}
        for part in ("runs", "figures", "tunes", "untrained"):
            self.results.setdefault(part, {})
        self.results["machine"] = (
            f"{platform.machine()}, {torch.get_num_threads()} threads a run, torch {torch.__version__}"
        )

    def save(self) -> None:
        """What another process has measured meanwhile is kept."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        there = json.loads(self.file.read_text()) if self.file.exists() else {}
        for part, own in self.results.items():
            if isinstance(own, dict):
                own |= {name: one for name, one in there.get(part, {}).items() if name not in own}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        part.rename(self.file)

    def command(self, *words: str) -> str:
        """Run `mmfm` with these words; its standard output. Raises CalledProcessError."""
        print("mmfm", *words, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "multimodal_fm", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        done.check_returncode()
        return done.stdout

    def train(self, config: str, run: str, overrides: tuple[str, ...] = ()) -> None:
        """Unless the run is there; its minutes, steps and parameters are kept."""
        folder = ROOT / "runs" / run
        if not list(folder.glob("checkpoints/step-*")):
            self.command("pretrain", f"configs/{config}.yaml", f"run_dir=runs/{run}", *overrides)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "seconds" in row and "step" in row]
        self.results["runs"][run] = {
            "steps": steps[-1]["step"],
            "minutes": sum(row["seconds"] for row in steps) / 60,
            "tokens": sum(row["tokens"] for row in steps),
        }
        self.save()

    def evaluate(self, run: str) -> dict:
        return json.loads(self.command("evaluate", f"runs/{run}", "--json"))

    def measure(self, name: str) -> None:
        row = ROWS[name]
        run = row.run or name
        if name == "t5_tasks" and "t5_tasks_none" not in self.results["figures"]:
            self.measure("t5_tasks_none")
        self.train(row.config or name, run, row.overrides)
        if row.figures or row.run:
            self.results["figures"][name] = self.evaluate(run)
            self.save()
        for other in {figure.baseline for figure in row.figures} & set(ROWS) - {"t5_tasks_none"}:
            if other not in self.results["untrained"]:
                self.command("pretrain", f"configs/{other}.yaml", f"run_dir=runs/{other}_untrained", *UNTRAINED)
                self.results["untrained"][other] = self.evaluate(f"{other}_untrained")
                self.save()
        for task in row.tune:
            for base, like in ((f"runs/{run}", ()), ("none", ("--like", f"runs/{run}"))):
                key = f"{name}/{task}/{'none' if like else 'pretrained'}"
                if key not in self.results["tunes"]:
                    self.results["tunes"][key] = self.tune(base, task, key.replace("/", "-"), like, row.steps)
                    self.save()
            runs = (f"runs/tuned-{name}-{task}-{way}" for way in ("none", "pretrained"))
            paired = json.loads(self.command("compare", *runs, "--json"))["paired"]["test"]
            self.results["tunes"][f"{name}/{task}/difference"] = paired
            self.save()

    def tune(self, base: str, task: str, folder: str, like: tuple[str, ...], steps: int) -> dict:
        """The figure of the test part after `steps` steps of labels; the best of four checkpoints on a part of them."""
        began = time.monotonic()
        said = self.command(
            "tune", base, "--task", "text-classification", "--label", "label", *like, "--json",
            "--data", *(str(one.relative_to(ROOT)) for one in sorted((ROOT / SHARDS / task).glob("train-*.jsonl"))),
            "--test", *(str(one.relative_to(ROOT)) for one in sorted((ROOT / SHARDS / task).glob("test-*.jsonl"))),
            f"run_dir=runs/tuned-{folder}", f"steps={steps}", f"optim.warmup_steps={steps // 10}", "ema_decay=0.97",
            f"save_every={steps // 4}", f"evaluate_every={steps // 4}", "tasks.tune.batch_size=32",
        )  # fmt: skip
        result = json.loads(said)
        figure = result["test"][result["metric"]] if isinstance(result["test"], dict) else {}
        return {**figure, "steps": steps, "seconds": time.monotonic() - began}


def run_nanogpt(folder: Path, threads: int) -> dict:
    """nanoGPT's CPU recipe by its own code: seconds of its training loop, and the losses that it prints."""
    data = folder / "data/shakespeare_char"
    if not (data / "train.bin").exists():
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True)
    words = (
        "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
        "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "train.py", *words.split()],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    losses = re.findall(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)", done.stdout)
    rows = [[int(step), float(train), float(validation)] for step, train, validation in losses]
    return {"seconds": time.monotonic() - began, "threads": threads, "losses": rows}


def tables(results: dict) -> dict[str, list[list]]:
    rows: list[list] = [["configuration", "steps", "minutes", "figure; baseline", "ours", "95 %", "baseline", "better"]]
    for name, row in ROWS.items():
        run = results["runs"].get(row.run or name)
        if run is None or name in REMEDIES:
            continue
        start = [f"`{name}`", run["steps"], f"{run['minutes']:.0f}"]
        for figure in row.figures:
            ours = results["figures"].get(name, {}).get(figure.name)
            own = ["not measured", "", "", ""] if ours is None else compare(results, figure, ours)
            rows.append([*start, figure.says, *own])
        for task, said in row.tune.items():
            ours, none = (results["tunes"].get(f"{name}/{task}/{way}") for way in ("pretrained", "none"))
            paired = results["tunes"].get(f"{name}/{task}/difference")
            if ours and none and paired:
                said_of = "yes" if paired["low"] > 0 else "within the interval" if paired["difference"] > 0 else "no"
                interval = f"difference {paired['low']:+.3f} to {paired['high']:+.3f}"
                rows.append(
                    [*start, f"{said}; unpretrained", f"{ours['value']:.3f}", interval, f"{none['value']:.3f}", said_of]
                )
    found = {"Every classic against its baseline": rows}
    if FOUNDATION in results["figures"]:
        found["One model of all objectives against each specialist"] = against_specialists(results)
    if nano := results.get("nanogpt"):
        found["nanoGPT's own code beside it"] = [
            ["", "nats a character on held-out text", "seconds"],
            ["nanoGPT", nano["losses"][-1][2], f"{nano['seconds']:.0f}"],
            [
                "`gpt`",
                f"{results['figures']['gpt'][ROWS['gpt'].figures[0].name]['value'] * math.log(2):.4f}",
                f"{nano['ours']['seconds']:.0f}",
            ],
        ]
    return found


def against_specialists(results: dict) -> list[list]:
    """Each specialist's figures beside those of `foundation` and its remedies; in brackets the share of its own."""
    runs = {FOUNDATION: ("as it is",), **REMEDIES}
    runs = {name: said[0] for name, said in runs.items() if name in results["figures"]}
    rows: list[list] = [["specialist", "figure", "its own", *runs.values()]]
    minutes = [f"{results['runs'][name]['minutes']:.0f}" for name in runs]
    tokens = [describe_tokens(results, name) for name in runs]
    for specialist, figures in SPECIALISTS.items():
        if specialist not in results["figures"]:
            continue
        rows.append([f"`{specialist}`", "minutes", f"{results['runs'][specialist]['minutes']:.0f}", *minutes])
        rows.append([f"`{specialist}`", "million tokens read", describe_tokens(results, specialist), *tokens])
        for figure in figures:
            own = results["figures"][specialist][figure.name]["value"]
            theirs = [results["figures"][name][figure.name]["value"] for name in runs]
            cells = [f"{value:.3f} ({value / own:.0%})" for value in theirs]
            rows.append([f"`{specialist}`", figure.says, f"{own:.3f}", *cells])
    own = results["tunes"].get("bert/trec/pretrained")
    theirs = [results["tunes"].get(f"{name}/trec/pretrained") for name in runs]
    if own and any(theirs):
        cells = [f"{one['value']:.3f} ({one['value'] / own['value']:.0%})" if one else "" for one in theirs]
        rows.append(["`bert`", TUNED["trec"], f"{own['value']:.3f}", *cells])
    return rows


def describe_tokens(results: dict, run: str) -> str:
    """Millions of tokens, which the same backbone reads at the same cost on any machine; an early run did not count."""
    count = results["runs"][run].get("tokens")
    return "" if count is None else f"{count / 1e6:.2f}"


def compare(results: dict, figure: Figure, ours: dict) -> list:
    if figure.baseline == "chance":
        base = ours["chance"]
    elif figure.baseline in results["untrained"]:
        base = results["untrained"][figure.baseline].get(figure.name, {}).get("value")
    elif figure.baseline in results["figures"]:
        base = results["figures"][figure.baseline].get(figure.name, {}).get("value")
    else:
        base = float(figure.baseline) / figure.unit if re.fullmatch(r"[\d.]+", figure.baseline) else None
    scaled = {key: ours[key] * figure.unit for key in ("value", "low", "high")}
    return compare_values(scaled, None if base is None else base * figure.unit, figure.lower)


def compare_values(ours: dict, base: float | None, lower: bool = False) -> list:
    """Ours, its interval, the baseline, and whether all of the interval is better than it."""
    if base is None:
        return [f"{ours['value']:.3f}", f"{ours['low']:.3f} to {ours['high']:.3f}", "not measured", ""]
    surely = ours["high"] < base if lower else ours["low"] > base
    better = ours["value"] < base if lower else ours["value"] > base
    said = "yes" if surely else "within the interval" if better else "no"
    return [f"{ours['value']:.3f}", f"{ours['low']:.3f} to {ours['high']:.3f}", f"{base:.3f}", said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=ROWS, help="configurations")
    parser.add_argument("--again", action="store_true", help="measure what was measured")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    parser.add_argument(
        "--nanogpt", type=Path, help="a clone of karpathy/nanoGPT, whose code is run beside configs/gpt.yaml"
    )
    parser.add_argument("--out", type=Path, default=OUT / "classics.json")
    options = parser.parse_args()
    bench = Bench(options.out)
    for name in () if options.table else options.only or ROWS:
        done = name in bench.results["figures"] or any(key.startswith(f"{name}/") for key in bench.results["tunes"])
        if not done or options.again or options.only:
            bench.measure(name)
    if options.nanogpt:
        bench.results["nanogpt"] = run_nanogpt(options.nanogpt, torch.get_num_threads())
        began = time.monotonic()
        bench.command("pretrain", "configs/gpt.yaml", f"run_dir={options.nanogpt / 'ours'}")
        bench.results["nanogpt"]["ours"] = {"seconds": time.monotonic() - began}
        bench.save()
    found = tables(bench.results)
    text = "\n\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in found.items())
    bench.file.with_suffix(".md").write_text(f"{text}\n\n{bench.results['machine']}\n")
    print(text)


if __name__ == "__main__":
    main()
