"""A training step of ours against that of a peer: BERT, GPT-2, OpenCLIP, AST and ViT-MAE of equal width and depth.

    PYTHONPATH=. python benchmarks/step.py [--only masked-128 ...] [--quick] [--json]

Both take the same samples through a whole step (forward, backward, clipping, AdamW; ours keeps averaged weights
besides), each in a process of its own, in turns; figures are medians. The machine's rate is that of a matrix product
after each step.
`--parts CONFIG` says what the parts of one of our own steps take instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, about, device, first_line, markdown, timed, write_results
from contests import CONTESTS, Contest, count_real, draw_step, make_batches, make_config
from flops import counted, product_rate
from peers import BUILDERS, make_step

UTILISATION = 0.85  # of the matrix product's rate, asked of ours
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTS), default=list(CONTESTS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small steps, three turns; within ten minutes")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--turns", type=int, help="in place of 5, or 3 with --quick")
    parser.add_argument("--classic", action="store_true", help="ours with the peers' own kind of block")
    parser.add_argument("--save", action="store_true", help="write results/step.json and step.md")
    parser.add_argument("--parts", metavar="CONFIG", help="the parts of a step of this configuration, and nothing else")
    given = parser.parse_args()
    if given.parts:
        import parts

        parts.print_parts(given.parts)
        return 0
    rows = []
    for name in given.only:
        turns = given.turns or (3 if given.quick else 5)
        rows.append(compare(name, given.quick, turns, "classic" if given.classic else "modern"))
        if given.json:
            print(json.dumps(rows[-1]), flush=True)
    text = markdown(table(rows))
    if not given.json:
        print(text)
    if given.save:
        save(rows)
    return int(any(row["ratio"] is None or not row["passed"] for row in rows))


def compare(name: str, quick: bool, turns: int, block: str) -> dict[str, Any]:
    """One line of the results. A side that fails leaves its error in place of a figure."""
    sides = {side: Process(side, name, quick, turns, block) for side in ("ours", "theirs")}
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    errors: dict[str, str] = {}
    try:
        abouts = {side: one.ask("build") for side, one in sides.items()}
        for turn in range(-1, turns):  # the first one warms up
            for side, one in sides.items():
                found = one.ask(turn % turns)
                if "error" in found:
                    errors[side] = found["error"]
                elif turn >= 0:
                    rounds[side].append(found)
        peaks = {side: one.ask("peak") for side, one in sides.items()}
    finally:
        for one in sides.values():
            one.stop()
    errors |= {side: one["error"] for side, one in abouts.items() if "error" in one}
    row = summarize(CONTESTS[name], rounds)
    row |= {
        "name": name,
        "peer": abouts["theirs"].get("peer", CONTESTS[name].peer),
        "runs": turns,
        "padding": abouts["theirs"].get("padding"),
        "parameters": {side: one.get("parameters") for side, one in abouts.items()},
        "peak_gib": {side: one.get("gib") for side, one in peaks.items()},
        "block": block,
        **({"errors": errors} if errors else {}),
    }
    first = ("name", "peer", "ours", "theirs", "ratio", "unit", "runs")
    return {key: row[key] for key in (*first, *(key for key in row if key not in first))}


def summarize(contest: Contest, rounds: dict[str, list[dict]]) -> dict[str, Any]:
    """The medians over the turns."""
    rates = {side: median([one["real"] / one["seconds"] for one in own]) for side, own in rounds.items()}
    by_cpu = {side: median([one["real"] / one["cpu"] for one in own]) for side, own in rounds.items()}
    use = median([one["flops"] / one["seconds"] / one["product"] for one in rounds["ours"]])
    ratio = quotient(rates)
    return {
        **rates,
        "unit": contest.unit,
        "ratio": ratio,
        "aim": contest.aim,
        "utilisation": use,
        "passed": bool(ratio and use and ratio >= contest.aim and use >= UTILISATION),
        "by_cpu": {  # the same by CPU time, of which other work on the machine takes nothing away
            "ratio": quotient(by_cpu),
            "utilisation": median([one["flops"] / one["cpu"] / one["product_cpu"] for one in rounds["ours"]]),
        },
        "seconds": {side: median([one["seconds"] for one in own]) for side, own in rounds.items()},
        "tflop": median([one["flops"] / 1e12 for one in rounds["ours"]]),
        "product_gflops": median([one["product"] / 1e9 for one in rounds["ours"]]),
    }


def quotient(rates: dict[str, float | None]) -> float | None:
    ours, theirs = rates["ours"], rates["theirs"]
    return ours / theirs if ours and theirs else None


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


class Process:
    """A contestant in a process of its own, so that neither has the other's memory, caches or threads."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str | int) -> dict:
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return {"error": f"the process ended with code {self.process.exitcode}"}

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def answer(pipe: Connection, side: str, name: str, quick: bool, turns: int, block: str) -> None:
    """What a contestant's process does: `build`, then the step of each number that it is asked for, `peak`."""
    one: Any = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            if what == "build":
                steps = [draw_step(CONTESTS[name], CONTESTS[name].batch_size[quick], seed) for seed in range(turns)]
                one = (Ours if side == "ours" else Theirs)(CONTESTS[name], steps, block)
                reply = one.about()
            elif one is None:
                reply = {"error": "it could not be built"}
            elif what == "peak":
                reply = {"gib": peak_memory() / GIB}
            else:
                reply = one.step(what)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            reply = {"error": first_line(error)}
        pipe.send(reply)


class Ours:
    """`TrainStep`, as `mmfm pretrain` has it."""

    def __init__(self, contest: Contest, steps: list, block: str):
        from multimodal_fm.train.train_step import TrainStep

        torch.manual_seed(0)
        config = make_config(contest, contest.batch_size[0], block)
        self.batches = [make_batches(contest, config, samples, seed) for seed, samples in enumerate(steps)]
        self.real = [count_real(contest, samples) for samples in steps]
        self.trained, self.number = TrainStep(config, device()), 0

    def about(self) -> dict:
        return {"parameters": sum(one.numel() for one in self.trained.parameters)}

    def step(self, which: int) -> dict:
        with counted(self.trained.trained) as flops:  # its hooks cost a millisecond
            took, cpu = timed(lambda: self.trained(self.number, self.batches[which]))
        self.number += 1
        product, product_cpu = product_rate(device=str(device()))
        found = {"seconds": took, "cpu": cpu, "real": self.real[which], "flops": flops[0]}
        return found | {"product": product, "product_cpu": product_cpu}


class Theirs:
    def __init__(self, contest: Contest, steps: list, block: str):
        torch.manual_seed(0)
        self.name, self.model, losses, self.padding = BUILDERS[contest.peer](steps, device())
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.steps = [make_step(self.model, loss, optimizer) for loss in losses]
        self.real = [count_real(contest, samples) for samples in steps]

    def about(self) -> dict:
        parameters = sum(one.numel() for one in self.model.parameters())
        return {"peer": self.name, "padding": self.padding, "parameters": parameters}

    def step(self, which: int) -> dict:
        took, cpu = timed(self.steps[which])
        return {"seconds": took, "cpu": cpu, "real": self.real[which]}


def peak_memory() -> int:
    """The most bytes that this process has held: on a GPU there, else in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def table(rows: list[dict]) -> list[list]:
    head = [
        "",
        "peer",
        "ours",
        "theirs",
        "unit",
        "ratio",
        "aim",
        "utilisation",
        "ratio by CPU time",
        "utilisation by it",
    ]
    head += ["padding", "GiB, ours", "GiB, theirs"]
    return [head, *([show(cell) for cell in cells(row)] for row in rows)]


def cells(row: dict) -> list:
    names = ("name", "peer", "ours", "theirs", "unit", "ratio", "aim", "utilisation")
    by_cpu, peaks = row["by_cpu"].values(), row["peak_gib"]
    return [*(row[name] for name in names), *by_cpu, row["padding"], peaks["ours"], peaks["theirs"]]


def show(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if cell >= 100 else f"{cell:.2f}"
    return "" if cell is None else str(cell)


def save(rows: list[dict]) -> None:
    """results/step.json and step.md, with the machine, the versions and the commit; names not run stay as they were."""
    file = RESULTS / "step.json"
    where = about("transformers", "open_clip_torch") | {"threads": torch.get_num_threads()}
    kept = {row["name"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    kept |= {row["name"]: {**row, "on": where} for row in rows}
    ordered = [kept[name] for name in CONTESTS if name in kept]
    text = f"{markdown(table(ordered))}\n\nThe last run:"
    write_results(RESULTS, "step", "Training steps against peers", where, ordered, text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
