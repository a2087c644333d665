"""`mmfm plan`: what a run will hold, compute, take and read, before it is paid for; of a run, how that compares.

The stream is read for a few steps, and a step runs on the meta device, where nothing is allocated (`trace`). This
machine is measured (`calibrate`); of an accelerator that is named, data sheets and stated assumptions tell the time.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..batch import with_counts
from ..corpus.shards import Corpus
from ..errors import UserError
from ..model import pick_device, read_config
from ..run_dir import checkpoint
from ..run_dir.records import read_jsonl
from ..stream.dataset import Step, StepDataset
from ..stream.tasks import build_stream, fit_tokenizers
from ..stream.token_counts import TokenCounter
from ..tokens import FILLER
from . import accelerators as acc
from .config import TrainConfig, build, load
from .estimate import Accelerators, Read, ThisMachine
from .setup import open_sources
from .trace import Trace, trace

HOUR = 3600.0
STEPS_READ = 3  # of the stream
TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022 (Chinchilla): of text, for one pass over it
PASSES = 4  # over a corpus that are nearly as good as new tokens (Muennighoff et al. 2023)
SETTLED = 5  # steps of a run before its pace is that of the rest


def plan(
    target: str, settings: Sequence = (), gpus: int = 1, kind: str = "auto", utilization: float = 0.0
) -> dict[str, Any]:
    """The plan of a run, as plain data (see `reports.plan`); with what was measured where `target` is a run's folder.

    gpus: how many devices of `kind`: `auto` and `cpu` are this machine's, which is measured; the others are those of
    `accelerators`. utilization: of an accelerator's peak, in place of the assumed one. Raises UserError.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: is at least 1")
    if not 0 <= utilization <= 1:
        raise UserError(f"--utilization {utilization:g}: is a share from 0 to 1")
    named = None if kind in ("auto", "cpu") else acc.find(kind)
    if gpus > 1 and not named:
        raise UserError(f"--gpus {gpus}: one device of this machine is measured; say which they are, as in --kind h100")
    run = Path(target) if (Path(target) / "checkpoints").is_dir() else None
    config = _config_of(run, settings) if run else load(target, list(settings))
    if kind == "cpu":
        config = dataclasses.replace(config, device="cpu")
    if named and config.precision not in named.tflops:
        raise UserError(f"--kind {kind}: {named.name} has no products in {config.precision}: set another precision")
    if named:
        config.parallel.check(gpus)
    with tempfile.TemporaryDirectory(prefix="multimodal_fm-plan-") as folder:
        corpora = open_sources(config)
        tokenizers = fit_tokenizers(config.tasks, corpora, config.model.tokenizers, config.seed, Path(folder))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizers=tokenizers))
        stream = build_stream(
            config.tasks, corpora, tokenizers, config.seed, config.microbatches, config.round_to, 0, gpus,
            heads=config.model.heads,
        )  # fmt: skip
        read = _read(stream)
        traced = _trace(config, read, gpu=bool(named) or pick_device(config.device).type == "cuda")
        device = Accelerators(config, named, gpus, utilization) if named else ThisMachine(config, traced, read)
        return {
            "target": target,
            "run_dir": config.run_dir,
            "steps": config.steps,
            "device": device.describe(),
            "parameters": {
                "total": sum(traced.parameters.values()),
                "trainable": traced.trainable,
                "by_part": traced.parameters,
            },
            "step": _describe_step(config, traced, read, gpus),
            "memory": device.memory(traced, read),
            "time": (spent := _time(config, device.seconds(traced, read), read, gpus)),
            "energy": device.energy(spent["hours"]),
            "disk": _disk(config, traced),
            "corpus": _corpus(config, corpora, stream, read, traced, gpus),
            "measured": _measured(run) if run else None,
            "assumptions": device.assumptions,
        }


def _config_of(run: Path, settings: Sequence) -> TrainConfig:
    """A run's own configuration, with the tokenizers that it has learned."""
    if settings:
        raise UserError(f"{run} is a run, whose settings stand: name a configuration to change them")
    folder = checkpoint.newest(run)
    config = build(checkpoint.read_data(folder, "config"), str(folder))
    model = dataclasses.replace(config.model, tokenizers=read_config(folder).tokenizers)
    return dataclasses.replace(config, model=model, run_dir=str(run))


def _read(stream: StepDataset) -> Read:
    """A few steps, read in one thread as a worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps: list[Step] = []
    seconds = []
    try:
        for number in range(STEPS_READ):
            began = time.process_time()
            steps.append(stream[number])
            seconds.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    if not any(step.batches for step in steps):
        raise UserError("not one sample of the first steps could be read: `mmfm inspect` says what is wrong")
    sizes = [sum(len(batch.tokens) for batch in step.batches) for step in steps]
    filler = [sum(int((batch.tokens.sequence == FILLER).sum()) for batch in step.batches) for step in steps]
    largest = steps[max(range(len(steps)), key=sizes.__getitem__)]
    content = [
        sum(one.numel() * one.element_size() for batch in step.batches for one in batch.content.values())
        for step in steps
    ]
    return Read(
        [with_counts(batch, largest.counts) for batch in largest.batches],
        statistics.mean(sizes),
        statistics.mean(filler),
        sum(task.batch_size for task in stream.tasks),
        max(content),
        min(seconds),
    )


def _trace(config: TrainConfig, read: Read, gpu: bool) -> Trace:
    """The trace of a step, with the work of all its tokens where only its largest microbatches are followed."""
    batches = read.largest()
    traced = trace(config, batches, gpu)
    share = read.tokens / sum(len(batch.tokens) for batch in batches)
    return dataclasses.replace(traced, flops=int(traced.flops * share))


def _describe_step(config: TrainConfig, traced: Trace, read: Read, ranks: int) -> dict[str, Any]:
    tokens = (read.tokens - read.filler) * ranks
    return {
        "samples": read.samples,
        "tokens": round(tokens),
        "filler": read.filler / read.tokens,
        "microbatches": config.microbatches,
        "flops": traced.flops * ranks,
        "update_flops": traced.update_flops,
        "flops_a_token": traced.flops * ranks / tokens,
    }


def _time(config: TrainConfig, seconds: dict[str, float], read: Read, ranks: int) -> dict[str, Any]:
    """Seconds of a step by what they are spent on, most of which goes on at the same time."""
    bottleneck = max(seconds, key=seconds.__getitem__)
    step = seconds[bottleneck]
    return {
        "parts": seconds,
        "step": step,
        "bottleneck": bottleneck,
        "tokens_a_second": (read.tokens - read.filler) * ranks / step,
        "hours": step * config.steps / HOUR,
    }


def _disk(config: TrainConfig, traced: Trace) -> dict[str, Any]:
    one = sum(traced.files.values())
    kept = config.keep + bool(config.best)
    return {"checkpoint": one, "files": traced.files, "kept": kept, "most": one * (kept + 1)}


def _corpus(
    config: TrainConfig, corpora: dict[str, Corpus], stream: StepDataset, read: Read, traced: Trace, ranks: int
) -> dict[str, Any]:
    """Tokens of the corpus and of the run, by source."""
    rows = []
    drawn = stream.samples_read_by_task(config.steps)
    for name, corpus in corpora.items():
        tasks = [task for task in config.tasks.values() if name in task.sources]
        modalities = [m for m in config.model.tokenizers if any(m in task.modalities for task in tasks)]
        if not modalities:
            continue
        counter = TokenCounter(corpus, modalities, config.model.tokenizers)
        samples = range(len(corpus))
        visits = sum(own.get(name, 0) for own in drawn.values())
        tokens = counter.total(samples)
        run = sum(
            own.get(name, 0)
            * TokenCounter(corpus, config.tasks[task].modalities, config.model.tokenizers).mean(samples)
            for task, own in drawn.items()
            if own.get(name)
        )
        rows.append(
            {"source": name, "samples": len(samples), "tokens": round(tokens), "visits": visits, "passes": run / tokens}
        )
    total = sum(row["tokens"] for row in rows)
    run = (read.tokens - read.filler) * ranks * config.steps
    wanted = TOKENS_A_PARAMETER * traced.trainable
    return {
        "sources": rows,
        "tokens": total,
        "run_tokens": round(run),
        "passes": run / max(total, 1),
        "wanted": wanted,
        "hint": f"{TOKENS_A_PARAMETER} tokens a parameter for one pass over text (Hoffmann et al. 2022); up to "
        f"{PASSES} passes are nearly as good as new tokens (Muennighoff et al. 2023)",
    }


def _measured(run: Path) -> dict[str, Any]:
    """What a run's own records say of the same figures."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "seconds" in row]
    if not rows:
        raise UserError(f"{run}: metrics.jsonl has no steps to compare with")
    settled = rows[SETTLED:] or rows
    return {
        "steps": len(rows),
        "tokens": statistics.mean(row["tokens"] for row in rows),
        "memory": max(row["memory_gb"] for row in rows) * 1e9,
        "step": statistics.median(row["seconds"] for row in settled),
        "fastest": min(row["seconds"] for row in settled),
        "data_wait": sum(row["data_wait"] for row in settled) / sum(row["seconds"] for row in settled),
        "checkpoint": sum(p.stat().st_size for p in checkpoint.newest(run).glob("*.safetensors")),
    }
