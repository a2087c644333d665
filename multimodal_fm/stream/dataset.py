"""The stream: `steps[s]` is step s of a run, read, arranged and dealt to microbatches, whoever asks for it."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from ..batch import Batch, Example, Sample, collate, count_targets
from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import SampleError, UserError
from ..tokens import constant
from .crash_log import Journal
from .mixture import Mixture, Source, mix, mix_on, number
from .quarantine import ledger_row
from .token_counts import Ruler

HELD = 1 << 26  # bytes of samples that are in memory before they are decoded
ATTEMPTS = 16  # how many samples are tried for a position before the step does without


@dataclass(frozen=True)
class Task:
    """One task's reader: what it takes a step, from which corpora, and how a sample is arranged."""

    name: str
    batch_size: int
    modalities: list[str]
    corpora: list[Corpus]
    phases: list[tuple[int, list[float]]]  # (first step, weight of each corpus), in order
    arrange: object  # (Sample, generator) -> Example
    by: str = "sample"  # what the weights share out: samples or tokens
    temperature: float | None = None  # weights times size (in what `by` names) to this power
    grouped: bool = True  # whether the objective asks which samples mean the same
    drawn: list[int] | None = None  # how many samples of each corpus were read before the first phase


@dataclass
class _Opened:
    """A sample on its way: its members, and what has become of them."""

    corpus: Corpus
    index: int
    raw: dict[str, bytes]
    key: int  # of all that is random about this visit
    failed: list[tuple[str, SampleError]]
    parts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step's microbatches (those of this rank) and what was met on the way."""

    batches: list[Batch]
    counts: dict[str, dict[str, int]]  # targets tokens by task and modality
    lost: list[dict]
    keys: list[tuple[str, int, str]]  # (task, place, source/key) of every sample


class Steps:
    """`steps[s]` is step s: the same for any number of workers, and dealt alike for any number of ranks."""

    def __init__(
        self,
        tasks: list[Task],
        tokenizers: dict,
        seed: int,
        microbatches: int = 1,
        round_to: int = 1,
        rank: int = 0,
        ranks: int = 1,
        journal: Journal | None = None,
    ):
        if microbatches % ranks:
            raise UserError(
                f"microbatches={microbatches} cannot be shared out among {ranks} ranks: take a multiple of it"
            )
        if (take := sum(task.batch_size for task in tasks)) < microbatches:
            raise UserError(
                f"microbatches={microbatches} are more than the {take} samples of a step: take more, or fewer"
            )
        self.tasks, self.tokenizers, self.seed = tasks, tokenizers, seed
        self.modalities, self.microbatches, self.round_to = list(tokenizers), microbatches, round_to
        self.own = range(rank * microbatches // ranks, (rank + 1) * microbatches // ranks)
        self.journal = journal
        names = [*self.modalities, *(s.name for s in tasks), *(c.name for s in tasks for c in s.corpora)]
        self.numbers = {name: number(name) for name in names}
        self.wanted = [self._endings(task) for task in tasks]
        self.usable, self.mixtures, self.rulers = [], [], []
        for task in tasks:
            endings = {ending for modality in task.modalities for ending in tokenizers[modality].extensions}
            usable = [corpus.having(endings) for corpus in task.corpora]
            for corpus, samples in zip(task.corpora, usable, strict=True):
                if not len(samples):
                    parts = ", ".join(task.modalities)
                    raise UserError(f"task {task.name}: no sample of source {corpus.name} has any of: {parts}")
            rulers = [Ruler(corpus, task.modalities, tokenizers) for corpus in task.corpora]
            self.usable.append(usable)
            self.rulers.append(rulers)
            self.mixtures.append(self._mixture(task, usable, rulers))

    def _mixture(self, task: Task, usable: list, rulers: list[Ruler]) -> Mixture:
        sizes = np.array([len(samples) for samples in usable], float)
        by_token = task.by == "token"
        lengths = [ruler.mean(samples) for ruler, samples in zip(rulers, usable, strict=True)] if by_token else 1.0
        factor = 1.0 / np.array(lengths)
        if task.temperature is not None:
            factor = factor * (sizes / factor) ** task.temperature
        phases = [(step * task.batch_size, list(np.array(weights) * factor)) for step, weights in task.phases]
        sources = [
            Source(c.name, len(samples), c.config.chunk) for c, samples in zip(task.corpora, usable, strict=True)
        ]
        return Mixture(mix(self.seed, number(task.name)), sources, phases, task.drawn)

    def drawn_by_task(self, step: int) -> dict[str, dict[str, int]]:
        """How many samples of each source stand before step `step`, by task."""
        found = {}
        for task, mixture in zip(self.tasks, self.mixtures, strict=True):
            counts = mixture.drawn(step * task.batch_size).tolist()
            found[task.name] = {s.name: count for s, count in zip(mixture.sources, counts, strict=True)}
        return found

    def drawn(self, step: int) -> dict[str, int]:
        """How many samples of each source stand before step `step`, all tasks together."""
        totals: collections.Counter[str] = collections.Counter()
        for counts in self.drawn_by_task(step).values():
            totals.update(counts)
        return dict(totals)

    def __getitem__(self, step: int) -> Step:
        return self.read(step)

    def read(self, step: int, empty=torch.empty) -> Step:
        """Step `step`; its raw content lies in tensors that `empty` makes."""
        dealt: list[dict] = [{} for _ in range(self.microbatches)]
        counts, lost, keys, loads = {}, [], [], np.zeros(self.microbatches)
        for which, task in enumerate(self.tasks):
            draws = self.mixtures[which].draws(step * task.batch_size, (step + 1) * task.batch_size)
            turns = self._deal(which, draws, loads)
            places = [place for place in range(task.batch_size) if turns[place] in self.own]
            arranged = self._read(which, draws, places, step, lost, keys)
            counts[task.name] = count_targets(list(arranged.values()), self.modalities)
            for place, one in arranged.items():
                dealt[turns[place]].setdefault(task.name, []).append((place, one))
        batches = [
            collate(dealt[turn], self.modalities, counts, self.round_to, empty) for turn in self.own if dealt[turn]
        ]
        return Step(batches, counts, lost, keys)

    def _deal(self, which: int, draws, loads: np.ndarray) -> list[int]:
        """A microbatch for each place, so that their tokens are about equal: longest first, each to the lightest."""
        if self.microbatches == 1:
            return [0] * len(draws.sample)
        lengths = np.array(
            [
                self.rulers[which][source].of(int(self.usable[which][source][sample]))
                for source, sample in zip(draws.source.tolist(), draws.sample.tolist(), strict=True)
            ]
        )
        turns = [0] * len(lengths)
        for place in np.argsort(-lengths, kind="stable").tolist():
            turns[place] = int(loads.argmin())
            loads[turns[place]] += lengths[place]
        return turns

    def _read(self, which: int, draws, places: list[int], step: int, lost: list, keys: list) -> dict[int, Example]:
        """The samples at some places of a step, arranged. What cannot be read gives way to another of its source."""
        task = self.tasks[which]
        found: dict[int, Example] = {}
        waiting = [(place, int(draws.sample[place])) for place in places]
        for attempt in range(ATTEMPTS):
            read = self._read_samples(which, draws, waiting, step, lost)
            again = []
            for (place, _), one in zip(waiting, read, strict=True):
                if one is None:
                    position = int(draws.position[place])
                    other = self.mixtures[which].substitute(int(draws.source[place]), position, attempt + 1)
                    again.append((place, other))
                else:
                    found[place], name = one
                    keys.append((task.name, place, name))
            waiting = again
            if not waiting:
                break
        return dict(sorted(found.items()))

    def _read_samples(self, which: int, draws, wanted: list[tuple[int, int]], step: int, lost: list) -> list:
        """For each (place, sample of its source): what it became and its name, None where nothing in it can be read."""
        task, endings = self.tasks[which], self.wanted[which]
        results, opened, held = [], [], 0
        visits = [(int(draws.source[place]), int(draws.epoch[place])) for place, _ in wanted]
        samples = [
            int(self.usable[which][source][sample]) for (source, _), (_, sample) in zip(visits, wanted, strict=True)
        ]
        for (source, _), index, key in zip(visits, samples, self._keys(task, visits, samples), strict=True):
            corpus = task.corpora[source]
            if self.journal and self.journal.blocks(corpus, index):
                raw, failed = {}, [("", SampleError("crash", "reading it ended the program twice"))]
            else:
                raw, broken = corpus.read(index, endings)
                failed = [(self._modality_of(ending, task.modalities), error) for ending, error in broken]
            opened.append(_Opened(corpus, index, raw, key, failed))
            held += sum(map(len, raw.values()))
            if held > HELD:
                results += self._arrange(task, opened, step, lost)
                opened, held = [], 0
        return results + self._arrange(task, opened, step, lost)

    def _keys(self, task: Task, visits: list[tuple[int, int]], samples: list[int]) -> list[int]:
        """A number for each visit, a (source, epoch), of a sample: of it comes all that is random about the visit."""
        states = {
            (source, epoch): mix(self.seed, self.numbers[task.name], self.numbers[task.corpora[source].name], epoch)
            for source, epoch in set(visits)
        }
        return mix_on(np.array([states[visit] for visit in visits], np.uint64), samples).tolist()

    def _arrange(self, task: Task, opened: list[_Opened], step: int, lost: list) -> list:
        for modality in task.modalities:
            place = self.modalities.index(modality)
            for one, views in zip(opened, self._views(modality, opened), strict=True):
                if isinstance(views, SampleError):
                    one.failed.append((modality, views))
                elif views and len(views[0]):
                    one.parts[modality] = views[0].replace(modality=constant(place, len(views[0])))
        if self.journal:
            self.journal.clear()
        results, generator = [], torch.Generator()
        for one in opened:
            if not one.parts and not one.failed:
                one.failed.append(("", SampleError("empty", f"none of {', '.join(task.modalities)} in it")))
            for modality, error in one.failed:
                lost.append(ledger_row(one.corpus, one.index, modality, error, step + 1))
            if not one.parts:
                results.append(None)
                continue
            group = group_of(one.corpus, one.index, one.raw, self.tokenizers) if task.grouped else 0
            arranged = task.arrange(Sample(one.parts, group), generator.manual_seed(one.key >> 1))
            results.append((arranged, f"{one.corpus.name}/{one.corpus.key(one.index)}"))
        return results

    def _views(self, modality: str, opened: list[_Opened]):
        """One training view of each sample's members of a modality, or the SampleError."""
        tokenizer, number_of = self.tokenizers[modality], self.numbers[modality]
        members = [{e: one.raw[e] for e in tokenizer.extensions if e in one.raw} for one in opened]
        generator = random.Random(0)
        seeds = mix_on(mix_on(0, [one.key for one in opened]), number_of).tolist()
        for one, own, seed in zip(opened, members, seeds, strict=True):
            if self.journal and own:
                self.journal.note(one.corpus, one.index)
            generator.seed(seed)
            try:
                yield tokenizer.read(own, generator) if own else []
            except SampleError as error:
                yield error

    def _endings(self, task: Task) -> tuple[str, ...]:
        """The members that the task needs."""
        endings = {ending for modality in task.modalities for ending in self.tokenizers[modality].extensions}
        if task.grouped:
            endings |= {"json", *(self.tokenizers["text"].extensions if "text" in self.tokenizers else ())}
        return tuple(sorted(endings))

    def _modality_of(self, ending: str, parts: list[str]) -> str:
        return next((modality for modality in parts if ending in self.tokenizers[modality].extensions), ending)


def group_of(corpus: Corpus, index: int, raw: dict, tokenizers: dict) -> int:
    """A number that samples of one meaning share: the source's `group` field, else the text, else the sample itself."""
    if corpus.config.group:
        value = lookup(parse_map(raw.get("json")), corpus.config.group)
        if value is not None:
            return number(f"field {value}")
    elif (text := tokenizers.get("text")) is not None:
        try:
            texts = text.split_inputs(raw)
        except SampleError:
            texts = []
        if texts:
            return number(f"text {texts[0].strip().casefold()}")
    return number(f"{corpus.shard(index)}/{corpus.key(index)}")
