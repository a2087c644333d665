"""The configuration of a run: `mmfm pretrain CONFIG.yaml [key=value ...]` reads it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .. import config
from ..corpus import shards
from ..errors import UserError
from ..evals.base import Evaluation
from ..model import TOKENIZERS, ModelConfig
from ..reports import model_card
from ..stream.tasks import TaskConfig
from ..tokenizers.base import override_augmentation
from . import guards, optim, parallel


@dataclass
class TrainConfig:
    """One run."""

    sources: dict[str, shards.Config]  # what the run reads, by name
    tasks: dict[str, TaskConfig]  # what a step trains, by name: all of them in every step
    model: ModelConfig = field(default_factory=ModelConfig)  # tokenizers, backbone, heads
    optim: optim.Config = field(default_factory=optim.Config)  # optimizer and learning rates
    trainable: list[str] = field(default_factory=list)
    """Patterns of parameters that learn, as in heads.* or backbone.blocks.3.*; the others keep their values. Empty: all
    learn."""
    run_dir: str = ""  # empty: runs/NAME for NAME.yaml
    init: str | dict[str, str] = ""
    """A run or checkpoint whose weights a new run starts from. A map takes parts of the model from several: a modality
    (its embedder and learned vectors), or the beginning of the tensors' names, as in `backbone`, of which the longest
    counts."""
    steps: int = 1000  # updates of the weights
    microbatches: int = 1  # each step's samples are dealt into so many; memory falls, results stay
    seed: int = 0  # of the weights, of the order of the samples and of every random view of them
    strict: bool = False  # the first thing that cannot be read ends the run, and is named
    max_bad_fraction: float = 0.05  # of a source's samples that may be bad before the run ends
    ema_decay: float = 0.999  # of the averaged weights (exponential moving average), reached gradually; 0: no average
    num_workers: int = 1  # processes that read ahead; results do not depend on it
    log_samples: bool = False  # write which samples each step read to RUN/samples.jsonl
    threads: int = 0  # 0: as many as PyTorch chooses
    parallel: parallel.Config = field(default_factory=parallel.Config)  # how the model lies on several ranks
    strict_numerics: bool = False
    """The same losses, bit for bit, for any number of ranks on a CPU, with the same `microbatches`: sums are taken in a
    fixed order. Slower, and every rank holds several whole gradients."""
    deterministic: bool = False  # a GPU computes the same, bit for bit, each time; slower
    hang_timeout: int = 1800
    """Seconds without a finished step after which a process prints the stacks of all its threads and ends, so that
    torchrun begins again; 0: never."""
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU where there is one
    precision: Literal["float32", "bfloat16", "float8"] = "float32"
    """bfloat16: autocast; weights and moments stay float32. float8: the backbone multiplies float8 (torchao), on a GPU
    that can; needs the extra `gpu`, and round_to a multiple of 16. A GPU multiplies float32 as TF32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block of the backbone, or of a decoder, makes again in the backward and does not keep: nothing, all but
    attention's results (selective), or all but its input (full). Memory falls, time rises, results stay."""
    compile: bool = False  # torch.compile of the backbone, the decoders, the embedders and the heads
    round_to: int = 1  # filler rounds a microbatch's tokens up to a multiple, where a GPU wants it
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints stay
    keep_every: int = 0  # checkpoints of every so-many-th step stay too; 0: none
    validate_every: int = 0  # steps between validations on the sources' `validation` shards; 0: none
    validation_steps: int = 4  # batches of each task that a validation reads: always the same samples
    evaluate: dict[str, Evaluation] = field(default_factory=dict)  # what `mmfm evaluate` and the report measure
    evaluate_every: int = 0  # steps between evaluations during the run; 0: only `mmfm evaluate` and the report
    best: str = ""  # the figure of validation or evaluation by which the best checkpoint is kept beside the newest
    best_mode: Literal["min", "max"] = "min"  # whether the lowest or the highest figure is the best
    monitors: dict[str, guards.Config] = field(default_factory=dict)
    """By name: bounds of the training's figures, and what is done where one is out of bounds."""
    patience: int = 0  # measurements of `best` without a new best one after which the run ends; 0: it does not
    track: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Where the figures of metrics.jsonl go too."""
    country: str = ""  # three letters (ISO 3166), whose electricity CO2e is reckoned with; empty: the world's mean
    card: model_card.Config = field(default_factory=model_card.Config)  # what `mmfm card` says and asks for

    def __post_init__(self):
        if not self.model.tokenizers:
            read = {modality for task in self.tasks.values() for modality in task.modalities}
            names = [name for name in ("text", "image", "audio") if name in read]
            made = {name: config.plugin_class(TOKENIZERS, name)() for name in names}
            self.model = dataclasses.replace(self.model, tokenizers=made)

    def problems(self):
        tokenizers = self.model.tokenizers
        if not self.tasks:
            yield "tasks", "names at least one task"
        for name, task in self.tasks.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                yield f"tasks.{name or repr('')}", "cannot be a name: letters, digits, - and _"
            if problem := config.name_problem(task.modalities, tokenizers, "tokenizer"):
                yield f"tasks.{name}.modalities", problem
            if problem := config.name_problem(task.sources, self.sources, "source"):
                yield f"tasks.{name}.sources", problem
        for name, source in self.sources.items():
            try:
                override_augmentation(tokenizers, source.augment, name)
            except UserError as error:
                yield "", str(error)
        for name in ("steps", "microbatches", "round_to", "save_every", "keep", "validation_steps"):
            if getattr(self, name) < 1:
                yield name, "is at least 1"
        limits = {"num_workers": 256, "threads": 4096, "ema_decay": 1, "seed": 2**62, "max_bad_fraction": 1}
        for name, most in {
            **limits,
            "validate_every": math.inf,
            "keep_every": math.inf,
            "hang_timeout": math.inf,
            "evaluate_every": math.inf,
            "patience": math.inf,
        }.items():
            if not 0 <= getattr(self, name) <= most:
                yield name, f"is from 0 to {most}"
        if self.save_every > 0 and self.keep_every % self.save_every:
            yield "keep_every", f"is a multiple of save_every, which is {self.save_every}"
        if self.validate_every and not any(source.validation for source in self.sources.values()):
            yield "validate_every", "needs `validation` shards in at least one of the sources"
        if self.evaluate_every and not self.evaluate:
            yield "evaluate_every", "needs something to measure under `evaluate`"
        if self.country and not re.fullmatch("[A-Z]{3}", self.country):
            yield "country", f"is three capital letters as in DEU or JPN, not {self.country!r}"
        if problem := config.name_problem(self.card.data_licenses, self.sources, "source"):
            yield "card.data_licenses", problem
        for name, monitor in self.monitors.items():
            if monitor.action == "roll_back" and self.keep < 2:
                yield f"monitors.{name}.action", "roll_back needs keep: 2, so that there is a checkpoint from before"
        if self.precision == "float8" and self.round_to % 16:
            yield "round_to", "is a multiple of 16 with precision: float8"
        if self.patience and not self.best:
            yield "patience", "needs `best`, the figure that is waited for"
        if self.best and not self.validate_every and not self.evaluate_every:
            yield "best", "needs validate_every or evaluate_every"
        for name, evaluation in self.evaluate.items():
            if problem := config.name_problem(evaluation.modalities, tokenizers, "tokenizer"):
                yield f"evaluate.{name}.modalities", problem
            if unknown := set(evaluation.measure) - set(config.plugin_names("evals")):
                yield f"evaluate.{name}.measure", f"there is no evaluator {', '.join(sorted(unknown))}"


def load(path: str | Path, overrides: Sequence[config.Override] = ()) -> TrainConfig:
    """Read a YAML file, apply `key=value` overrides (dots go deeper, values are YAML). Raises UserError."""
    data = config.read_yaml(path, overrides)
    data.setdefault("run_dir", f"runs/{Path(path).stem}")
    return build(data, str(path))


def build(data: dict, where: str = "config", plugins: bool = True) -> TrainConfig:
    """The configuration from plain data. Raises UserError with all that is wrong in one message."""
    return config.build(TrainConfig, data, where, plugins)
