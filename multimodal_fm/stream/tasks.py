"""Tasks: what a configuration says of each share of a step, and the stream that they become."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from ..batch import NOT_ASKED, Example, Sample
from ..config import Plugin
from ..corpus.shards import Corpus
from ..errors import UserError
from ..objectives import OBJECTIVES
from ..tokenizers.base import Tokenizer
from .crash_log import CrashLog
from .dataset import StepDataset, Task, count_modalities
from .mixture import permute


@dataclass
class TaskConfig:
    """A share of every step: `batch_size` samples from weighted sources, arranged and scored by objectives."""

    objectives: dict[str, Annotated[Plugin, OBJECTIVES]]
    """By name, with their settings and a `weight`. The first arranges the samples, the others score that reading."""
    modalities: list[str]  # what is read of a sample, in this order
    batch_size: int  # samples a step
    sources: dict[str, float | dict[str, float]] | list[str]
    """The weight of each source, or weights by the step from which they hold, {0: 2, 10000: 1}; a list: all weigh 1."""
    weigh_by: Literal["sample", "token"] = "sample"  # what the weights share out
    temperature: float | None = None  # weights times the source's size, in what `weigh_by` names, to this power
    weight: float = 1.0  # of the task's losses

    def __post_init__(self):
        if isinstance(self.sources, list):
            self.sources = dict.fromkeys(self.sources, 1.0)
        self.phases()

    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """The weights and the step from which they hold, in order, the first at step 0. Raises ValueError."""
        assert isinstance(self.sources, dict)
        tables = {n: w if isinstance(w, dict) else {"0": w} for n, w in self.sources.items()}
        if not all(step.isdigit() for table in tables.values() for step in table):
            raise ValueError("sources: weights by step are written {0: 2, 10000: 1}")
        phases = []
        for step in sorted({0, *(int(step) for table in tables.values() for step in table)}):
            past = {
                name: [w for s, w in sorted(table.items(), key=lambda row: int(row[0])) if int(s) <= step]
                for name, table in tables.items()
            }
            phases.append((step, {name: float(weights[-1]) if weights else 0.0 for name, weights in past.items()}))
        return phases

    def problems(self):
        if self.batch_size < 1:
            yield "batch_size", "is at least 1"
        if not 0 <= self.weight < math.inf:
            yield "weight", "is a number from 0 up"
        if not self.modalities or not self.sources or not self.objectives:
            yield "objectives", "are at least one, with at least one modality and one source"
            return
        if len(set(self.modalities)) < len(self.modalities):
            yield "modalities", "names one of them twice"
        for step, weights in self.phases():
            if not all(0 <= w < math.inf for w in weights.values()) or sum(weights.values()) <= 0:
                when = f" (at step {step})" if step else ""
                yield "sources", f"are weights, none below 0 and not all 0{when}"
        (name, first), *others = self.objectives.items()
        for other, plugin in others:
            if not (plugin.cls.whole_step or plugin.cls.may_follow):
                yield (
                    f"objectives.{other}",
                    "must stand first: only what looks at whole sequences scores another's reading",
                )
            elif plugin.cls.views(plugin.config) > 1:
                yield f"objectives.{other}.views", f"must be 1 where {name} arranges the sample"
            elif why := plugin.cls.misfit(plugin.config, first.cls.one_sequence_per_modality(first.config)):
                yield f"objectives.{other}", f"{why}, which is not what {name} makes"
        if len(_labelers(self)) > 1:
            yield "objectives", "can have only one that reads labels"
        for name, plugin in self.objectives.items():
            for key, what in plugin.cls.problems(plugin.config, self.modalities):
                yield ("modalities" if key == "modalities" else f"objectives.{name}.{key}"), what


@dataclass(frozen=True)
class Origin:
    """The step at which the weights of sources last changed, and how many samples of each were read by then."""

    step: int = 0
    drawn: dict[str, dict[str, int]] = field(default_factory=dict)


START = Origin()


def build_stream(
    tasks: dict[str, TaskConfig],
    corpora: dict[str, Corpus],
    tokenizers: dict[str, Tokenizer],
    seed: int = 0,
    microbatches: int = 1,
    round_to: int = 1,
    rank: int = 0,
    ranks: int = 1,
    origin: Origin = START,
    crash_log: CrashLog | None = None,
    augment: bool = True,
    fitted: bool = True,
    heads: dict[str, Plugin] | None = None,
) -> StepDataset:
    """The steps that these tasks read. Raises UserError where a source offers a task nothing.

    fitted: False where tokenizers have yet to learn, so that no tokens can be counted: the stream cannot be read then.
    """
    for name, task in tasks.items():
        _check_followers(name, task, corpora, tokenizers)
    built = build_tasks(tasks, corpora, origin, heads, tokenizers)
    if not fitted:
        built = [dataclasses.replace(task, by="") if task.by == "token" else task for task in built]
    return StepDataset(built, tokenizers, seed, microbatches, round_to, rank, ranks, crash_log, augment)


def _check_followers(name: str, task: TaskConfig, corpora: dict[str, Corpus], tokenizers: dict[str, Tokenizer]) -> None:
    """Raises UserError where no sample has the modalities that an objective needs which scores another's reading."""
    _, *others = task.objectives.items()
    for other, plugin in others:
        needed = plugin.cls.min_modalities(plugin.config, task.modalities)
        counts = [count_modalities(corpora[source], task.modalities, tokenizers) for source in task.sources]
        if not any((count >= needed).any() for count in counts):
            raise UserError(
                f"task {name}: no sample of {', '.join(task.sources)} has {needed} of: {', '.join(task.modalities)}, "
                f"which {other} compares: take it out of the objectives, or add a source that has them"
            )


def build_tasks(
    tasks: dict[str, TaskConfig],
    corpora: dict[str, Corpus],
    origin: Origin = START,
    heads: dict[str, Plugin] | None = None,
    tokenizers: dict[str, Tokenizer] | None = None,
) -> list[Task]:
    """heads, tokenizers: those of the model, which some objectives have to know."""
    built = []
    for name, task in tasks.items():
        names = sorted(task.sources)  # whatever their order in the configuration, the samples are the same
        phases = [(step, [weights[source] for source in names]) for step, weights in task.phases()]
        now = [weights for step, weights in phases if step <= origin.step][-1]
        later = [(step, weights) for step, weights in phases if step > origin.step]
        first, plugins = next(iter(task.objectives.values())), list(task.objectives.values())
        bound = first.cls.bind(first.config, heads or {}, tokenizers or {})
        labeler = next(iter(_labelers(task)), first)
        other = {m for plugin in plugins for m in plugin.cls.reads_other(plugin.config, task.modalities)}
        built.append(
            Task(
                name,
                task.batch_size,
                task.modalities,
                [corpora[source] for source in names],
                [(origin.step, now), *later],
                functools.partial(_arrange, plugins, bound),
                task.weigh_by,
                task.temperature,
                any(plugin.cls.uses_groups for plugin in plugins),
                [origin.drawn.get(name, {}).get(source, 0) for source in names],
                min_modalities=_min_modalities(task),
                plan=functools.partial(first.cls.plan, first.config),
                label_extensions=labeler.cls.label_extensions,
                read_label=functools.partial(
                    labeler.cls.read_label, labeler.cls.bind(labeler.config, heads or {}, tokenizers or {})
                ),
                fixed_views=[m for m in task.modalities if not first.cls.draws_views(first.config, m)],
                views=first.cls.views(first.config),
                other=[modality for modality in task.modalities if modality in other],
                whole_step=any(plugin.cls.whole_step for plugin in plugins),
            )
        )
    return built


def _labelers(task: TaskConfig) -> list[Plugin]:
    """The objectives that read labels of their own."""
    return [plugin for plugin in task.objectives.values() if "read_label" in vars(plugin.cls)]


def _min_modalities(task: TaskConfig) -> int:
    """What a sample must have of the task's modalities. Of several objectives each may use what the others cannot, but
    what one prepares of a second sample all have to wait for."""
    plugins = list(task.objectives.values())
    if len(plugins) > 1:
        plugins = [p for p in plugins if p.cls.reads_other(p.config, task.modalities)]
    return max((p.cls.min_modalities(p.config, task.modalities) for p in plugins), default=1)


def _arrange(plugins: list[Plugin], bound, sample: Sample, generator: torch.Generator) -> Example:
    """The first objective's example of a sample that all of them have prepared. bound: the first one's settings."""
    for plugin in plugins:
        sample = plugin.cls.prepare(plugin.config, sample, generator)
    example = plugins[0].cls.arrange(bound, sample, generator)
    return example if sample.match == NOT_ASKED else dataclasses.replace(example, match=sample.match)


def loss_weights(tasks: dict[str, TaskConfig]) -> dict[str, float]:
    """The weight of each objective's loss, by the name `task/objective` that it has in checkpoints and metrics."""
    return {
        f"{task}/{name}": config.weight * plugin.config.weight
        for task, config in tasks.items()
        for name, plugin in config.objectives.items()
    }


def fit_tokenizers(
    tasks: dict[str, TaskConfig],
    corpora: dict[str, Corpus],
    tokenizers: dict[str, Tokenizer],
    seed: int,
    folder: Path,
) -> dict[str, Tokenizer]:
    """Let the tokenizers that learn (BPE) learn from the training data of the tasks that read them."""
    fitted = {}
    for modality, tokenizer in tokenizers.items():
        readers = [task for task in tasks.values() if modality in task.modalities]
        if tokenizer.learns and readers:
            names = dict.fromkeys(name for task in readers for name in task.sources)
            members = _shuffled_members([corpora[name] for name in names], seed, tokenizer.extensions)
            tokenizer = tokenizer.fit(members, folder / f"tokenizer-{modality}")
        fitted[modality] = tokenizer
    return fitted


def _shuffled_members(corpora: list[Corpus], seed: int, extensions: tuple):
    """The members with these extensions of all samples, in an order that mixes the corpora."""
    bounds = np.cumsum([0, *map(len, corpora)])
    for start in range(0, int(bounds[-1]), 4096):
        for number in permute(np.arange(start, min(start + 4096, bounds[-1])), int(bounds[-1]), seed):
            which = int(np.searchsorted(bounds, number, "right")) - 1
            yield corpora[which].raw(int(number - bounds[which]), extensions)
