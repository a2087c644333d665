"""The stream: `dataset[s]` is step s of a run, read, arranged and dealt to microbatches, whoever asks for it."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..batch import Batch, Example, Planner, Sample, collate, count_targets
from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import SampleError, UserError
from ..tokenizers.base import Tokenizer, find_prompt, override_augmentation
from ..tokens import Tokens, constant
from .crash_log import CrashLog
from .mixture import BLOCK, Draws, Mixture, Source, mix, mix_more, stable_hash
from .quarantine import quarantine_row
from .token_counts import TokenCounter

MAX_RAW_BYTES = 1 << 26  # of samples that are in memory before they are decoded
OTHER = 1  # keys the draw of a second sample
MAX_ATTEMPTS = 16  # samples that are tried for a position before the step does without


@dataclass(frozen=True)
class Task:
    """What the stream needs to know of one task of the configuration."""

    name: str
    batch_size: int
    modalities: list[str]
    corpora: list[Corpus]
    phases: list[tuple[int, list[float]]]  # (first step, weight of each corpus), in order
    arrange: Callable[[Sample, torch.Generator], Example]
    by: str = "sample"  # what the weights apportion: samples or tokens; empty: tokenizers cannot count tokens yet
    temperature: float | None = None  # if set, weights are multiplied by sizes (samples or tokens) to this power
    grouped: bool = True  # whether the objective asks which samples mean the same
    start_counts: list[int] | None = None  # samples of each corpus that were read before the first phase
    min_modalities: int = 1  # of the task's modalities that a sample must have
    plan: Planner | None = None  # what the objective wants to know of a microbatch (`Objective.plan`)
    label_extensions: tuple[str, ...] = ()  # members that `read_label` reads
    read_label: Callable | None = None  # `Objective.read_label`, for the members, the tokens and the tokenizers
    fixed_views: list[str] = field(default_factory=list)  # modalities of which training draws no random view
    views: int = 1  # readings of each modality; from the second on random ones, whatever the first is
    other: list[str] = field(default_factory=list)  # modalities that are read of a second sample too
    whole_step: bool = False  # whether an objective compares the sequences of a whole step


@dataclass
class _Visit:
    """A sample that is being read for a position of a step."""

    corpus: Corpus
    index: int
    raw: dict[str, bytes]
    seed: int  # of all that is random about the visit
    errors: list[tuple[str, SampleError]]  # by modality
    tokens: dict[str, Tokens] = field(default_factory=dict)
    views: tuple[dict[str, Tokens], ...] = ()  # further readings
    group: int = 0
    label: Any = None


@dataclass(frozen=True)
class Step:
    """A step's microbatches (those of this rank), and what was met while they were read."""

    batches: list[Batch]
    counts: dict[str, dict[str, int]]  # target tokens by task and modality
    errors: list[dict]  # rows of the quarantine
    samples: list[tuple[str, int, str]]  # (task, position in the step, source/key) of every sample


class StepDataset:
    """`dataset[s]` is step s, which does not depend on how it is read or on what was read before.

    Raises UserError where the microbatches cannot be shared out among the ranks, where a source has no sample that a
    task can use, and where a step would read more samples of a source than it has.
    """

    def __init__(
        self,
        tasks: list[Task],
        tokenizers: dict[str, Tokenizer],
        seed: int,
        microbatches: int = 1,
        round_to: int = 1,
        rank: int = 0,
        ranks: int = 1,
        crash_log: CrashLog | None = None,
        augment: bool = True,
    ):
        if microbatches < ranks:
            raise UserError(
                f"microbatches={microbatches} cannot be shared out among {ranks} ranks: make it at least {ranks}"
            )
        if (total := sum(task.batch_size for task in tasks)) < microbatches:
            raise UserError(
                f"microbatches={microbatches} is more than the {total} samples of a step: lower it, or raise batch_size"
            )
        self.tasks, self.tokenizers, self.seed, self.crash_log = tasks, tokenizers, seed, crash_log
        self.augment = augment  # False: fixed views, and the same samples at the same step in every run
        self.modalities, self.microbatches, self.round_to = list(tokenizers), microbatches, round_to
        self.own = range(rank * microbatches // ranks, (rank + 1) * microbatches // ranks)  # microbatches of this rank
        names = [*self.modalities, *(t.name for t in tasks), *(c.name for t in tasks for c in t.corpora)]
        self._augmented = {  # tokenizers by source and modality
            corpus.name: override_augmentation(tokenizers, corpus.config.augment, corpus.name)
            for task in tasks
            for corpus in task.corpora
        }
        self._hashes = {name: stable_hash(name) for name in names}
        self._extensions = [self._list_extensions(task) for task in tasks]
        self.usable = [[self._find_usable(task, corpus) for corpus in task.corpora] for task in tasks]
        self.token_counters = [[TokenCounter(c, task.modalities, tokenizers) for c in task.corpora] for task in tasks]
        self.mixtures = [self._make_mixture(number) for number in range(len(tasks))]

    def _list_extensions(self, task: Task) -> tuple[str, ...]:
        """The members of a sample that the task reads."""
        extensions = {e for modality in task.modalities for e in self.tokenizers[modality].extensions}
        extensions |= set(task.label_extensions)
        if task.grouped:
            extensions |= {"json", *(self.tokenizers["text"].extensions if "text" in self.tokenizers else ())}
        return tuple(sorted(extensions))

    def _find_usable(self, task: Task, corpus: Corpus) -> np.ndarray | range:
        """The samples that have as many of the task's modalities as it needs. Raises UserError where there are none."""
        extensions = [set(self.tokenizers[modality].extensions) for modality in task.modalities]
        usable = corpus.samples_with(set().union(*extensions))
        if task.min_modalities > 1:
            counts = count_modalities(corpus, task.modalities, self.tokenizers)
            found = np.flatnonzero(counts >= task.min_modalities)
            usable = range(len(corpus)) if len(found) == len(corpus) else found
        if not len(usable):
            offered = {m: len(corpus.samples_with(set(t.extensions))) for m, t in self.tokenizers.items()}
            offered = ", ".join(f"{modality} ({count} samples)" for modality, count in offered.items() if count)
            needed = "any" if task.min_modalities == 1 else f"{task.min_modalities}"
            raise UserError(
                f"task {task.name}: no sample of source {corpus.name} has {needed} of: {', '.join(task.modalities)}; "
                f"the source offers {offered or 'nothing that the tokenizers read'}: change the task's modalities or "
                "its sources"
            )
        return usable

    def _make_mixture(self, number: int) -> Mixture:
        """The order of a task's samples. Raises UserError where a step would read a sample twice."""
        task, usable = self.tasks[number], self.usable[number]
        lengths = 1.0
        if task.by == "token":
            counters = zip(self.token_counters[number], usable, strict=True)
            lengths = [counter.mean(samples) for counter, samples in counters]
        factor = 1.0 / np.array(lengths)
        if task.temperature is not None:
            factor = factor * (np.array([len(samples) for samples in usable], float) / factor) ** task.temperature
        phases = [(step * task.batch_size, list(np.array(weights) * factor)) for step, weights in task.phases]
        corpora = zip(task.corpora, usable, strict=True)
        sources = [Source(corpus.name, len(samples), corpus.config.chunk) for corpus, samples in corpora]
        mixture = Mixture(mix(self.seed, self._hashes[task.name]), sources, phases, task.start_counts)
        if task.by:
            for source, quota in zip(sources, np.max(mixture.quotas, axis=0).tolist(), strict=True):
                if (needed := math.ceil(task.batch_size * quota / BLOCK)) > source.size:
                    raise UserError(
                        f"task {task.name}: with batch_size={task.batch_size} a step reads {needed} samples of source "
                        f"{source.name}, of which the task can use {source.size}: lower batch_size"
                        + (", or the weight of the source" if len(sources) > 1 else "")
                    )
        return mixture

    def samples_read_by_task(self, step: int) -> dict[str, dict[str, int]]:
        """How many samples of each source are read before step `step`, by task and source."""
        found = {}
        for task, mixture in zip(self.tasks, self.mixtures, strict=True):
            counts = mixture.counts_before(step * task.batch_size).tolist()
            found[task.name] = {source.name: count for source, count in zip(mixture.sources, counts, strict=True)}
        return found

    def samples_read(self, step: int) -> dict[str, int]:
        """How many samples of each source are read before step `step`, by all tasks together."""
        totals: collections.Counter[str] = collections.Counter()
        for counts in self.samples_read_by_task(step).values():
            totals.update(counts)
        return dict(totals)

    def __getitem__(self, step: int) -> Step:
        return self.read(step)

    def read(self, step: int, empty=torch.empty) -> Step:
        """Step `step`. `empty`, called like `torch.empty`, allocates the tensors of raw content."""
        microbatches: list[dict] = [{} for _ in range(self.microbatches)]
        counts, lost, keys, loads = {}, [], [], np.zeros(self.microbatches)
        for number, task in enumerate(self.tasks):
            draws = self.mixtures[number].draws(step * task.batch_size, (step + 1) * task.batch_size)
            dealt = self._deal(number, draws, loads)
            own = [i for i in range(task.batch_size) if dealt[i] in self.own]
            examples = self._read_task(number, draws, own, step, lost, keys)
            counts[task.name] = count_targets(list(examples.values()), self.modalities)
            for i, example in examples.items():
                microbatches[dealt[i]].setdefault(task.name, []).append((i, example))
        own = [microbatches[i] for i in self.own if microbatches[i]]
        planners = {task.name: task.plan for task in self.tasks if task.plan}
        first_pass = [task.name for task in self.tasks if task.whole_step and self.microbatches > 1]
        prompt, halved = find_prompt(self.tokenizers), tuple(m for m, t in self.tokenizers.items() if t.half_precision)
        settings = (self.modalities, counts, planners, self.round_to, empty, prompt, first_pass, halved)
        batches = [collate(examples, *settings) for examples in own]
        return Step(batches, counts, lost, keys)

    def _deal(self, number: int, draws: Draws, loads: np.ndarray) -> list[int]:
        """The microbatch of each sample: the longest first, each to the one with the fewest tokens (`loads`) so far."""
        if self.microbatches == 1:
            return [0] * len(draws.sample)
        counters, usable = self.token_counters[number], self.usable[number]
        pairs = zip(draws.source.tolist(), draws.sample.tolist(), strict=True)
        lengths = np.array([counters[source].count(int(usable[source][sample])) for source, sample in pairs])
        dealt = [0] * len(lengths)
        for i in np.argsort(-lengths, kind="stable").tolist():
            dealt[i] = int(loads.argmin())
            loads[dealt[i]] += lengths[i]
        return dealt

    def _read_task(
        self, number: int, draws: Draws, own: list[int], step: int, lost: list, keys: list
    ) -> dict[int, Example]:
        """The examples of a task at some positions of a step. A sample that cannot be read is replaced by another one
        of its source."""
        task, mixture, examples = self.tasks[number], self.mixtures[number], {}
        pending = [(i, int(draws.sample[i])) for i in own]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            results = self._read_samples(number, draws, pending, step, lost)
            failed = []
            for (i, _), result in zip(pending, results, strict=True):
                if result is None:
                    failed.append(i)
                else:
                    examples[i], name = result
                    keys.append((task.name, i, name))
            if not failed:
                break
            pending = [(i, mixture.substitute(int(draws.source[i]), int(draws.position[i]), attempt)) for i in failed]
        return dict(sorted(examples.items()))

    def _read_samples(self, number: int, draws: Draws, pending: list[tuple[int, int]], step: int, lost: list) -> list:
        """For each (position, sample of its source) its example and name, None where nothing of it can be read."""
        task, extensions = self.tasks[number], self._extensions[number]
        results, visits, held = [], [], 0
        turns = [(int(draws.source[i]), int(draws.epoch[i])) for i, _ in pending]
        indices = [
            int(self.usable[number][source][sample]) for (source, _), (_, sample) in zip(turns, pending, strict=True)
        ]
        for (source, _), index, seed in zip(turns, indices, self._make_seeds(task, turns, indices), strict=True):
            visits.append(self._visit(task, task.corpora[source], index, seed, extensions))
            held += sum(map(len, visits[-1].raw.values()))
            if held > MAX_RAW_BYTES:
                results += self._arrange(number, visits, step, lost)
                visits, held = [], 0
        return results + self._arrange(number, visits, step, lost)

    def _visit(self, task: Task, corpus: Corpus, index: int, seed: int, extensions: tuple[str, ...]) -> _Visit:
        """A sample with its members in memory, those of them that can be read."""
        if self.crash_log and self.crash_log.excludes(corpus, index):
            return _Visit(corpus, index, {}, seed, [("", SampleError("crash", "reading it ended the program twice"))])
        raw, failed = corpus.read(index, extensions)
        errors = [(self._find_modality(extension, task.modalities), error) for extension, error in failed]
        return _Visit(corpus, index, raw, seed, errors)

    def _make_seeds(self, task: Task, turns: list[tuple[int, int]], indices: list[int]) -> list[int]:
        """The seed of each visit, from which all that is random about it comes. turns: (source, epoch) of each."""
        states = {
            (source, epoch): mix(self.seed, self._hashes[task.name], self._hashes[task.corpora[source].name], epoch)
            for source, epoch in set(turns)
        }
        return mix_more(np.array([states[turn] for turn in turns], np.uint64), indices).tolist()

    def _arrange(self, number: int, visits: list[_Visit], step: int, lost: list) -> list:
        """For each visit its example and the sample's name, None where nothing can be read."""
        task, results, generator = self.tasks[number], [], torch.Generator()
        self._read_modalities(task, visits, task.modalities, task.views, step, lost)
        read = [visit for visit in visits if visit.tokens]
        others = self._read_others(number, read, step, lost) if task.other else {}
        for visit in visits:
            other = others.get(id(visit))
            if not visit.tokens or (task.other and other is None):
                results.append(None)
                continue
            sample = Sample(visit.tokens, visit.group, visit.label, visit.views)
            if other is not None:
                sample = dataclasses.replace(sample, other=Sample(other.tokens, other.group, other.label))
            example = task.arrange(sample, generator.manual_seed(visit.seed >> 1))
            results.append((example, f"{visit.corpus.name}/{visit.corpus.key(visit.index)}"))
        return results

    def _read_modalities(
        self, task: Task, visits: list[_Visit], modalities: list[str], views: int, step: int, lost: list
    ) -> None:
        """Fill the visits with what can be read of their samples; `tokens` stays empty where nothing can."""
        for modality in modalities:
            number = self.modalities.index(modality)
            augment = self.augment and modality not in task.fixed_views
            readings = [self._tokenize(modality, visits, augment)]
            readings += [self._tokenize(modality, visits, modality not in task.fixed_views, v) for v in range(1, views)]
            for visit, *own in zip(visits, *readings, strict=True):
                if error := next((sequences for sequences in own if isinstance(sequences, SampleError)), None):
                    visit.errors.append((modality, error))
                elif all(sequences and len(sequences[0]) for sequences in own):
                    first, *more = (one.replace(modality=constant(number, len(one))) for one, *_ in own)
                    visit.tokens[modality] = first
                    visit.views = visit.views or tuple({} for _ in more)
                    for view, tokens in zip(visit.views, more, strict=True):
                        view[modality] = tokens
        if self.crash_log:
            self.crash_log.end()
        for visit in visits:
            if visit.tokens and task.read_label:
                try:
                    visit.label = task.read_label(visit.raw, visit.tokens, self.tokenizers)
                except SampleError as error:
                    visit.errors.append(("label", error))
                    visit.tokens.clear()
            if not visit.tokens and not visit.errors:
                visit.errors.append(("", SampleError("empty", f"none of {', '.join(task.modalities)} in it")))
            for modality, error in visit.errors:
                lost.append(quarantine_row(visit.corpus, visit.index, modality, error, step + 1))
            if visit.tokens and task.grouped:
                visit.group = find_group(visit.corpus, visit.index, visit.raw, self.tokenizers)

    def _read_others(self, number: int, visits: list[_Visit], step: int, lost: list) -> dict[int, _Visit]:
        """For each visit, by its `id`, a visit to another sample of the same source that has `Task.other` and is of
        another group. Which one is drawn by the visit's seed; one that cannot be read is replaced as any sample is."""
        task, found, pending = self.tasks[number], {}, visits
        for attempt in range(MAX_ATTEMPTS):
            drawn = []
            for visit in pending:
                usable = self.usable[number][task.corpora.index(visit.corpus)]
                seed = mix(visit.seed, OTHER, attempt)
                index = int(usable[mix(seed) % len(usable)])
                drawn.append(self._visit(task, visit.corpus, index, seed, self._extensions[number]))
            self._read_modalities(task, drawn, task.other, 1, step, lost)
            for visit, other in zip(pending, drawn, strict=True):
                is_other = other.index != visit.index and not (task.grouped and other.group == visit.group)
                if is_other and all(modality in other.tokens for modality in task.other):
                    found[id(visit)] = other
            pending = [visit for visit in pending if id(visit) not in found]
            if not pending:
                break
        for visit in pending:
            error = SampleError("alone", f"{MAX_ATTEMPTS} others were tried")
            lost.append(quarantine_row(visit.corpus, visit.index, "", error, step + 1))
        return found

    def _tokenize(self, modality: str, visits: list[_Visit], augment: bool, view: int = 0):
        """Yields for each visit the sequences of its members of a modality, or the SampleError.

        view: the number of the reading, each of which draws differently.
        """
        tokenizer, generator = self.tokenizers[modality], random.Random(0)
        states = mix_more(mix_more(0, [visit.seed for visit in visits]), self._hashes[modality])
        seeds = (mix_more(states, view) if view else states).tolist()
        for visit, seed in zip(visits, seeds, strict=True):
            raw = {extension: visit.raw[extension] for extension in tokenizer.extensions if extension in visit.raw}
            if self.crash_log and raw:
                self.crash_log.begin(visit.corpus, visit.index)
            generator.seed(seed)
            try:
                tokenizer = self._augmented[visit.corpus.name][modality]
                yield tokenizer.read(raw, generator if augment else None) if raw else []
            except SampleError as error:
                yield error

    def _find_modality(self, extension: str, modalities: list[str]) -> str:
        return next((m for m in modalities if extension in self.tokenizers[m].extensions), extension)


def count_modalities(corpus: Corpus, modalities: list[str], tokenizers: dict[str, Tokenizer]) -> np.ndarray:
    """How many of the modalities each sample of a corpus has (N,)."""
    counts = np.zeros(len(corpus), np.int64)
    for modality in modalities:
        own = corpus.samples_with(set(tokenizers[modality].extensions))
        counts[slice(None) if isinstance(own, range) else own] += 1
    return counts


def find_group(corpus: Corpus, index: int, raw: dict[str, bytes], tokenizers: dict[str, Tokenizer]) -> int:
    """A number that is equal for samples that mean the same: the hash of the source's `group` field, where it names
    one, else of the text, else of the sample's own key."""
    if corpus.config.group:
        value = lookup(parse_map(raw.get("json")), corpus.config.group)
        if value is not None:
            return stable_hash(f"field {value}")
    elif (text := tokenizers.get("text")) is not None:
        try:
            texts = text.split_inputs(raw)
        except SampleError:
            texts = []
        if texts:
            return stable_hash(f"text {texts[0].strip().casefold()}")
    return stable_hash(f"{corpus.shard(index)}/{corpus.key(index)}")
