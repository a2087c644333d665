"""What step.py compares: for each name our configuration, a peer of equal width and depth, and the samples of both.

Both sides get the same samples: texts, pictures and spectrograms of realistic lengths, drawn by seed. The peer pads
them as its users do; ours lays them end to end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal_fm.batch import Batch, Sample, collate, count_targets
from multimodal_fm.tokens import Tokens, make_sequence
from multimodal_fm.train.config import TrainConfig, build

PICTURE, FRAMES, BANDS = 224, 1024, 128  # pixels a side; frames (10 ms) and mel bands of AST's input
BERT_WORDS, GPT_WORDS, CLIP_WORDS, SOUNDS = 30_522, 50_257, 49_408, 527
BASE = {"width": 768, "depth": 12, "num_heads": 12}
SMALL = {"width": 384, "depth": 12, "num_heads": 6}


@dataclass(frozen=True)
class Raw:
    """One sample, before either side has touched it. Real tokens are those of these, never padding."""

    text: Tensor | None = None  # ids (L,)
    picture: Tensor | None = None  # (3, 224, 224) uint8
    sound: Tensor | None = None  # log-mel (frames, 128), frames a multiple of 16


@dataclass(frozen=True)
class Contest:
    """A comparison. batch_size: samples a step, and with --quick; unit: what is counted a second."""

    draw: Callable[[torch.Generator], Raw]
    objectives: dict
    modalities: list[str]
    tokenizers: dict
    backbone: dict
    peer: str  # the function of peers.py that builds it
    batch_size: tuple[int, int]
    unit: str
    aim: float  # the ratio that issue 16 asks for
    heads: dict | None = None


def text_length(generator: torch.Generator, mean: float, spread: float, most: int) -> int:
    """Tokens of a text: log-normal, at least 8 and at most `most`."""
    drawn = torch.randn((), generator=generator) * spread + torch.tensor(mean).log() - spread**2 / 2
    return int(drawn.exp().clamp(8, most))


def draw_text(generator: torch.Generator, words: int, mean: float, spread: float, most: int) -> Raw:
    length = text_length(generator, mean, spread, most) if spread else most
    return Raw(torch.randint(1000, words, (length,), generator=generator))


def draw_pair(generator: torch.Generator) -> Raw:
    """A picture of 224 pixels a side and a caption of about 14 tokens and its two ends."""
    text = torch.randint(1000, CLIP_WORDS, (text_length(generator, 16, 0.3, 77),), generator=generator)
    return Raw(text, draw_picture(generator).picture)


def draw_picture(generator: torch.Generator) -> Raw:
    shape = (3, PICTURE, PICTURE)
    return Raw(picture=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def draw_sound(generator: torch.Generator) -> Raw:
    """2 to 10 seconds, as sound effects are long."""
    columns = int(torch.randint(13, FRAMES // 16 + 1, (), generator=generator))
    return Raw(sound=torch.randn(columns * 16, BANDS, generator=generator))


def masked(most: int, mean: float, spread: float, batch_size: tuple[int, int]) -> Contest:
    return Contest(
        functools.partial(draw_text, words=BERT_WORDS, mean=mean, spread=spread, most=most),
        {"masked": {"mask_ratio": 0.15}},
        ["text"],
        {"text": {"vocab_size": BERT_WORDS, "max_tokens": most}},
        BASE,
        "bert",
        batch_size,
        "real tokens/s",
        1.5,
        {},
    )


def contrastive(backbone: dict, patch: int, peer: str, batch_size: tuple[int, int]) -> Contest:
    image = {"patch": patch, "max_tokens": (PICTURE // patch) ** 2, "square": True, "enlarge": True}
    return Contest(
        draw_pair,
        {"contrastive": {}},
        ["text", "image"],
        {"text": {"vocab_size": CLIP_WORDS, "max_tokens": 77}, "image": image},
        backbone,
        peer,
        batch_size,
        "samples/s",
        1.2,
        {"retrieval": {"embed_dim": 512}},
    )


CONTESTS = {
    "masked-128": masked(128, 40, 0.6, (64, 32)),
    "masked-512": masked(512, 160, 0.7, (16, 8)),
    "causal-512": Contest(
        functools.partial(draw_text, words=GPT_WORDS, mean=512, spread=0.0, most=512),
        {"causal": {}},
        ["text"],
        {"text": {"vocab_size": GPT_WORDS, "max_tokens": 512}},
        BASE,
        "gpt2",
        (4, 2),
        "real tokens/s",
        1.1,
        {},
    ),
    "contrastive-b32": contrastive(BASE, 32, "clip_b32", (32, 16)),
    "contrastive-384": contrastive(SMALL, 16, "clip_384", (32, 16)),
    "audio": Contest(
        draw_sound,
        {"supervised": {}},
        ["audio"],
        {"audio": {"n_mels": BANDS, "patch_mels": 16, "patch_frames": 16, "max_tokens": FRAMES // 16 * BANDS // 16}},
        BASE,
        "ast",
        (8, 4),
        "real tokens/s",
        1.25,
        {"classify": {"classes": [f"sound {number}" for number in range(SOUNDS)]}},
    ),
    "mae": Contest(
        draw_picture,
        {"masked": {"hide": "drop", "mask_ratio": 0.75, "decoder": {"width": 512, "depth": 8, "num_heads": 16}}},
        ["image"],
        {"image": {"patch": 16, "max_tokens": 196, "square": True, "enlarge": True}},
        BASE,
        "mae",
        (32, 16),
        "samples/s",
        1.05,
        {},
    ),
}


def draw_step(contest: Contest, count: int, seed: int) -> list[Raw]:
    """The samples of step `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return [contest.draw(generator) for _ in range(count)]


def count_real(contest: Contest, samples: list[Raw]) -> int:
    """What is counted a second: samples, or the tokens that they have."""
    if contest.unit == "samples/s":
        return len(samples)
    texts = sum(len(one.text) for one in samples if one.text is not None)
    return texts + sum(one.sound.shape[0] // 16 * (BANDS // 16) for one in samples if one.sound is not None)


def make_config(contest: Contest, batch_size: int, block: str = "modern", changes: dict | None = None) -> TrainConfig:
    """Our run of a contest: its model, one task and AdamW. block: of the backbone, see `backbone.Config`."""
    backbone = dict(contest.backbone)
    if block == "classic":
        rows = max(int(one.get("max_tokens", 0)) for one in contest.tokenizers.values())
        grid = [PICTURE // int(contest.tokenizers["image"]["patch"])] * 2 if "image" in contest.tokenizers else []
        times = rows if set(contest.tokenizers) - {"image"} else 0
        backbone |= {"block": "classic", "mlp_ratio": 4, "max_positions": times, "grid": grid}
    task = {"objectives": contest.objectives, "modalities": contest.modalities, "batch_size": batch_size}
    data: dict[str, Any] = {
        "sources": {"any": {"shards": []}},
        "tasks": {"task": {**task, "sources": {"any": 1}}},
        "model": {"tokenizers": contest.tokenizers, "backbone": backbone, "heads": contest.heads},
        "optim": {"name": "adamw", "lr": 1e-4},
        "ema_decay": 0.0,  # the peers keep no average
    }
    return build(data | (changes or {}))


def make_batches(contest: Contest, config: TrainConfig, samples: list[Raw], seed: int = 0) -> list[Batch]:
    """Our microbatches of these samples, arranged and collated as the loader does it."""
    modalities, task = list(config.model.tokenizers), config.tasks["task"]
    plugin = next(iter(task.objectives.values()))
    settings = plugin.cls.bind(plugin.config, config.model.heads, config.model.tokenizers)
    generator = torch.Generator().manual_seed(seed)
    dealt: list[list] = [[] for _ in range(config.microbatches)]
    examples = []
    for number, one in enumerate(samples):
        parts = {m: make_tokens(contest, m, place, one) for place, m in enumerate(modalities)}
        label = (torch.tensor([number % SOUNDS]), torch.tensor([-1])) if "supervised" in contest.objectives else None
        example = plugin.cls.arrange(settings, Sample(parts, number, label), generator)
        examples.append(example)
        dealt[number % config.microbatches].append((number, example))
    counts = {"task": count_targets(examples, modalities)}
    planners = {"task": functools.partial(plugin.cls.plan, plugin.config)}
    return [collate({"task": own}, modalities, counts, planners, config.round_to) for own in dealt]


def make_tokens(contest: Contest, modality: str, place: int, one: Raw) -> Tokens:
    """The tokens of a sample's part, as the tokenizer of that modality cuts them."""
    if modality == "text":
        assert one.text is not None
        position = torch.zeros(len(one.text), 3)
        position[:, 0] = torch.arange(len(one.text))
        return make_sequence(one.text, position, place)
    if modality == "image":
        assert one.picture is not None
        patch = int(contest.tokenizers["image"]["patch"])
        side = PICTURE // patch
        content = one.picture.unflatten(1, (side, patch)).unflatten(3, (side, patch))  # (3, rows, p, columns, p)
        content = content.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1).contiguous()
        grid = torch.arange(side).float()
        return make_sequence(content, torch.cartesian_prod(torch.zeros(1), grid, grid), place)
    assert one.sound is not None
    columns, rows = len(one.sound) // 16, BANDS // 16
    content = one.sound.unflatten(0, (columns, 16)).unflatten(2, (rows, 16))
    content = content.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)
    position = torch.cartesian_prod(torch.arange(columns).float(), torch.arange(rows).float(), torch.zeros(1))
    return make_sequence(content.contiguous(), position, place)
