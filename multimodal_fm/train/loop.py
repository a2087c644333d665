"""The loop. Pretraining and tuning are the same loop with other objectives."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from ..batch import Batch, with_counts
from ..config import Config
from ..corpus.shards import Corpus, find
from ..errors import UserError
from ..model import pick_device
from ..run_dir import checkpoint
from ..stream.crash_log import Journal
from ..stream.dataset import Step, Steps
from ..stream.quarantine import Bad, refused_row, strict_line
from ..stream.tasks import Origin, fit, steps_of
from ..stream.workers import Loader
from ..tokens import FILLER
from . import parallel
from . import resume as resuming
from .monitor import Monitor, Silent
from .parallel import Ranks
from .train_step import Learner

PATIENCE = 10  # steps in a row without a finite gradient, after which a run gives up


def pretrain(config: Config, resume: bool = False, allow_data_change: bool = False) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    Same config, data, machine and number of threads: the same losses, bit for bit, interrupted or not. The first
    SIGINT, SIGTERM or SIGHUP saves and raises SystemExit(130, 143 or 129), a second leaves at once. Under `torchrun`
    each process takes some of every step's microbatches; the samples and their order stay the same. Raises UserError.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    ranks = parallel.join(device)
    try:
        folder = ranks.broadcast(lambda: resuming.start(Path(config.run), resume))
        corpora = ranks.first_rank_first(lambda: _corpora(config))
        steps_of(config, corpora, tokenizers=False)  # before anything is written: a source may offer a task nothing
        with contextlib.ExitStack() as stack:
            ranks.broadcast(lambda: stack.enter_context(resuming.alone(Path(config.run))))
            config, origin = _settled(config, corpora, ranks, folder, allow_data_change)
            learner = Learner(config, device, ranks, folder)
            return _Run(config, corpora, origin, learner, ranks, folder).to_its_end()
    finally:
        parallel.leave()


def _corpora(config: Config) -> dict[str, Corpus]:
    """The sources, opened. Raises UserError where shards of them, or of the evaluations, are missing."""
    corpora = {name: Corpus(source, name) for name, source in config.sources.items()}
    for name, evaluation in config.evaluate.items():
        find(evaluation.on, f"evaluate.{name}")
    for name, corpus in corpora.items():
        if config.strict and corpus.refused:
            raise UserError(strict_line(refused_row(name, corpus.refused[0])))
    return corpora


def _settled(config: Config, corpora, ranks: Ranks, folder: Path | None, allow: bool) -> tuple[Config, Origin]:
    """The config with tokenizers that have learned, and since when its mixture holds. Raises UserError."""
    if folder:
        config, origin = resuming.resumed(config, folder, corpora, allow)
    else:
        run = Path(config.run)
        run.mkdir(parents=True, exist_ok=True)
        fitted = ranks.first_rank_first(lambda: fit(config, corpora, run))
        config, origin = dataclasses.replace(config, tokenizers=fitted), Origin()
    for tokenizer in config.tokenizers.values():
        tokenizer.check()
    return config, origin


@dataclass(frozen=True)
class _Read:
    """One step's microbatches of this rank, and what all ranks met on the way to theirs."""

    batches: list[Batch]
    lost: list[dict]
    keys: list[tuple[str, int, str]]
    tokens: int
    filler: int


class _Run:
    """From the first step, or the one after a checkpoint's, to the last."""

    def __init__(
        self,
        config: Config,
        corpora: dict[str, Corpus],
        origin: Origin,
        learner: Learner,
        ranks: Ranks,
        folder: Path | None,
    ):
        self.config, self.corpora, self.origin = config, corpora, origin
        self.learner, self.ranks, self.folder = learner, ranks, Path(config.run)
        self.start = self.done = checkpoint.read_data(folder, "state")["step"] if folder else 0
        self.saved, self.failed = folder, 0
        self.leaving = _Leaving()
        self.journal = Journal(self.folder / f"reading-{ranks.rank}", config.workers)
        if config.readers == "threads":
            self.journal.watch()
        self.steps = steps_of(config, corpora, ranks.rank, ranks.size, origin, self.journal)
        self.loader = Loader(self.steps, self.start, config.steps, config.workers, config.readers)
        self.monitor = Monitor(self.folder, self.start, config.steps) if ranks.first else Silent()
        if not folder and not self.monitor.skipped:  # else a start that never reached a checkpoint has said it
            self.monitor.quarantine([refused_row(c.name, r) for c in corpora.values() for r in c.refused])
        self.bad = Bad(config.max_bad, corpora, self.monitor.before())
        for line in (*_headline(config, learner, corpora, self.start), *self.journal.told):
            self.monitor.say(line)

    def to_its_end(self) -> Path:
        """All steps that are left, or those until a signal comes; the last checkpoint's folder."""
        try:
            self._stop_if_bad()
            stream = iter(self.loader)
            while self.done < self.config.steps and self._step(stream):
                if self.done % self.config.save_every == 0:
                    self._save()
            if self.saved != checkpoint.folder_of(self.folder, self.done):
                self._save()
        finally:
            self.loader.close()
            self.journal.close()
            self.monitor.close()
            self.leaving.restore()
        for line in (*self.monitor.skipped.lines(), f"checkpoint: {self.saved}"):
            self.monitor.say(line)
        if self.leaving.signal:
            self.monitor.say("interrupted: the same command with --resume goes on from there")
            raise SystemExit(128 + self.leaving.signal)
        return self.saved

    def _step(self, stream) -> bool:
        """One step, unless a signal has come to any rank; whether it was done."""
        began = time.monotonic()
        read = self._next(stream)
        if read is None:
            return False
        report = self.learner.learn(self.done, read.batches)
        self.done += 1
        seconds = time.monotonic() - began
        counts = {"tokens": read.tokens, "filler": read.filler}
        pace = {"seconds": seconds, "tokens_per_second": read.tokens / seconds}
        self.monitor.log({"step": self.done, **report, **counts, **pace})
        if self.config.trace:
            self.monitor.trace({"step": self.done, "samples": _samples(self.steps, read.keys)})
        self.failed = self.failed + 1 if report["skipped"] else 0
        if self.failed >= PATIENCE:
            raise UserError(
                f"{self.folder}: {PATIENCE} steps in a row without a finite gradient (the last is {self.done}); "
                "lower optim.lr, or look into the data"
            )
        if read.lost:
            self.bad.add(read.lost)
            self._stop_if_bad()
        return True

    def _next(self, stream) -> _Read | None:
        """What the next step reads; None where a signal has come to any rank. Raises UserError."""
        data: Step | None = None if self.leaving.signal else next(stream)
        told = self.ranks.all_gather_objects(
            (self.leaving.signal, data and (data.lost, data.counts, data.keys, _tokens(data)))
        )
        self.leaving.signal = max(signal for signal, _ in told)
        if self.leaving.signal:
            return None
        lost, counts, keys, tokens = (list(column) for column in zip(*(own for _, own in told), strict=True))
        lost, keys, tokens = ([row for own in column for row in own] for column in (lost, keys, tokens))
        self.monitor.quarantine(lost)
        if lost and self.config.strict:
            self._end(f"{strict_line(lost[0])}.")
        if not keys:
            self._end(f"{self.folder}: not one sample of step {self.done + 1} could be read.")
        batches = [with_counts(batch, _sum_counts(counts)) for batch in data.batches]
        return _Read(batches, lost, keys, sum(n for n, _ in tokens), sum(filler for _, filler in tokens))

    def _stop_if_bad(self) -> None:
        line = self.ranks.broadcast(
            lambda: self.bad.line(self.steps.drawn(self.done))
        )  # the first alone read the ledger
        if line:
            self._end(line)

    def _end(self, line: str) -> NoReturn:
        """Saves what was done, and raises UserError."""
        if self.done != self.start and self.saved != checkpoint.folder_of(self.folder, self.done):
            self._save()
        saved = f"; checkpoint: {self.saved}" if self.saved else ""
        raise UserError(f"{line} See {self.folder}/quarantine.jsonl{saved}")

    def _save(self) -> None:
        self.saved = checkpoint.folder_of(self.folder, self.done)
        if self.ranks.first:
            drawn = self.steps.drawn_by_task(self.done)
            state = resuming.state_of(self.config, self.done, self.corpora, self.origin, drawn)
            held = {modality: t.file for modality, t in self.config.tokenizers.items()}
            files = {modality: file for modality, file in held.items() if file}
            checkpoint.save(self.saved, self.learner.tensors(), state, files)
            checkpoint.retain(self.folder, self.config.keep)
        self.ranks.barrier()


class _Leaving:
    """Remembers the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once."""

    def __init__(self):
        self.signal = 0
        known = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup: a terminal that closes is no matter
            known.append(signal.SIGHUP)
        try:
            self.before = {s: signal.signal(s, self._note) for s in known}
        except ValueError:  # not in the main thread: nobody sends it signals
            self.before = {}

    def _note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _tokens(data: Step) -> list[tuple[int, int]]:
    """Tokens and filler of each microbatch."""
    fillers = [int((batch.tokens.sequence == FILLER).sum()) for batch in data.batches]
    return [(len(batch.tokens) - filler, filler) for batch, filler in zip(data.batches, fillers, strict=True)]


def _samples(steps: Steps, keys: list[tuple[str, int, str]]) -> list[str]:
    """The step's samples in the stream's order, whoever read them."""
    order = {task.name: number for number, task in enumerate(steps.tasks)}
    rows = sorted((order[task], place, name) for task, place, name in keys)
    return [name for _, _, name in rows]


def _sum_counts(told) -> dict[str, dict[str, int]]:
    """Targets tokens by task and modality, over all ranks."""
    total: dict[str, dict[str, int]] = {}
    for counts in told:
        for name, own in counts.items():
            modalities = total.setdefault(name, {})
            for modality, count in own.items():
                modalities[modality] = modalities.get(modality, 0) + count
    return total


def _headline(config: Config, learner: Learner, corpora: dict[str, Corpus], start: int) -> list[str]:
    millions = sum(p.numel() for p in learner.model.parameters()) / 1e6
    samples = ", ".join(f"{name} {len(corpus):,}" for name, corpus in corpora.items())
    go_on = f", going on from step {start}" if start else ""
    return [
        f"{config.run}: {millions:.1f} M parameters on {learner.device}, {config.steps} steps{go_on}",
        f"samples: {samples}",
    ]
