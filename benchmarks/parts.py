"""What the parts of one of our own steps take: `step.py --parts CONFIG`. Batches are synthetic, of usual lengths."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from common import device, seconds
from torch import nn

from multimodal_fm.batch import Batch, Sample, collate, count_targets
from multimodal_fm.tokens import Tokens, make_sequence
from multimodal_fm.train import ema
from multimodal_fm.train.config import TrainConfig, load
from multimodal_fm.train.grad_cache import forward_backward
from multimodal_fm.train.train_step import TrainStep


class Trainer(TrainStep):
    """The step of `mmfm pretrain`, part by part."""

    def __init__(self, config: TrainConfig):
        super().__init__(config, device())

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


def print_parts(path: str, steps: int = 10) -> None:
    """Prints the median wall and CPU milliseconds of each part of a step, and its share of the wall time."""
    torch.manual_seed(0)
    trainer = Trainer(config := load(path))
    batches = [[batch.to(device()) for batch in synthetic(config, seed, pairs=True)] for seed in range(4)]
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(-2, steps):
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
