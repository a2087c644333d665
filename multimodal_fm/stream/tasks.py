"""What the config's sections become: the stream that feeds them, the tokenizers that learn, the losses' weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import Config, Plugin
from ..corpus.shards import Corpus
from ..train.parallel import ALONE, Ranks
from .crash_log import Journal
from .dataset import Section, Steps
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
    ranks: Ranks = ALONE,
    origin: Origin = START,
    journal: Journal | None = None,
    tokenizers: bool = True,
) -> Steps:
    """The config's stream. tokenizers False: they are not there yet, and only the sources are looked at."""
    sections = sections_of(config, corpora, origin)
    if not tokenizers:
        sections = [dataclasses.replace(section, by="item") for section in sections]
    return Steps(
        sections,
        config.tokenizers,
        config.seed,
        config.microbatches,
        config.round_to,
        ranks.rank,
        ranks.size,
        journal,
    )


def sections_of(config: Config, corpora: dict[str, Corpus], origin: Origin = START) -> list[Section]:
    found = []
    for name, section in config.sections.items():
        phases = section.phases()
        now = [weights for step, weights in phases if step <= origin.step][-1]
        later = [(step, weights) for step, weights in phases if step > origin.step]
        found.append(
            Section(
                name,
                section.take,
                section.parts,
                [corpora[source] for source in section.sources],
                [(step, list(weights.values())) for step, weights in ((origin.step, now), *later)],
                _Arrange(section.objective),
                section.by,
                section.temperature,
                any(getattr(o.module.Objective, "whole_step", False) for o in _objectives(section)),
                [origin.drawn.get(name, {}).get(source, 0) for source in section.sources],
            )
        )
    return found


def _objectives(section) -> list[Plugin]:
    return [section.objective, *(also.objective for also in section.also.values())]


class _Arrange:
    """An objective's `arrange` with its settings."""

    def __init__(self, objective: Plugin):
        self.objective = objective

    def __call__(self, item, generator):
        return self.objective.module.arrange(self.objective.settings, item, generator)


def weights_of(config: Config) -> dict[str, float]:
    """The weight of each objective, by the name it has in the model and the metrics."""
    weights = {}
    for name, section in config.sections.items():
        weights[name] = section.weight
        weights |= {f"{name}+{other}": also.weight for other, also in section.also.items()}
    return weights


def fit(config: Config, corpora: dict[str, Corpus], run: Path) -> dict[str, Plugin]:
    """Let the tokenizers that learn (BPE) learn from the training data of the sections that read them."""
    fitted = {}
    for kind, tokenizer in config.tokenizers.items():
        readers = [s for s in config.sections.values() if kind in s.parts]
        if hasattr(tokenizer.module, "fit") and not tokenizer.settings.file and readers:
            names = dict.fromkeys(name for section in readers for name in section.sources)
            raws = _shuffled([corpora[name] for name in names], config.seed, tokenizer.module.extensions)
            settings = tokenizer.module.fit(tokenizer.settings, raws, run / f"tokenizer-{kind}")
            tokenizer = dataclasses.replace(tokenizer, settings=settings)
        fitted[kind] = tokenizer
    return fitted


def _shuffled(corpora: list[Corpus], seed: int, endings: tuple):
    """The wanted members of all items, in an order that mixes the corpora."""
    bounds = np.cumsum([0, *map(len, corpora)])
    for start in range(0, int(bounds[-1]), 4096):
        for place in permute(np.arange(start, min(start + 4096, bounds[-1])), int(bounds[-1]), seed):
            which = int(np.searchsorted(bounds, place, "right")) - 1
            yield corpora[which].raw(int(place - bounds[which]), endings)
