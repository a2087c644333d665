"""The stream: `steps[s]` is step s of a run, read, arranged and dealt to microbatches, whoever asks for it."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import mmap
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .batch import Arranged, Batch, Item, count_asked, gather
from .errors import BadInput, Lost
from .mixture import Mixture, Source, mix, number
from .rows import lookup, parse_map
from .shards import Corpus
from .tokens import constant

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


class Steps(torch.utils.data.Dataset):
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
        batches = [gather(dealt[turn], self.kinds, counts, self.round_to) for turn in self.own if dealt[turn]]
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
        for place, item in wanted:
            source, epoch = int(draws.source[place]), int(draws.epoch[place])
            corpus, index = section.corpora[source], int(self.usable[which][source][item])
            if self.journal and self.journal.blocks(corpus, index):
                raw, failed = {}, [("", Lost("crash", "reading it ended the program twice"))]
            else:
                raw, broken = corpus.read(index, endings)
                failed = [(self._kind_of(ending, section.parts), error) for ending, error in broken]
            key = mix(self.seed, self.numbers[section.name], self.numbers[corpus.name], epoch, index)
            opened.append(_Opened(corpus, index, raw, key, failed))
            held += sum(map(len, raw.values()))
            if held > HELD:
                results += self._arrange(section, opened, step, lost)
                opened, held = [], 0
        return results + self._arrange(section, opened, step, lost)

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
        for one, own in zip(opened, members, strict=True):
            if self.journal and own:
                self.journal.note(one.corpus, one.index)
            generator.seed(mix(one.key, number_of))
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


class Ruler:
    """How many tokens the items of a corpus have, at most, told from the index."""

    MOST = 20_000  # items that a mean is taken of
    SAMPLE = 2_000  # items that are read, for a kind whose tokenizer cannot tell from the index

    def __init__(self, corpus: Corpus, parts: list[str], tokenizers: dict):
        self.corpus, self.tokenizers = corpus, {kind: tokenizers[kind] for kind in parts}
        self._rates: dict[str, tuple[float, float]] = {}

    def mean(self, items) -> float:
        """The mean over the items (an even sample of them where they are many)."""
        chosen = _evenly(items, self.MOST)
        return float(np.mean([self.of(item) for item in chosen]))

    def of(self, item: int) -> float:
        """The tokens of one item."""
        total, members = 0.0, self.corpus.measures(item)
        for kind, tokenizer in self.tokenizers.items():
            own = [members[e] for e in tokenizer.module.extensions if e in members]
            if not own:
                continue
            if hasattr(tokenizer.module, "count"):
                length, a, b = (np.array([value]) for value in own[0])
                total += float(tokenizer.module.count(tokenizer.settings, length, a, b)[0])
            else:
                rate, most = self._rate(kind)
                total += min(most, rate * sum(length for length, _, _ in own))
        return max(total, 1.0)

    def _rate(self, kind: str) -> tuple[float, float]:
        """Tokens a byte, and the most that any item has, from an even sample of the corpus."""
        if kind not in self._rates:
            tokenizer, tokens, lengths = self.tokenizers[kind], [], []
            for item in _evenly(range(len(self.corpus)), self.SAMPLE):
                raw = self.corpus.raw(item, tokenizer.module.extensions)
                try:
                    views = tokenizer.module.read(tokenizer.settings, raw, random.Random(item)) if raw else []
                except Lost:
                    continue
                if views:
                    tokens.append(len(views[0]))
                    lengths.append(sum(map(len, raw.values())))
            most = max(tokens, default=1)
            below = [(t, n) for t, n in zip(tokens, lengths, strict=True) if t < most]
            below = below or [(most, min(lengths, default=1))]
            self._rates[kind] = (sum(t for t, _ in below) / max(sum(n for _, n in below), 1), float(most))
        return self._rates[kind]


def _evenly(items, most: int) -> list[int]:
    """At most `most` of the items, evenly spaced."""
    if len(items) <= most:
        return [int(item) for item in items]
    return [int(items[place * len(items) // most]) for place in range(most)]


def ledger_row(corpus: Corpus, index: int, part: str, error: Lost, step: int | None) -> dict:
    return {
        "source": corpus.name,
        "shard": corpus.shard(index),
        "key": corpus.key(index),
        "part": part,
        "reason": error.reason,
        "detail": error.detail,
        "step": step,
    }


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


class Bad:
    """Counts how much of each source is bad, and says when it is too much.

    Fewer than `LEAST` bad items say little. Until the whole source has been seen, what counts is the lower end of an
    interval around the share (Wilson 1927, four standard errors).
    """

    LEAST = 5

    def __init__(self, limit: float, corpora: dict[str, Corpus], lost: list[dict]):
        self.limit, self.corpora = limit, corpora
        self.items: dict[str, set] = {name: set() for name in corpora}
        self.add([row for row in lost if row["step"]])

    def add(self, lost: list[dict]) -> None:
        for row in lost:
            self.items[row["source"]].add((row["shard"], row["key"]))

    def line(self, drawn: dict[str, int]) -> str:
        """What a run that must end says; empty where it may go on. drawn: items read so far, by source."""
        for name, corpus in self.corpora.items():
            refused = sum(one.head["refused_count"] for one in corpus.indexes)
            seen = min(len(corpus), drawn.get(name, 0))
            bad = len(self.items[name])
            for count, of, what in ((refused, len(corpus) + refused, "parts refused"), (bad, seen, "items bad")):
                if (
                    count >= self.LEAST
                    and count > self.limit * of
                    and (of >= len(corpus) or _lower(count, of) > self.limit)
                ):
                    return (
                        f"source {name}: {count} of {of} {what}, more than max_bad={self.limit} allows: mend the "
                        "source, or raise max_bad."
                    )
        return ""


def _lower(count: int, of: int, z: float = 4.0) -> float:
    """The lower end of the interval around count / of."""
    share = count / of
    middle = share + z * z / (2 * of)
    return (middle - z * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5) / (1 + z * z / of)


class Journal:
    """Which items are being read right now, so that a decoder that ends the program can be told by its item.

    A file with a slot for each reader, mapped into memory; writing to it outlives the process. `faulthandler` says
    beside it whether the program was ended by a fault of its own or by somebody else.
    """

    SLOT = 1024

    def __init__(self, file: Path, readers: int):
        self.file, self.trace, self.rows = file, file.with_suffix(".fault"), file.parent / "crashes.jsonl"
        self.times: collections.Counter[str] = collections.Counter()
        self.told: list[str] = []  # lines for a person
        if self.rows.exists():
            self.times.update(row["item"] for row in map(json.loads, self.rows.read_text().splitlines()))
        if self.trace.exists() and self.trace.stat().st_size:
            self.blame(self._slots())
            self.told.append(f"the run before was ended by a fault while it read: {self.named(self._slots())}")
        size = self.SLOT * max(readers, 1)
        self.file.write_bytes(bytes(size))
        self._opened = open(self.file, "r+b")
        self._map = mmap.mmap(self._opened.fileno(), size)
        self._local = threading.local()
        self._next = itertools.count()
        self._readers = max(readers, 1)

    def watch(self) -> None:
        """Have faults of this process written down."""
        import faulthandler

        self._trace = open(self.trace, "w")
        faulthandler.enable(self._trace)

    def close(self) -> None:
        import faulthandler

        if faulthandler.is_enabled() and hasattr(self, "_trace"):
            faulthandler.disable()
            self._trace.close()
        self._map.close()
        self._opened.close()
        for file in (self.file, self.trace):
            file.unlink(missing_ok=True)

    def _place(self) -> int:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            return info.id * self.SLOT
        if not hasattr(self._local, "slot"):
            self._local.slot = next(self._next) % self._readers
        return self._local.slot * self.SLOT

    def note(self, corpus: Corpus, index: int) -> None:
        """This thread, or worker process, begins to read an item."""
        text = _item(corpus, index).encode()
        place = self._place()
        self._map[place : place + len(text) + 1] = text + b"\0"

    def clear(self) -> None:
        self._map[self._place()] = 0

    def _slots(self, which: int | None = None) -> list[str]:
        data = self.file.read_bytes() if self.file.exists() else b""
        texts = [
            data[i : i + self.SLOT].split(b"\0", 1)[0].decode(errors="replace") for i in range(0, len(data), self.SLOT)
        ]
        return [text for i, text in enumerate(texts) if text and which in (None, i)]

    @staticmethod
    def named(items: list[str]) -> str:
        return ", ".join(item.replace("\t", " ") for item in items) or "no item that could be told"

    def blame(self, items: list[str]) -> None:
        """Write down that the program ended while these were read."""
        with open(self.rows, "a") as file:
            for item in items:
                self.times[item] += 1
                file.write(json.dumps({"item": item, "times": self.times[item]}) + "\n")

    def blame_worker(self, worker: int) -> list[str]:
        items = self._slots(worker)
        self.blame(items)
        return items

    def blocks(self, corpus: Corpus, index: int) -> bool:
        """Whether reading the item ended the program twice."""
        return bool(self.times) and self.times[_item(corpus, index)] >= 2


def _item(corpus: Corpus, index: int) -> str:
    """The item's full name, or of a very long one the end, which tells it from others best."""
    name = f"{corpus.name}\t{corpus.shard(index)}\t{corpus.key(index)}"
    return name.encode()[1 - Journal.SLOT :].decode(errors="ignore")


RESTARTS = 3  # how often workers that die at one step are started again


@dataclass
class Loader:
    """Steps from `start` to `stop`, read ahead by threads or by worker processes; the order is the same."""

    steps: Steps
    start: int
    stop: int
    workers: int = 1
    how: str = "threads"
    _near: object = field(default=None, repr=False)

    def __iter__(self):
        if not self.workers:
            for step in range(self.start, self.stop):
                yield self.steps[step]
        elif self.how == "threads":
            yield from self._by_threads()
        else:
            yield from self._by_processes()

    def close(self) -> None:
        if isinstance(self._near, concurrent.futures.Executor):
            self._near.shutdown(wait=True, cancel_futures=True)
        elif self._near is not None:
            self._near._shutdown_workers()  # they ignore signals, so that nobody else can end them
        self._near = None

    def _by_threads(self):
        self._near = pool = concurrent.futures.ThreadPoolExecutor(self.workers, "mmfm-read", _modest_thread)
        ahead = collections.deque()
        todo = iter(range(self.start, self.stop))
        try:
            for step in itertools.islice(todo, 2 * self.workers):
                ahead.append(pool.submit(self.steps.__getitem__, step))
            while ahead:
                ready = ahead.popleft().result()
                for step in itertools.islice(todo, 1):
                    ahead.append(pool.submit(self.steps.__getitem__, step))
                yield ready
        finally:
            self.close()

    def _by_processes(self):
        step, deaths = self.start, 0
        while step < self.stop:
            self._near = workers = iter(self._data_loader(step))
            _Deaths.hold_back()
            try:
                while step < self.stop:
                    ready = _Deaths.told(workers)
                    step, deaths = step + 1, 0
                    yield ready
            except (RuntimeError, OSError, EOFError) as error:  # OSError: what it had made was not fetched yet
                dead = _Deaths.among(workers)
                if not dead:
                    raise
                deaths += 1
                self._blame(workers, dead, deaths, step, error)
            finally:
                self.close()

    def _blame(self, workers, dead: list[int], deaths: int, step: int, error: Exception) -> None:
        codes = [workers._workers[i].exitcode for i in dead]
        reading = []
        for worker, code in zip(dead, codes, strict=True):
            if self.steps.journal and code not in (-signal.SIGKILL, -signal.SIGTERM):
                reading += self.steps.journal.blame_worker(worker)
        names = Journal.named(reading)
        if deaths > RESTARTS:
            raise BadInput(f"step {step + 1}: its reader ended {deaths} times (exit {codes[0]}) at {names}") from error
        print(f"step {step + 1}: a reader ended (exit {codes[0]}) at {names}; started again", flush=True)

    def _data_loader(self, start: int):
        return torch.utils.data.DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(start, self.stop),
            num_workers=self.workers,
            prefetch_factor=2,
            collate_fn=_as_it_is,
            worker_init_fn=_modest_process,
            generator=torch.Generator(),  # a private one: the loader must not draw from the run's
            multiprocessing_context="fork",
        )


class _Deaths:
    """PyTorch raises from a signal handler when a worker has died, in whatever the program is at: a step, a save.

    With this it raises where a step is waited for, and nowhere else.
    """

    waiting = False

    @classmethod
    def hold_back(cls) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not hasattr(handler, "held_back"):

            def only_while_waiting(*what):
                if cls.waiting:
                    handler(*what)

            only_while_waiting.held_back = True
            with contextlib.suppress(ValueError):  # not in the main thread: PyTorch has set none there
                signal.signal(signal.SIGCHLD, only_while_waiting)

    @staticmethod
    def among(workers, patience: float = 0.5) -> list[int]:
        """Which of the workers have died, by number; the system may need a moment to say so."""
        until = time.monotonic() + patience
        while not (dead := [i for i, worker in enumerate(workers._workers) if worker.exitcode]):
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        return dead

    @classmethod
    def told(cls, workers) -> Step:
        """The next step of the workers. Raises RuntimeError where one has died."""
        cls.waiting = True
        try:
            if cls.among(workers, 0):
                raise RuntimeError("a worker died")
            return next(workers)
        finally:
            cls.waiting = False


def _as_it_is(step: Step) -> Step:
    return step


def _modest_thread() -> None:
    """Readers leave the processor to the training, where it is short."""
    torch.set_num_threads(1)  # of this thread alone
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)


def _modest_process(_: int) -> None:
    """Workers leave interrupts to the main process, which saves first, and the processor too, where it is short."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
