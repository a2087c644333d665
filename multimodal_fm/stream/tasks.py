"""What the config's tasks become: the stream that feeds them, the tokenizers that learn, the losses' weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import Config, Plugin
from ..corpus.shards import Corpus
from ..tokenizers.base import Tokenizer
from .crash_log import Journal
from .dataset import Steps, Task
from .mixture import permute


@dataclass(frozen=True)
class Origin:
    """Where the stream's weights were last changed: at which step, and how much of each source was read by then."""

    step: int = 0
    drawn: dict[str, dict[str, int]] = field(default_factory=dict)


START = Origin()


def steps_of(
    config: Config,
    corpora: dict[str, Corpus],
    rank: int = 0,
    ranks: int = 1,
    origin: Origin = START,
    journal: Journal | None = None,
    tokenizers: bool = True,
) -> Steps:
    """The config's stream. tokenizers False: they are not there yet, and only the sources are looked at."""
    tasks = tasks_of(config, corpora, origin)
    if not tokenizers:
        tasks = [dataclasses.replace(task, by="sample") for task in tasks]
    return Steps(
        tasks,
        config.tokenizers,
        config.seed,
        config.microbatches,
        config.round_to,
        rank,
        ranks,
        journal,
    )


def tasks_of(config: Config, corpora: dict[str, Corpus], origin: Origin = START) -> list[Task]:
    found = []
    for name, task in config.tasks.items():
        phases = task.phases()
        now = [weights for step, weights in phases if step <= origin.step][-1]
        later = [(step, weights) for step, weights in phases if step > origin.step]
        found.append(
            Task(
                name,
                task.batch_size,
                task.modalities,
                [corpora[source] for source in task.sources],
                [(step, list(weights.values())) for step, weights in ((origin.step, now), *later)],
                _Arrange(task.objective),
                task.by,
                task.temperature,
                any(getattr(o.module.Objective, "whole_step", False) for o in _objectives(task)),
                [origin.drawn.get(name, {}).get(source, 0) for source in task.sources],
            )
        )
    return found


def _objectives(task) -> list[Plugin]:
    return [task.objective, *(also.objective for also in task.also.values())]


class _Arrange:
    """An objective's `arrange` with its settings."""

    def __init__(self, objective: Plugin):
        self.objective = objective

    def __call__(self, sample, generator):
        return self.objective.module.arrange(self.objective.settings, sample, generator)


def weights_of(config: Config) -> dict[str, float]:
    """The weight of each objective, by the name it has in the model and the metrics."""
    weights = {}
    for name, task in config.tasks.items():
        weights[name] = task.weight
        weights |= {f"{name}+{other}": also.weight for other, also in task.also.items()}
    return weights


def fit(config: Config, corpora: dict[str, Corpus], run: Path) -> dict[str, Tokenizer]:
    """Let the tokenizers that learn (BPE) learn from the training data of the tasks that read them."""
    fitted = {}
    for modality, tokenizer in config.tokenizers.items():
        readers = [s for s in config.tasks.values() if modality in s.modalities]
        if tokenizer.learns and readers:
            names = dict.fromkeys(name for task in readers for name in task.sources)
            raws = _shuffled([corpora[name] for name in names], config.seed, tokenizer.extensions)
            tokenizer = tokenizer.fit(raws, run / f"tokenizer-{modality}")
        fitted[modality] = tokenizer
    return fitted


def _shuffled(corpora: list[Corpus], seed: int, endings: tuple):
    """The wanted members of all samples, in an order that mixes the corpora."""
    bounds = np.cumsum([0, *map(len, corpora)])
    for start in range(0, int(bounds[-1]), 4096):
        for place in permute(np.arange(start, min(start + 4096, bounds[-1])), int(bounds[-1]), seed):
            which = int(np.searchsorted(bounds, place, "right")) - 1
            yield corpora[which].raw(int(place - bounds[which]), endings)
