"""What a step of three modalities and several objectives costs, against its tasks alone and against a padded model.

    python benchmarks/mixed.py [--quick] [--json] [--compiled] [--out FOLDER]

mixed-step: the step of configs/demo.yaml against the sum of the steps of each of its tasks alone, in turns. mixed-flat:
the backbone over a flat batch of all three, against the same backbone over as many sequences that are all as long as
the longest, as a padded one computes them (its masks cost more still), over the padding factor: 1 is all of it won
back. mixed-ranks: the most tokens of a rank over the mean, of 2 and 4 ranks, over a stream of texts, pictures and
sounds of any length. mixed-filler: the share of filler where token counts are rounded up to 128, as configs/base.yaml
does it, and to the few sizes of `compile: true`. mixed-recompiled (--compiled): the sizes for which anything is
compiled in six steps after the first six; torch raises an error there.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, about, alternate, device, markdown, write_results
from parts import synthetic

from multimodal_fm.backbone import Backbone, few_sizes
from multimodal_fm.batch import plan_reading
from multimodal_fm.config import to_data
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Corpus
from multimodal_fm.stream.tasks import build_stream
from multimodal_fm.tokens import Tokens
from multimodal_fm.train.config import TrainConfig, build, load
from multimodal_fm.train.cpu import keep_freed_memory
from multimodal_fm.train.train_step import TrainStep

ROOT = Path(__file__).parents[1]


def demo(quick: bool, **changes) -> TrainConfig:
    data = to_data(load(ROOT / "configs" / "demo.yaml")) | {"evaluate": {}, "validate_every": 0, "best": ""}
    data["sources"] = {name: {"shards": []} for name in data["sources"]}
    if quick:
        for task in data["tasks"].values():
            task["batch_size"] //= 4
    return build({**data, **changes})


def only(config: TrainConfig, name: str) -> TrainConfig:
    """The configuration with one of its tasks."""
    data = to_data(config)
    return build({**data, "tasks": {name: data["tasks"][name]}})


def row(name: str, peer: str, ours: float, theirs: float, unit: str, runs: int, ratio: float | None = None) -> dict:
    ratio = theirs / ours if ratio is None else ratio
    return {"name": name, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ratio, "unit": unit, "runs": runs}


def against_tasks_alone(quick: bool) -> dict:
    config, turns = demo(quick), 3 if quick else 7
    configs = {"": config, **{name: only(config, name) for name in config.tasks}}
    calls = {}
    for name, one in configs.items():
        torch.manual_seed(0)
        step, batches = TrainStep(one, device()), synthetic(one, 0, pairs=True)
        calls[name] = lambda step=step, batches=batches: step(0, batches)
    found = alternate(calls, turns, warm=1)
    alone = sum(found[name]["median"] for name in config.tasks)
    return row("mixed-step", "its tasks alone, added up", found[""]["median"], alone, "seconds a step", turns)


def against_padded(quick: bool) -> dict:
    config, turns = demo(False), 3 if quick else 7
    [batch] = synthetic(only(config, "pairs"), 0, pairs=True)
    sequence = batch.tokens.sequence
    lengths = torch.bincount(sequence[sequence >= 0])
    flat, padded = (backbone_step(config, own) for own in (lengths, torch.full_like(lengths, int(lengths.max()))))
    found = alternate({"flat": flat, "padded": padded}, turns, warm=1)
    factor = len(lengths) * int(lengths.max()) / int(lengths.sum())
    ours, theirs = (found[name]["median"] for name in ("flat", "padded"))
    peer = f"padded, {factor:.2f} times the tokens; the ratio is of that"
    return row("mixed-flat", peer, ours, theirs, "seconds", turns, theirs / ours / factor)


def backbone_step(config: TrainConfig, lengths: torch.Tensor):
    """Forward and backward of the backbone over sequences of these lengths, with its memory kept as in a run."""
    keep_freed_memory()
    settings = config.model.backbone
    torch.manual_seed(0)
    backbone = Backbone(settings).to(device())
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    zeros = torch.zeros_like(sequence)
    position = torch.zeros(len(sequence), 3)
    reading = plan_reading(Tokens(zeros, position, sequence, zeros, zeros), 1).to(device())
    content = torch.randn(len(sequence), settings.width, device=device(), requires_grad=True)
    tokens = reading.tokens.replace(content=content)
    return lambda: backbone(tokens, reading.attention, reading.routing).content.square().mean().backward()


def write_corpus(folder: Path, count: int) -> None:
    """Texts of 1 to 200 words; two of five samples have a picture of any shape, the others a sound of 0.3 to 10 s."""
    import soundfile
    from PIL import Image

    generator, made = np.random.default_rng(0), []
    for number in range(count):
        words = " ".join(f"word{int(generator.integers(50))}" for _ in range(int(generator.integers(1, 200))))
        sample = {"__key__": f"{number:05d}", "txt": words}
        data = io.BytesIO()
        if number % 5 < 2:
            shape = (int(generator.integers(40, 400)), int(generator.integers(40, 400)), 3)
            Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(data, "JPEG")
            sample["jpg"] = data.getvalue()
        else:
            wave = generator.standard_normal(int(16_000 * generator.uniform(0.3, 10))) * 0.1
            soundfile.write(data, wave, 16_000, format="FLAC")
            sample["flac"] = data.getvalue()
        made.append(sample)
    shards.write(folder / "mixed.tar", made)


def stream_rows(quick: bool) -> Iterator[dict]:
    """How evenly the stream deals a step to ranks, and how much filler rounding makes."""
    config, steps = demo(quick=False, microbatches=4), 2 if quick else 6
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), 400)
        data = to_data(config)
        data["sources"] = {"mixed": {"shards": f"{folder}/mixed.tar"}}
        for task in data["tasks"].values():
            task["sources"] = {"mixed": 1}
        config = build({**data, "run_dir": f"{folder}/run"})
        corpora = {"mixed": Corpus(config.sources["mixed"], "mixed", config.model.tokenizers.values())}
        text = config.model.tokenizers["text"].fit(
            (corpora["mixed"].raw(i, ("txt",)) for i in range(64)), f"{folder}/bpe"
        )
        tokenizers = config.model.tokenizers | {"text": text}
        dataset = build_stream(config.tasks, corpora, tokenizers, 0, 4, heads=config.model.heads)
        counts = [[len(batch.tokens) for batch in dataset[number].batches] for number in range(steps)]
    for ranks in (2, 4):
        shares = [np.array(own).reshape(ranks, -1).sum(1) for own in counts]
        worst = max(float(share.max() / share.mean()) for share in shares)
        mean = float(np.mean([share.mean() for share in shares]))
        yield row(f"mixed-ranks-{ranks}", "the mean", worst * mean, mean, "tokens of the largest rank", steps)
    sizes = [sum(own) * 8 // 4 for own in counts]  # microbatches of about the size that a GPU has
    for name, round_up in (("128", lambda n: -(-n // 128) * 128), ("few-sizes", few_sizes)):
        real, filled = sum(sizes), sum(map(round_up, sizes))
        yield row(f"mixed-filler-{name}", "tokens", filled, real, "tokens and filler", len(sizes))


def recompiled() -> dict:
    """How many sizes are compiled for after the first six steps; raises where torch compiles anything."""
    config = demo(True, compile=True)
    step = TrainStep(config, device())
    steps = [synthetic(config, seed, pairs=True) for seed in range(6)]
    for number, batches in enumerate(steps):
        step(number, batches)
    before = step.compiled.count_sizes()
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, batches in enumerate(steps):
            step(6 + number, batches)
    after = step.compiled.count_sizes()
    peer = f"{before} in the first six, {step.compiled.seconds:.0f} s"
    return row("mixed-recompiled", peer, after - before, before, "sizes of parts", 6, float(after == before))


def compare(quick: bool, compiled: bool) -> Iterator[dict]:
    yield from stream_rows(quick)
    yield against_tasks_alone(quick)
    yield against_padded(quick)
    if compiled:
        yield recompiled()


def describe(found: dict) -> list[str]:
    shown = [f"{found[key]:,.4g}" for key in ("ours", "theirs", "ratio")]
    return [found["name"], *shown[:2], found["peer"], shown[2], found["unit"], str(found["runs"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch, fewer turns")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--compiled", action="store_true", help="mixed-recompiled too, some minutes on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows, machine = [], {**about(), "threads": torch.get_num_threads(), "quick": given.quick}
    for found in compare(given.quick, given.compiled):
        rows.append(found)
        print(json.dumps(found) if given.json else "  ".join(describe(found)), flush=True)
    table = markdown([["", "ours", "theirs", "who", "ratio", "unit", "runs"], *map(describe, rows)])
    write_results(given.out, "mixed", "A step of three modalities", machine, rows, table)


if __name__ == "__main__":
    main()
