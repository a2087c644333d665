"""Is the stream exact? A run that is killed, resumed and moved to other ranks, against one that is left alone.

    PYTHONPATH=. python benchmarks/stream.py [--kills 100] [--world 1,2,1] [--json]

kills: `kill -9` at random instants of a run over a three-source mixture with two workers, each followed by `--resume`;
the samples of every step, the losses and the last weights must be those of the run that was left alone, bit for bit.
world: the same run by other numbers of processes between its resumes; the samples of every step must be the same.
seek: opening a stream over 1,000 shards of 10,000 samples at sample 0 and at sample 10,000,000.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch

from multimodal_fm.corpus import index, shards
from multimodal_fm.stream.dataset import StepDataset, Task
from multimodal_fm.tokenizers import text
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

STEPS, EVERY, BATCH_SIZE = 240, 10, 8


def corpora(folder: Path) -> dict:
    """Three sources of captions and small pictures, one of them tiny, one with broken samples."""
    import io

    from PIL import Image

    sources = {}
    generator = np.random.default_rng(0)
    for name, count in (("large", 600), ("small", 7), ("broken", 150)):
        samples = []
        for number in range(count):
            picture = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(picture, "JPEG")
            caption = " ".join(generator.choice(["red", "green", "square", "circle", "above", "a", "two"], 6))
            broken = name == "broken" and number % 50 == 3
            text_bytes = b"\xff\xfe\xfa" if broken else f"{caption} {number}".encode()
            samples.append({"__key__": f"{name}{number}", "jpg": picture.getvalue(), "txt": text_bytes})
        for part in range(2):
            shards.write(folder / f"{name}-{part}.tar", samples[part::2])
        sources[name] = {"shards": f"{folder}/{name}-*.tar"}
    return sources


def settings(folder: Path, run: str, **changes) -> dict:
    words = {
        "objectives": {"masked": {}},
        "modalities": ["text"],
        "batch_size": BATCH_SIZE,
        "sources": {"large": 5, "small": 1, "broken": 2},
    }
    pairs = {
        "objectives": {"contrastive": {}},
        "modalities": ["text", "image"],
        "batch_size": BATCH_SIZE,
        "sources": {"large": 3, "small": 1},
    }
    return {
        "sources": corpora_of(folder),
        "tasks": {"words": words, "pairs": pairs},
        "model": {
            "tokenizers": {
                "text": {"vocab_size": 300, "max_tokens": 16},
                "image": {"patch": 8, "max_tokens": 6, "min_crop_scale": 0.5},
            },
            "backbone": {"width": 32, "depth": 1, "num_heads": 2},
            "heads": {"retrieval": {"embed_dim": 16}},
        },
        "optim": {"lr": 3e-3, "warmup_steps": 5, "schedule": "constant"},
        "steps": STEPS,
        "save_every": EVERY,
        "threads": 1,
        "num_workers": 2,
        "log_samples": True,
        "run_dir": str(folder / run),
        **changes,
    }


def corpora_of(folder: Path) -> dict:
    return {name: {"shards": f"{folder}/{name}-*.tar"} for name in ("large", "small", "broken")}


def child(data: dict, resume: bool) -> int:
    """The training in a process of its own (forked, so that a start costs no imports); its process id."""
    number = os.fork()
    if number:
        return number
    os.setsid()  # its workers die with it when the group is killed
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        loop.pretrain(build(data), resume=resume)
        os._exit(0)
    except BaseException as error:
        Path(data["run_dir"] + ".error").write_text(repr(error))
        os._exit(1)


def records(run: Path) -> tuple[list, list, bytes]:
    """Samples and losses of every step, and the last weights."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    losses = [
        {k: v for k, v in json.loads(line).items() if k.startswith("loss") or k in ("step", "norm")}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    weights = (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()
    return samples, losses, weights


def differences(wanted: list, found: list) -> tuple[int, int]:
    """StepDataset' samples that are missing from `found`, and those that are there more than once or should not be."""
    one, other = (collections.Counter(f"{row['step']} {name} {place}" for row in rows for place, name in
                                      enumerate(row["samples"])) for rows in (wanted, found))  # fmt: skip
    return sum((one - other).values()), sum((other - one).values())


def kills(folder: Path, count: int, seed: int) -> dict:
    draw = random.Random(seed)
    began = time.monotonic()
    os.waitpid(child(settings(folder, "alone"), False), 0)
    length = time.monotonic() - began
    samples, losses, weights = records(folder / "alone")
    done = finished = lost = repeated = other_losses = other_weights = failed = 0
    at_step: list[int] = []
    while done < count:
        name = f"killed-{finished}"
        data = settings(folder, name)
        run = Path(data["run_dir"])
        while True:
            number = child(data, run.is_dir() and any(run.iterdir()))
            until, status = time.monotonic() + draw.uniform(0, length / 2), 0
            while time.monotonic() < until and not status:
                status = os.waitpid(number, os.WNOHANG)[0]
                time.sleep(0.002)
            if status:
                break  # it came to its end
            if done < count:
                os.killpg(number, signal.SIGKILL)
                done += 1
            code = os.waitpid(number, 0)[1]
            if (run / "metrics.jsonl").exists():
                at_step.append(len((run / "metrics.jsonl").read_bytes().splitlines()))
            if code == 0:
                break
            print(f"\r{done} of {count} kills, {finished} runs compared", end="", file=sys.stderr, flush=True)
        if Path(data["run_dir"] + ".error").exists():
            failed += 1
            print("\n" + Path(data["run_dir"] + ".error").read_text(), file=sys.stderr)
            break
        theirs = records(run)
        missing, extra = differences(samples, theirs[0])
        lost, repeated = lost + missing, repeated + extra
        other_losses += losses != theirs[1] or samples != theirs[0]
        other_weights += weights != theirs[2]
        finished += 1
        shutil.rmtree(run)
    print(file=sys.stderr)
    return {
        "name": "kills",
        "kills": done,
        "runs": finished,
        "steps_when_killed": f"{min(at_step, default=0)} to {max(at_step, default=0)}, {len(set(at_step))} different",
        "samples_a_run": sum(len(row["samples"]) for row in samples),
        "lost": lost,
        "repeated": repeated,
        "runs_with_other_losses": other_losses,
        "runs_with_other_weights": other_weights,
        "failed": failed,
        "ok": not (lost or repeated or other_losses or other_weights or failed),
    }


def world(folder: Path, ranks: list[int]) -> dict:
    """Other numbers of processes between resumes."""
    steps = 20 * len(ranks)
    plain = settings(folder, "plain", steps=steps, microbatches=4)
    os.waitpid(child(plain, False), 0)
    changing = settings(folder, "changing", microbatches=4)
    for turn, size in enumerate(ranks):
        path = folder / "changing.json"
        path.write_text(json.dumps({**changing, "steps": 20 * (turn + 1)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command += ["-m", "multimodal_fm", "pretrain", str(path), *(["--resume"] if turn else [])]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
    samples, theirs = ([json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]
                     for name in ("plain", "changing"))  # fmt: skip
    losses = [
        [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "changing")
    ]
    missing, extra = differences(samples, theirs)
    return {
        "name": "world",
        "ranks": ranks,
        "steps": steps,
        "lost": missing,
        "repeated": extra,
        "same_order": samples == theirs,
        "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "ok": samples == theirs,
    }


def seek(folder: Path, count: int = 1000, size: int = 10_000) -> dict:
    """Seconds from nothing to the first step of a stream over `count` shards, at its beginning and far along."""
    first = folder / "seek-00000.tar"
    shards.write(first, ({"__key__": f"{i:06d}", "txt": f"caption number {i}"} for i in range(size)))
    made = index.build(str(first))
    for number in range(1, count):
        other = folder / f"seek-{number:05d}.tar"
        os.link(first, other)
        os.link(made.file, f"{other}.mmidx")
    words = text.Tokenizer(text.Config(vocab_size=300, max_tokens=16)).fit(
        ({"txt": b"caption number"} for _ in range(1)), folder / "words"
    )
    tokenizers = {"text": words}

    def open_at(sample: int) -> float:
        began = time.perf_counter()
        corpus = shards.Corpus(shards.Config(f"{folder}/seek-*.tar"), "many")
        task = Task("words", BATCH_SIZE, ["text"], [corpus], [(0, [1.0])], _nothing, grouped=False)
        StepDataset([task], tokenizers, 0)[sample // BATCH_SIZE]
        return time.perf_counter() - began

    open_at(0)
    taken = {sample: [] for sample in (0, 10_000_000)}
    for _ in range(5):
        for sample, times in taken.items():
            times.append(open_at(sample))
    near, far = (statistics.median(times) for times in taken.values())
    return {
        "name": "seek",
        "samples": count * size,
        "seconds_at_0": round(near, 3),
        "seconds_at_10_000_000": round(far, 3),
        "ok": far < 1 and far < 1.5 * near,
    }


def _nothing(sample, generator):
    from multimodal_fm.batch import Example

    return Example(list(sample.tokens.values()), [None] * len(sample.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--world", default="1,2,1", help="numbers of processes, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object a line")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for stage in ("kills", "world", "seek"):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if stage != "seek":
                corpora(folder)
            if stage == "kills" and given.kills:
                results.append(kills(folder, given.kills, given.seed))
            elif stage == "world" and given.world:
                results.append(world(folder, [int(size) for size in given.world.split(",")]))
            elif stage == "seek":
                results.append(seek(folder))
    for result in results:
        if given.json:
            print(json.dumps(result))
        else:
            print(f"{result.pop('name')}: {'ok' if result.pop('ok') else 'NOT OK'}")
            for name, value in result.items():
                print(f"  {name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    main()
