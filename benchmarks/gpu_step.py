"""How fast is a training step on a GPU? At ViT-B's size and at a billion parameters on real data, and against peers.

Everything is compiled and in bfloat16, the peers too. Utilisation is of the model's operations over the chip's peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import alternate, device, first_line, save, seconds
from contests import CONTESTS, Contest, contrastive, count_real, draw_step, make_batches, make_config
from flops import counted, product_rate
from peers import BUILDERS, make_step

from multimodal_fm.config import to_data
from multimodal_fm.train.config import TrainConfig, build, load
from multimodal_fm.train.train_step import TrainStep

PEAK = 989e12  # FLOP/s: bfloat16, dense, of an H100 or H200 (SXM)
ROOT = Path(__file__).parents[1]
TOY = {"width": 64, "depth": 2, "num_heads": 2}
SIZES = {
    "ViT-B": ({"width": 768, "depth": 12, "num_heads": 12}, 1),  # the backbone, and what batches are divided by
    "1 B parameters": ({"width": 2048, "depth": 20, "num_heads": 16}, 4),
}
BASE = CONTESTS["contrastive-b32"].backbone
PEERS: dict[str, tuple[Contest, int]] = {  # and samples a step
    "masked-128": (CONTESTS["masked-128"], 1024),
    "causal-512": (dataclasses.replace(CONTESTS["causal-512"], peer="nano_gpt"), 64),
    "contrastive-b16": (contrastive(BASE, 16, "clip_b16", (256, 8)), 256),
}
AIMS = {"masked-128": 1.8, "causal-512": 1.3, "contrastive-b16": 2.0}


def run(out: Path, small: bool) -> bool:
    """The two sizes; a size that fails (out of memory, say) leaves its error."""
    found, rate = {}, product_rate(512 if small else 8192, str(device()), dtype())[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, (backbone, divisor) in SIZES.items():
            try:
                found[name] = measure(mixed(Path(folder), small, backbone, divisor), small, out)
            except Exception as error:
                found[name] = {"error": first_line(error)}
            free()
    head = ["", "parameters", "tokens a step", "TFLOP", "seconds", "tokens/s", "utilisation", "of the product's rate"]
    head += ["waiting for data", "compiling, s", "GiB, peak"]
    rows = [[name, *describe(one, rate)] for name, one in found.items()]
    title = f"Training steps on real mixed data; a product of matrices runs at {rate / 1e12:,.3g} TFLOP/s"
    save(out, "step", {"product": rate, "sizes": found}, {title: [head, *rows]})
    return all("error" not in one for one in found.values())


def dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def mixed(folder: Path, small: bool, backbone: dict, divisor: int) -> TrainConfig:
    """The tasks of configs/base.yaml over the corpora in carry/, else over scenes that are made here: JPEG and FLAC."""
    from pretrain import corpora, group

    data: dict[str, Any] = to_data(load(ROOT / "configs" / "base.yaml"))
    sources = corpora(folder, small)
    data["sources"] = {n: {"shards": parts["train"], "group": group(parts["train"])} for n, parts in sources.items()}
    for task in data["tasks"].values():
        task |= {"sources": dict.fromkeys(sources, 1), "batch_size": 8 if small else task["batch_size"] // divisor}
    data["model"]["backbone"] = TOY if small else backbone
    if small:
        data["tasks"]["patches"]["objectives"]["masked"]["decoder"] = TOY
    cuda = device().type == "cuda"
    data |= {
        "run_dir": str(folder / "run"),
        "microbatches": 2 if small else max(1, data["microbatches"] // divisor),
        "precision": "bfloat16" if cuda else "float32",
        "compile": cuda,
        "num_workers": 1 if small else max(1, (os.cpu_count() or 2) - 2),
        "evaluate": {},
    }
    return build(data, "base.yaml")


@contextlib.contextmanager
def reading(config: TrainConfig) -> Iterator[tuple[TrainConfig, Iterator]]:
    """The steps of a run as its loop reads them, ahead and in worker processes; the config has its tokenizers then."""
    from multimodal_fm.stream.loader import Loader
    from multimodal_fm.stream.prefetch import Prefetcher
    from multimodal_fm.stream.tasks import build_stream
    from multimodal_fm.train.parallel import ALONE
    from multimodal_fm.train.setup import open_sources, prepare_tokenizers

    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    corpora = open_sources(config)
    config, origin = prepare_tokenizers(config, corpora, ALONE, None, False)
    dataset = build_stream(
        config.tasks, corpora, config.model.tokenizers, config.seed, config.microbatches, config.round_to,
        0, 1, origin, heads=config.model.heads,
    )  # fmt: skip
    loader = Loader(dataset, 0, 1_000_000, config.num_workers)
    try:
        yield config, iter(Prefetcher(loader, device()))
    finally:
        loader.close()


def measure(config: TrainConfig, small: bool, out: Path) -> dict[str, Any]:
    """Steps of a run: how long they take while its readers work, and how much of that is waiting for them."""
    warm, steps = (1, 3) if small else (6, 20)
    with reading(config) as (config, stream):
        trained = TrainStep(config, device())
        batches = next(stream).batches
        tokens = int(count(batches))
        with eager(), counted(trained.trained) as flops:
            trained(0, batches)
        per_token = flops[0] / tokens
        first = seconds(lambda: trained(1, batches))
        profile(lambda: trained(2, batches), out / "profile.txt")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        waits, times, done = [], [], []
        for number in range(warm + steps):
            began = time.perf_counter()
            batches = next(stream).batches
            waited = time.perf_counter() - began
            trained(3 + number, batches)
            synchronise()
            if number >= warm:
                waits.append(waited)
                times.append(time.perf_counter() - began)
                done.append(count(batches))
    total, tokens = sum(times), sum(map(int, done)) / steps
    return {
        "parameters": sum(weight.numel() for weight in trained.parameters),
        "tokens": tokens,
        "flops": per_token * tokens,
        "seconds": total / steps,
        "median": statistics.median(times),
        "waiting": sum(waits) / total,
        "first": first,
        "compiling": trained.compiled.seconds,
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def count(batches: list) -> Any:
    """Tokens of a step, on its device."""
    return sum((batch.tokens.sequence >= 0).sum() for batch in batches)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def eager():
    """What is compiled runs as it is written, so that its modules' hooks are called."""
    return torch.compiler.set_stance("force_eager")


def describe(one: dict, rate: float) -> list[str]:
    if "error" in one:
        return [one["error"], *[""] * 9]
    use = one["flops"] / one["seconds"]
    cuda = device().type == "cuda"
    return [
        f"{one['parameters'] / 1e6:,.0f} M",
        f"{one['tokens']:,.0f}",
        f"{one['flops'] / 1e12:.2f}",
        f"{one['seconds']:.3f}",
        f"{one['tokens'] / one['seconds']:,.0f}",
        f"{use / PEAK:.1%}" if cuda else "",
        f"{use / rate:.1%}",
        f"{one['waiting']:.1%}",
        f"{one['compiling']:.1f}",
        f"{one['peak'] / 2**30:.1f}" if cuda else "",
    ]


def profile(call: Callable, path: Path) -> None:
    """Write the ten kernels (on a CPU: operators) that take the most time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = device().type == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        call()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(recorded.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=80))


def run_peers(out: Path, small: bool) -> bool:
    """Each contest, compiled, in turns; a peer that is not installed is left out and named."""
    found = {}
    for name, (contest, count) in PEERS.items():
        try:
            found[name] = versus(toy(contest) if small else contest, 2 if small else count, 1 if small else 8)
        except Exception as error:
            found[name] = {"error": first_line(error)}
        free()
    head = ["", "peer", "unit", "ours", "theirs", "ratio", "aim", "utilisation, ours", "padding of the peer"]
    rows = [[name, *describe_peer(one, AIMS[name])] for name, one in found.items()]
    save(out, "peers", found, {"Against other implementations, bfloat16, compiled, in turns": [head, *rows]})
    return all("error" not in one for one in found.values())


def toy(contest: Contest) -> Contest:
    return dataclasses.replace(contest, backbone=TOY)


def versus(contest: Contest, count: int, turns: int) -> dict[str, Any]:
    """Seconds of a step of ours and of the peer, over the same samples, and how many there are."""
    cuda = device().type == "cuda"
    changes = {"precision": "bfloat16" if cuda else "float32", "compile": cuda, "round_to": 128 if cuda else 1}
    steps = [draw_step(contest, count, seed) for seed in range(2)]
    config = make_config(contest, count, changes=changes)
    batches = [[b.to(device()) for b in make_batches(contest, config, one, n)] for n, one in enumerate(steps)]
    trained = TrainStep(config, device())
    with eager(), counted(trained.trained) as flops:
        trained(0, batches[0])
    name, model, losses, padding = BUILDERS[contest.peer](steps, device())
    if cuda:
        model.compile()
    theirs = make_step(model, losses[0], torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), cuda)
    times = alternate({"theirs": theirs, "ours": lambda: trained(1, batches[0])}, turns, warm=3 if cuda else 1)
    if failed := [f"{side}: {one['error']}" for side, one in times.items() if "error" in one]:
        raise RuntimeError("; ".join(failed))
    real = count_real(contest, steps[0])
    rates = {side: real / one["median"] for side, one in times.items()}
    return {
        "peer": name,
        "unit": contest.unit,
        **rates,
        "ratio": rates["ours"] / rates["theirs"],
        "utilisation": flops[0] / times["ours"]["median"] / PEAK if cuda else None,
        "padding": padding,
        "seconds": times,
    }


def describe_peer(one: dict, aim: float) -> list[str]:
    if "error" in one:
        return [one["error"], *[""] * 7]
    use = "" if one["utilisation"] is None else f"{one['utilisation']:.1%}"
    rates = [f"{one[side]:,.0f}" for side in ("ours", "theirs")]
    return [one["peer"], one["unit"], *rates, f"{one['ratio']:.2f}", f"{aim}", use, f"{one['padding']:.2f}"]


def free() -> None:
    import gc

    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
