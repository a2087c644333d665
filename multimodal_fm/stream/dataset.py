"""The stream: `steps[s]` is step s of a run, read, arranged and dealt to microbatches, whoever asks for it."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from ..batch import Arranged, Batch, Item, count_asked, gather
from ..corpus.fields import lookup, parse_map
from ..corpus.shards import Corpus
from ..errors import BadInput, Lost
from ..tokens import constant
from .crash_log import Journal
from .mixture import Mixture, Source, mix, mix_on, number
from .quarantine import ledger_row
from .token_counts import Ruler

HELD = 1 << 26  # bytes of items that are in memory before they are decoded
ATTEMPTS = 16  # how many items are tried for a position before the step does without


@dataclass(frozen=True)
class Section:
    """One section's reader: what it takes a step, from which corpora, and how an item is arranged."""

    name: str
    take: int
    parts: list[str]
    corpora: list[Corpus]
    phases: list[tuple[int, list[float]]]  # (first step, weight of each corpus), in order
    arrange: object  # (Item, generator) -> Arranged
    by: str = "item"  # what the weights share out: items or tokens
    temperature: float | None = None  # weights times size (in what `by` names) to this power
    grouped: bool = True  # whether the objective asks which items mean the same
    drawn: list[int] | None = None  # how many items of each corpus were read before the first phase


@dataclass
class _Opened:
    """An item on its way: its members, and what has become of them."""

    corpus: Corpus
    index: int
    raw: dict[str, bytes]
    key: int  # of all that is random about this visit
    failed: list[tuple[str, Lost]]
    parts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step's microbatches (those of this rank) and what was met on the way."""

    batches: list[Batch]
    counts: dict[str, dict[str, int]]  # asked tokens by section and kind
    lost: list[dict]
    keys: list[tuple[str, int, str]]  # (section, place, source/key) of every item


class Steps:
    """`steps[s]` is step s: the same for any number of workers, and dealt alike for any number of ranks."""

    def __init__(
        self,
        sections: list[Section],
        tokenizers: dict,
        seed: int,
        microbatches: int = 1,
        round_to: int = 1,
        rank: int = 0,
        ranks: int = 1,
        journal: Journal | None = None,
    ):
        if microbatches % ranks:
            raise BadInput(
                f"microbatches={microbatches} cannot be shared out among {ranks} ranks: take a multiple of it"
            )
        if (take := sum(section.take for section in sections)) < microbatches:
            raise BadInput(f"microbatches={microbatches} are more than the {take} items of a step: take more, or fewer")
        self.sections, self.tokenizers, self.seed = sections, tokenizers, seed
        self.kinds, self.microbatches, self.round_to = list(tokenizers), microbatches, round_to
        self.own = range(rank * microbatches // ranks, (rank + 1) * microbatches // ranks)
        self.journal = journal
        names = [*self.kinds, *(s.name for s in sections), *(c.name for s in sections for c in s.corpora)]
        self.numbers = {name: number(name) for name in names}
        self.wanted = [self._endings(section) for section in sections]
        self.usable, self.mixtures, self.rulers = [], [], []
        for section in sections:
            endings = {ending for kind in section.parts for ending in tokenizers[kind].module.extensions}
            usable = [corpus.having(endings) for corpus in section.corpora]
            for corpus, items in zip(section.corpora, usable, strict=True):
                if not len(items):
                    parts = ", ".join(section.parts)
                    raise BadInput(f"section {section.name}: no item of source {corpus.name} has any of: {parts}")
            rulers = [Ruler(corpus, section.parts, tokenizers) for corpus in section.corpora]
            self.usable.append(usable)
            self.rulers.append(rulers)
            self.mixtures.append(self._mixture(section, usable, rulers))

    def _mixture(self, section: Section, usable: list, rulers: list[Ruler]) -> Mixture:
        sizes = np.array([len(items) for items in usable], float)
        by_token = section.by == "token"
        lengths = [ruler.mean(items) for ruler, items in zip(rulers, usable, strict=True)] if by_token else 1.0
        factor = 1.0 / np.array(lengths)
        if section.temperature is not None:
            factor = factor * (sizes / factor) ** section.temperature
        phases = [(step * section.take, list(np.array(weights) * factor)) for step, weights in section.phases]
        sources = [Source(c.name, len(items), c.config.chunk) for c, items in zip(section.corpora, usable, strict=True)]
        return Mixture(mix(self.seed, number(section.name)), sources, phases, section.drawn)

    def drawn_by_section(self, step: int) -> dict[str, dict[str, int]]:
        """How many items of each source stand before step `step`, by section."""
        found = {}
        for section, mixture in zip(self.sections, self.mixtures, strict=True):
            counts = mixture.drawn(step * section.take).tolist()
            found[section.name] = {s.name: count for s, count in zip(mixture.sources, counts, strict=True)}
        return found

    def drawn(self, step: int) -> dict[str, int]:
        """How many items of each source stand before step `step`, all sections together."""
        totals: collections.Counter[str] = collections.Counter()
        for counts in self.drawn_by_section(step).values():
            totals.update(counts)
        return dict(totals)

    def __getitem__(self, step: int) -> Step:
        return self.read(step)

    def read(self, step: int, empty=torch.empty) -> Step:
        """Step `step`; its raw content lies in tensors that `empty` makes."""
        dealt: list[dict] = [{} for _ in range(self.microbatches)]
        counts, lost, keys, loads = {}, [], [], np.zeros(self.microbatches)
        for which, section in enumerate(self.sections):
            draws = self.mixtures[which].draws(step * section.take, (step + 1) * section.take)
            turns = self._deal(which, draws, loads)
            places = [place for place in range(section.take) if turns[place] in self.own]
            arranged = self._read(which, draws, places, step, lost, keys)
            counts[section.name] = count_asked(list(arranged.values()), self.kinds)
            for place, one in arranged.items():
                dealt[turns[place]].setdefault(section.name, []).append((place, one))
        batches = [gather(dealt[turn], self.kinds, counts, self.round_to, empty) for turn in self.own if dealt[turn]]
        return Step(batches, counts, lost, keys)

    def _deal(self, which: int, draws, loads: np.ndarray) -> list[int]:
        """A microbatch for each place, so that their tokens are about equal: longest first, each to the lightest."""
        if self.microbatches == 1:
            return [0] * len(draws.item)
        lengths = np.array(
            [
                self.rulers[which][source].of(int(self.usable[which][source][item]))
                for source, item in zip(draws.source.tolist(), draws.item.tolist(), strict=True)
            ]
        )
        turns = [0] * len(lengths)
        for place in np.argsort(-lengths, kind="stable").tolist():
            turns[place] = int(loads.argmin())
            loads[turns[place]] += lengths[place]
        return turns

    def _read(self, which: int, draws, places: list[int], step: int, lost: list, keys: list) -> dict[int, Arranged]:
        """The items at some places of a step, arranged. What cannot be read gives way to another of its source."""
        section = self.sections[which]
        found: dict[int, Arranged] = {}
        waiting = [(place, int(draws.item[place])) for place in places]
        for attempt in range(ATTEMPTS):
            read = self._read_items(which, draws, waiting, step, lost)
            again = []
            for (place, _), one in zip(waiting, read, strict=True):
                if one is None:
                    position = int(draws.position[place])
                    other = self.mixtures[which].substitute(int(draws.source[place]), position, attempt + 1)
                    again.append((place, other))
                else:
                    found[place], name = one
                    keys.append((section.name, place, name))
            waiting = again
            if not waiting:
                break
        return dict(sorted(found.items()))

    def _read_items(self, which: int, draws, wanted: list[tuple[int, int]], step: int, lost: list) -> list:
        """For each (place, item of its source): what it became and its name, None where nothing in it can be read."""
        section, endings = self.sections[which], self.wanted[which]
        results, opened, held = [], [], 0
        visits = [(int(draws.source[place]), int(draws.epoch[place])) for place, _ in wanted]
        items = [int(self.usable[which][source][item]) for (source, _), (_, item) in zip(visits, wanted, strict=True)]
        for (source, _), index, key in zip(visits, items, self._keys(section, visits, items), strict=True):
            corpus = section.corpora[source]
            if self.journal and self.journal.blocks(corpus, index):
                raw, failed = {}, [("", Lost("crash", "reading it ended the program twice"))]
            else:
                raw, broken = corpus.read(index, endings)
                failed = [(self._kind_of(ending, section.parts), error) for ending, error in broken]
            opened.append(_Opened(corpus, index, raw, key, failed))
            held += sum(map(len, raw.values()))
            if held > HELD:
                results += self._arrange(section, opened, step, lost)
                opened, held = [], 0
        return results + self._arrange(section, opened, step, lost)

    def _keys(self, section: Section, visits: list[tuple[int, int]], items: list[int]) -> list[int]:
        """A number for each visit, a (source, epoch), of an item: of it comes all that is random about the visit."""
        states = {
            (source, epoch): mix(
                self.seed, self.numbers[section.name], self.numbers[section.corpora[source].name], epoch
            )
            for source, epoch in set(visits)
        }
        return mix_on(np.array([states[visit] for visit in visits], np.uint64), items).tolist()

    def _arrange(self, section: Section, opened: list[_Opened], step: int, lost: list) -> list:
        for kind in section.parts:
            place = self.kinds.index(kind)
            for one, views in zip(opened, self._views(kind, opened), strict=True):
                if isinstance(views, Lost):
                    one.failed.append((kind, views))
                elif views and len(views[0]):
                    one.parts[kind] = views[0].replace(kind=constant(place, len(views[0])))
        if self.journal:
            self.journal.clear()
        results, generator = [], torch.Generator()
        for one in opened:
            if not one.parts and not one.failed:
                one.failed.append(("", Lost("empty", f"none of {', '.join(section.parts)} in it")))
            for kind, error in one.failed:
                lost.append(ledger_row(one.corpus, one.index, kind, error, step + 1))
            if not one.parts:
                results.append(None)
                continue
            group = group_of(one.corpus, one.index, one.raw, self.tokenizers) if section.grouped else 0
            arranged = section.arrange(Item(one.parts, group), generator.manual_seed(one.key >> 1))
            results.append((arranged, f"{one.corpus.name}/{one.corpus.key(one.index)}"))
        return results

    def _views(self, kind: str, opened: list[_Opened]):
        """One training view of each item's members of a kind, or what it was Lost to."""
        module, settings, number_of = self.tokenizers[kind].module, self.tokenizers[kind].settings, self.numbers[kind]
        members = [{e: one.raw[e] for e in module.extensions if e in one.raw} for one in opened]
        generator = random.Random(0)
        seeds = mix_on(mix_on(0, [one.key for one in opened]), number_of).tolist()
        for one, own, seed in zip(opened, members, seeds, strict=True):
            if self.journal and own:
                self.journal.note(one.corpus, one.index)
            generator.seed(seed)
            try:
                yield module.read(settings, own, generator) if own else []
            except Lost as error:
                yield error

    def _endings(self, section: Section) -> tuple[str, ...]:
        """The members that the section needs."""
        endings = {ending for kind in section.parts for ending in self.tokenizers[kind].module.extensions}
        if section.grouped:
            endings |= {"json", *(self.tokenizers["text"].module.extensions if "text" in self.tokenizers else ())}
        return tuple(sorted(endings))

    def _kind_of(self, ending: str, parts: list[str]) -> str:
        return next((kind for kind in parts if ending in self.tokenizers[kind].module.extensions), ending)


def group_of(corpus: Corpus, index: int, raw: dict, tokenizers: dict) -> int:
    """A number that items of one meaning share: the source's `group` field, else the text, else the item itself."""
    if corpus.config.group:
        value = lookup(parse_map(raw.get("json")), corpus.config.group)
        if value is not None:
            return number(f"field {value}")
    elif (text := tokenizers.get("text")) is not None:
        try:
            texts = text.module.things(text.settings, raw)
        except Lost:
            texts = []
        if texts:
            return number(f"text {texts[0].strip().casefold()}")
    return number(f"{corpus.shard(index)}/{corpus.key(index)}")
