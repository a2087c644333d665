"""The same training step on one, two and four ranks: seconds, tokens a second, hidden communication, equal losses.

    PYTHONPATH=. python benchmarks/scale.py [--config configs/demo.yaml] [--ranks 1 2 4] [--kinds ddp fsdp] [--quick]

`torchrun` starts the ranks: gloo on a CPU, whose cores they share out among themselves, NCCL where each rank has a GPU.
Every number of ranks takes the same microbatches, so that the losses must be those of one rank. Samples are synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, about, markdown, seconds, write_results

from multimodal_fm.batch import Batch
from multimodal_fm.config import to_data
from multimodal_fm.train.config import TrainConfig, build, load

ROOT = Path(__file__).parents[1]
KINDS = ("ddp", "fsdp")
TOLERANCE = 1e-6  # of a loss in float32, beside that of one rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="the first is what the others are beside")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--strict", action="store_true", help="strict_numerics: the losses' bits must be equal")
    parser.add_argument("--quick", action="store_true", help="a small model, five steps")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--save", action="store_true", help="write results/scale.json and scale.md")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given, Path(given.worker))
        return 0
    rows, alone = [], None
    for kind in given.kinds:
        for size in given.ranks:
            if size == given.ranks[0] and alone is not None:
                continue  # the plain case is the same for all kinds
            found = launch(given, kind, size)
            alone = alone or found
            rows.append(row(kind, size, found, alone, given.strict))
            if given.json:
                print(json.dumps(rows[-1]), flush=True)
    text = markdown(table(rows))
    if not given.json:
        print(text)
    if given.save:
        write_results(RESULTS, "scale", "One, two and four ranks", about(), rows, text)
    return int(any("error" in one or not one["equal"] for one in rows))


def config(given: argparse.Namespace, kind: str) -> TrainConfig:
    """The configuration with four microbatches, whatever the number of ranks."""
    data: dict[str, Any] = to_data(load(ROOT / given.config)) | {"microbatches": 4, "parallel": {"kind": kind}}
    if given.strict:
        data["strict_numerics"] = True
    if given.quick:
        data["model"]["backbone"] = {"width": 96, "depth": 3, "num_heads": 4}
        for task in data["tasks"].values():
            task["batch_size"] = min(task["batch_size"], 32)
    return build(data, given.config)


def launch(given: argparse.Namespace, kind: str, size: int) -> dict[str, Any]:
    """What `size` ranks say of their steps; an error in its place where they fail."""
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // size)), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        options = ["--config", given.config, "--kinds", kind]
        options += ["--quick"] * given.quick + ["--strict"] * given.strict
        program = [str(Path(__file__).resolve()), "--worker", str(file), *options]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        how: Any = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 900}
        done = subprocess.run([*start, *program], **how)
        if done.returncode or not file.exists():
            sys.stderr.write(done.stderr[-4000:])
            return {"error": f"torchrun ended with code {done.returncode}"}
        return json.loads(file.read_text())


def work(given: argparse.Namespace, file: Path) -> None:
    """One rank: steps with the others, the same steps without their gradients, and the sum of the gradients alone."""
    from parts import synthetic

    from multimodal_fm.train import parallel
    from multimodal_fm.train.train_step import TrainStep

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = parallel.init(device)
    known = config(given, given.kinds[0])
    turns = 5 if given.quick else 10
    steps = [synthetic(known, seed, pairs=True) for seed in range(3)]
    own = range(ranks.rank * 4 // ranks.size, (ranks.rank + 1) * 4 // ranks.size)  # as the loader deals them
    mine: list[list[Batch]] = [[batches[i].to(device) for i in own] for batches in steps]
    trained = TrainStep(known, device, ranks)
    losses: list[float] = []
    for number in range(3):
        losses.append(float(trained(number, mine[number % 3])["loss"]))
    together = [seconds(lambda n=n: trained(3 + n, mine[n % 3])) for n in range(turns)]
    result: dict[str, Any] = {
        "losses": losses,
        "runs": turns,
        "seconds": slowest(ranks, together),
        "tokens": statistics.mean(sum(len(batch.tokens) for batch in batches) for batches in steps),
    }
    if ranks.size > 1:
        result |= communication(known, device, ranks, mine, turns)
    ranks.barrier() if hasattr(ranks, "barrier") else ranks.all_gather_objects(None)
    if ranks.is_first:
        file.write_text(json.dumps(result))
    parallel.shutdown()


def slowest(ranks, taken: list[float]) -> float:
    """The median over the steps of the time of the slowest rank."""
    return statistics.median(max(one) for one in zip(*ranks.all_gather_objects(taken), strict=True))


def communication(known: TrainConfig, device: torch.device, ranks, mine: list, turns: int) -> dict[str, float]:
    """Seconds of a step without other ranks, and of the sum of all gradients over them by itself."""
    from multimodal_fm.train.train_step import TrainStep

    alone = TrainStep(known, device)
    for number in range(2):
        alone(number, mine[number % 3])
    without, sums = [], []
    flat = torch.zeros(sum(weight.numel() for weight in alone.parameters), device=device)
    for number in range(turns):
        ranks.all_gather_objects(None)
        without.append(seconds(lambda n=number: alone(n, mine[n % 3])))
        ranks.all_gather_objects(None)
        sums.append(seconds(lambda: torch.distributed.all_reduce(flat)))
    return {"without": slowest(ranks, without), "sum": slowest(ranks, sums)}


def row(kind: str, size: int, found: dict, alone: dict, strict: bool) -> dict[str, Any]:
    name = f"scale-{kind.replace(' ', '-')}-{size}"
    if "error" in found or "error" in alone:
        return {"name": name, "peer": "one rank", "error": found.get("error", "one rank failed"), "equal": False}
    ours, theirs = (one["tokens"] / one["seconds"] for one in (found, alone))
    pairs = list(zip(found["losses"], alone["losses"], strict=True))
    difference = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
    hidden = None
    if "sum" in found:
        hidden = max(0.0, min(1.0, 1 - (found["seconds"] - found["without"]) / found["sum"]))
    return {
        "name": name,
        "peer": "one rank",
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "unit": "tokens/s",
        "runs": found["runs"],
        "seconds": found["seconds"],
        "without_others": found.get("without"),
        "sum_alone": found.get("sum"),
        "overlap": hidden,
        "difference": difference,
        "equal": difference == 0 if strict else difference <= TOLERANCE,
    }


def table(rows: list[dict]) -> list[list]:
    head = ["", "tokens/s", "of one rank", "s a step", "s without others", "s to sum", "hidden", "loss differs by"]
    cells = []
    for one in rows:
        if "error" in one:
            cells.append([one["name"], one["error"], *[""] * 6])
            continue
        numbers = [one[key] for key in ("seconds", "without_others", "sum_alone", "overlap")]
        shown = ["" if number is None else f"{number:.3f}" for number in numbers]
        cells.append([one["name"], f"{one['ours']:,.0f}", f"{one['ratio']:.2f}", *shown, f"{one['difference']:.1e}"])
    return [head, *cells]


if __name__ == "__main__":
    sys.exit(main())
