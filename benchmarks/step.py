"""How fast is a training step of configs/base.yaml, and how does it compare with BERT's and ViT's own?

Batches are synthetic: random tokens of realistic lengths, arranged by the objectives and collated as in training.
As a program it says what the parts of a step take: python benchmarks/step.py [CONFIG] [STEPS].
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from common import alternate, device, first_line, save, seconds
from torch import nn

from multimodal_fm.backbone import Backbone
from multimodal_fm.batch import Batch, Sample, collate, count_targets
from multimodal_fm.config import to_data
from multimodal_fm.tokens import RISING, Tokens, make_sequence, patterns
from multimodal_fm.train import ema
from multimodal_fm.train.config import TrainConfig, build, load
from multimodal_fm.train.grad_cache import forward_backward
from multimodal_fm.train.train_step import TrainStep

PEAK = 989e12  # FLOP/s: bfloat16, dense, of an H100 or H200 (SXM)
CONFIG = Path(__file__).parents[1] / "configs" / "base.yaml"
TOY = {"width": 64, "depth": 2, "num_heads": 2}
BERT_VOCABULARY = 30_522


def run(out: Path, small: bool) -> bool:
    torch.manual_seed(0)
    data = to_data(load(CONFIG)) | {"compile": False}
    if small:
        data |= {"model": {**data["model"], "backbone": TOY}, "microbatches": 2, "precision": "float32"}
        data["tasks"] = {n: {**s, "batch_size": 8} for n, s in data["tasks"].items()}
        data["tasks"]["patches"]["objectives"]["masked"]["decoder"] = TOY
    config = build(data, str(CONFIG))
    repeats = 3 if small else 10
    steps, results = ours(config, repeats, out)
    peers = {"masked text": text_peer(data, small, repeats), "pictures": picture_peer(data, small, repeats)}
    size = f"{steps['tokens']:,.0f} tokens, {steps['flops'] / 1e12:.2f} TFLOP of the model"
    columns = ["seconds", "tokens/s", "model FLOP utilisation", "GiB of a step", "GiB of weights and optimizer"]
    tables = {
        f"A training step of configs/base.yaml: {size}": [
            ["", *columns],
            *([name, *describe_step(one, steps)] for name, one in results.items()),
        ],
        "Against other implementations, in turn with ours": [
            ["", "who", "seconds a step", "a second", "what", "against the peer"],
            *([what, *row] for what, peer in peers.items() for row in describe_peer(peer)),
        ],
    }
    save(out, "step", {"steps": results, "peers": peers, "shape": steps}, tables)
    return all("error" not in one for one in results.values())


def ours(config: TrainConfig, repeats: int, out: Path) -> tuple[dict, dict]:
    """What a step holds, and each variant's time and memory."""
    steps = [[batch.to(device()) for batch in synthetic(config, seed)] for seed in range(4)]
    shape = {"tokens": sum(len(b.tokens) for step in steps for b in step) / len(steps)}
    results = {}
    for name in ("uncompiled", "compiled"):
        before = memory()
        trainer = Trainer(config)
        if name == "uncompiled":
            with counted(trainer.trained) as flops:
                trainer.step(steps[0])
            shape["flops"] = flops[0] / sum(len(b.tokens) for b in steps[0]) * shape["tokens"]
            profile(lambda t=trainer: t.step(steps[0]), out / "profile.txt")
        else:
            trainer.model.backbone.compile(dynamic=True)
        turns = itertools.cycle(steps)
        found = alternate({name: lambda t=trainer, s=turns: t.step(next(s))}, repeats, warm=4)[name]
        kept = memory()
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.step(steps[0])
            found |= {"peak": torch.cuda.max_memory_allocated() - kept}
        results[name] = found | {"kept": kept - before}
        del trainer
        torch.cuda.empty_cache()
    return shape, results


class Trainer(TrainStep):
    """The step of `mmfm pretrain`, whole or part by part."""

    def __init__(self, config: TrainConfig):
        super().__init__(config, device())

    def step(self, batches: list[Batch]) -> None:
        self(0, batches)

    def parts(self, batches: list[Batch]) -> dict[str, Callable]:
        """What a step does, in order."""
        zero_grad = [lambda o=o: o.zero_grad(set_to_none=False) for o in self.optimizers]
        return {
            "zero_grad": lambda: [call() for call in zero_grad],
            "forward and backward": lambda: forward_backward(
                self.model, self.objectives, self.weights, batches, self.config.precision
            ),
            "clip": lambda: nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip),
            **{type(optimizer).__name__: optimizer.step for optimizer in self.optimizers},
            "ema": lambda: ema.update(self.ema, self.trained, step=10_000, decay=0.999),
        }


def print_parts(path: str = "configs/demo.yaml", steps: str = "10") -> None:
    """Prints the median wall and CPU milliseconds of each part of a step, and its share of the wall time."""
    torch.manual_seed(0)
    trainer = Trainer(config := load(path))
    batches = [[batch.to(device()) for batch in synthetic(config, seed, pairs=True)] for seed in range(4)]
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(-2, int(steps)):
        for name, part in trainer.parts(batches[number % 4]).items():
            cpu = time.process_time()
            wall = seconds(part)
            if number >= 0:
                times.setdefault(name, []).append((wall * 1e3, (time.process_time() - cpu) * 1e3))
    medians = {name: [statistics.median(column) for column in zip(*own, strict=True)] for name, own in times.items()}
    total = sum(wall for wall, _ in medians.values())
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {path}")
    for name, (wall, cpu) in medians.items():
        print(f"{name:22}{wall:9.1f} ms {cpu:9.1f} ms of CPU {wall / total:7.1%}")


def synthetic(config: TrainConfig, seed: int, pairs: bool = False) -> list[Batch]:
    """One step's microbatches of random samples that have all modalities of their task.

    pairs: those of a task of three modalities have text and either an image (two of five) or a sound, as in the demo.
    """
    generator = torch.Generator().manual_seed(seed)
    modalities = list(config.model.tokenizers)
    dealt, counts, planners = [{} for _ in range(config.microbatches)], {}, {}
    for name, task in config.tasks.items():
        taken = []
        for number in range(task.batch_size):
            own = task.modalities
            if pairs and len(own) == 3:
                own = ["text", "image" if float(torch.rand((), generator=generator)) < 0.4 else "audio"]
            parts = {modality: part(config, modality, modalities.index(modality), generator) for modality in own}
            first = next(iter(task.objectives.values()))
            taken.append((number, first.cls.arrange(first.config, Sample(parts, number), generator)))
            planners[name] = functools.partial(first.cls.plan, first.config)
        counts[name] = count_targets([one for _, one in taken], modalities)
        for turn, batch in enumerate(dealt):
            batch[name] = taken[turn :: config.microbatches]
    return [collate(batch, modalities, counts, planners, config.round_to) for batch in dealt]


def part(config: TrainConfig, modality: str, place: int, generator: torch.Generator) -> Tokens:
    """Captions of about 14 tokens, pictures of all aspect ratios, sounds of 2 to 10 seconds."""
    tokenizer = config.model.tokenizers[modality]
    settings = tokenizer.config
    if modality == "text":
        length = min(max(4, round(14 + 4 * float(torch.randn((), generator=generator)))), settings.max_tokens)
        position = torch.zeros(length, 3)
        position[:, 0] = torch.arange(length)
        return make_sequence(torch.randint(2, settings.vocab_size, (length,), generator=generator), position, place)
    if modality == "image":
        rows, columns = tokenizer.grid(300, int(torch.randint(200, 450, (), generator=generator)))
        position = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        content = torch.randint(0, 256, (len(position), 3 * settings.patch**2), generator=generator, dtype=torch.uint8)
        return make_sequence(content, position, place)
    span = settings.patch_frames * settings.hop_length / settings.sample_rate
    length = min(math.ceil(float(2 + 8 * torch.rand((), generator=generator)) / span), settings.max_tokens)
    position = torch.zeros(length, 3)
    position[:, 0] = torch.arange(length)
    values = settings.patch_frames * settings.patch_mels
    return make_sequence(torch.randn(length, values, generator=generator), position, place)


@contextmanager
def counted(model: nn.Module):
    """Counts the FLOP of a step: 6 a weight and token that passes it, and 12 L² D a sequence and layer of attention
    (half of it where tokens only read those before). What runs without gradients is not counted."""
    total = [0.0]

    def linear(module, inputs, _):
        if torch.is_grad_enabled():
            total[0] += 6 * inputs[0].numel() * module.out_features

    def backbone(module, inputs):
        if torch.is_grad_enabled():
            pattern, lengths, _ = patterns(inputs[0].sequence, inputs[0].order)
            share = torch.where(pattern == RISING, 0.5, 1.0)
            total[0] += 12 * module.config.width * module.config.depth * float((lengths.double() ** 2 * share).sum())

    hooks = [m.register_forward_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    hooks += [m.register_forward_pre_hook(backbone) for m in model.modules() if isinstance(m, Backbone)]
    yield total
    for hook in hooks:
        hook.remove()


def profile(call: Callable, path: Path) -> None:
    """Write the ten kernels (on a CPU: operators) that take the most time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = device().type == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        call()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recorded.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=80))


def text_peer(data: dict, small: bool, repeats: int) -> dict:
    """BERT-base's masked-language-model step (transformers; random weights, padded, SDPA), ours on the same lengths."""
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError as error:
        return {"skipped": first_line(error)}
    count = 16 if small else 1024
    task = {"objectives": {"masked": {"mask_ratio": 0.15}}, "modalities": ["text"], "batch_size": count}
    trainer, batches = one_task(data, "words", task)
    sequence = batches[0].tokens.sequence
    lengths = torch.bincount(sequence[sequence >= 0])
    toy = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    bert = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **(toy if small else {}))).to(device()).train()
    ids = torch.randint(1000, BERT_VOCABULARY, (count, int(lengths.max())), device=device())
    mask = torch.arange(ids.shape[1], device=device()) < lengths[:, None]
    labels = ids.masked_fill(~(mask & (torch.rand(ids.shape, device=device()) < 0.15)), -100)
    theirs = peer_step(bert, lambda: bert(input_ids=ids, attention_mask=mask.long(), labels=labels).loss)
    return versus("transformers BERT-base", theirs, trainer, batches, repeats) | {
        "count": int(lengths.sum()),
        "what": "text tokens (padding not counted)",
    }


def picture_peer(data: dict, small: bool, repeats: int) -> dict:
    """A supervised step of ViT-B/16 (timm) and ours that guesses hidden patches, all 196 of a picture being read."""
    try:
        import timm
    except ImportError as error:
        return {"skipped": first_line(error)}
    count = 4 if small else 256
    task = {"objectives": {"masked": {"mask_ratio": 0.4}}, "modalities": ["image"], "batch_size": count}
    trainer, batches = one_task(data, "patches", task)
    vit = timm.create_model("vit_tiny_patch16_224" if small else "vit_base_patch16_224").to(device()).train()
    pictures = torch.randn(count, 3, 224, 224, device=device())
    labels = torch.randint(0, 1000, (count,), device=device())
    theirs = peer_step(vit, lambda: nn.functional.cross_entropy(vit(pictures), labels))
    return versus("timm ViT-B/16", theirs, trainer, batches, repeats) | {"count": count, "what": "pictures"}


def one_task(data: dict, name: str, task: dict) -> tuple[Trainer, list[Batch]]:
    """Our trainer and step for a single task, with BERT's vocabulary and plain AdamW as the peers have them."""
    source = {"any": {"shards": []}}
    tokenizers = {
        **data["model"]["tokenizers"],
        "text": {**data["model"]["tokenizers"]["text"], "vocab_size": BERT_VOCABULARY},
    }
    changed = {**data, "sources": source, "tasks": {name: {**task, "sources": {"any": 1}}}, "microbatches": 1}
    config = build(
        {**changed, "model": {**data["model"], "tokenizers": tokenizers}, "optim": {"name": "adamw"}, "evaluate": {}}
    )
    return Trainer(config), [batch.to(device()) for batch in synthetic(config, 0)]


def peer_step(model: nn.Module, loss: Callable) -> Callable:
    """A step of the peer under the same conditions: autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cuda = device().type == "cuda"

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device().type, torch.bfloat16, enabled=cuda):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def versus(name: str, theirs: Callable, trainer: Trainer, batches: list[Batch], repeats: int) -> dict:
    """Both steps in turn, uncompiled, then ours compiled."""
    found = alternate({name: theirs, "ours": lambda: trainer.step(batches)}, repeats)
    trainer.model.backbone.compile(dynamic=True)
    found |= alternate({"ours, compiled": lambda: trainer.step(batches)}, repeats)
    return {"seconds": found}


def memory() -> int:
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def describe_step(found: dict, shape: dict) -> list[str]:
    if "error" in found:
        return [found["error"], "", "", "", ""]
    took = found["median"]
    use = shape["flops"] / took / PEAK
    gib = [f"{found[k] / 2**30:.1f}" if k in found else "" for k in ("peak", "kept")]
    return [f"{took:.3f}", f"{shape['tokens'] / took:,.0f}", f"{use:.1%}" if device().type == "cuda" else "", *gib]


def describe_peer(peer: dict) -> list[list[str]]:
    if "skipped" in peer:
        return [["skipped", peer["skipped"], "", "", ""]]
    times, first = peer["seconds"], next(iter(peer["seconds"].values()))
    rows = []
    for who, found in times.items():
        if "error" in found:
            rows.append([who, found["error"], "", peer["what"], ""])
            continue
        ratio = f"{first['median'] / found['median']:.2f}" if "median" in first else ""
        rate = f"{peer['count'] / found['median']:,.0f}"
        rows.append([who, f"{found['median']:.4f}", rate, peer["what"], ratio])
    return rows


if __name__ == "__main__":
    print_parts(*sys.argv[1:])
