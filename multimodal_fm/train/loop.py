"""The loop. Pretraining and tuning are the same loop with other objectives."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..batch import Batch, with_counts
from ..corpus.shards import Corpus
from ..errors import UserError
from ..model import pick_device
from ..run_dir import checkpoint
from ..run_dir.records import Skipped
from ..stream.crash_log import CrashLog
from ..stream.dataset import Step
from ..stream.loader import Loader
from ..stream.prefetch import Prefetcher
from ..stream.quarantine import BadFraction, refused_row, strict_message
from ..stream.tasks import Origin, build_stream, loss_weights
from ..transfer import read_later
from . import optim, parallel
from .compute import Compute
from .config import TrainConfig
from .cpu import without_subnormals
from .guards import Guards, describe
from .machine import deterministic, headline, memory_gb
from .monitor import Monitor, Silent
from .parallel import Ranks
from .profile import Profile
from .resume import checkpoint_data, discard_damaged, find_start, locked
from .saver import Saver
from .setup import open_sources, prepare_tokenizers, record_base
from .signals import StopSignal
from .train_step import TrainStep
from .validate import Validation, run_evaluations
from .watch import Watchdog, leave_with_launcher

MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run gives up


def pretrain(
    config: TrainConfig, resume: bool | str = False, allow_data_change: bool = False, profile: bool = False
) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    Same config, data, machine and number of threads: the same losses, bit for bit, interrupted or not. The first
    SIGINT, SIGTERM or SIGHUP saves and raises SystemExit(130, 143 or 129), a second leaves at once. Under `torchrun`
    each process takes some of every step's microbatches; the samples and their order stay the same. Raises UserError.
    """
    with start(config, resume, allow_data_change, profile) as run:
        while run.goes_on():
            batch = run.next_batch()
            if batch is None:  # a signal has come
                break
            report = run.update(batch.microbatches)  # forward, backward and update
            run.finish_step(batch, report)  # counts it, and writes down the one before
            if run.obey_monitors():  # back at an earlier step
                continue
            if run.is_due(run.config.validate_every) or run.is_due(run.config.evaluate_every):
                run.validate()
            if run.is_due(run.config.save_every):
                run.save()
        return run.finish()


@contextlib.contextmanager
def start(config: TrainConfig, resume: bool | str, allow_data_change: bool, profile: bool) -> Iterator[Run]:
    """Everything that is open while a run goes on: its folder's lock, sources, readers, records."""
    leave_with_launcher()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    ranks = parallel.init(device)
    run_dir, stop_signal = Path(config.run_dir), StopSignal()
    try:
        config.parallel.check(ranks.size)
        corpora = ranks.first_then_others(lambda: open_sources(config))
        with contextlib.ExitStack() as stack:
            stack.enter_context(deterministic(config.deterministic))
            if device.type == "cpu":
                stack.enter_context(without_subnormals())
            ranks.on_first(lambda: stack.enter_context(locked(run_dir)))
            checkpoint_dir = ranks.on_first(lambda: find_start(run_dir, resume))
            config, origin = prepare_tokenizers(config, corpora, ranks, checkpoint_dir, allow_data_change)
            train_step = TrainStep(config, device, ranks, checkpoint_dir)
            if checkpoint_dir:
                ranks.on_first(lambda: discard_damaged(run_dir, checkpoint_dir))
            run = Run(config, corpora, origin, train_step, ranks, stop_signal, checkpoint_dir, profile)
            try:
                run.stop_if_bad()
                yield run
            finally:
                run.close()
    finally:
        stop_signal.restore()
        parallel.shutdown()


@dataclass
class StepBatch:
    """One step's microbatches of this rank, and what all ranks met while they read theirs."""

    microbatches: list[Batch]
    errors: list[dict]  # rows of quarantine.jsonl
    samples: list[tuple[str, int, str]]  # (task, position, source/key)
    num_tokens: int
    num_filler: int


class Run:
    """A run between its first step, or the one after a checkpoint's, and its last. `step` counts the steps done."""

    def __init__(
        self,
        config: TrainConfig,
        corpora: dict[str, Corpus],
        origin: Origin,
        train_step: TrainStep,
        ranks: Ranks,
        stop_signal: StopSignal,
        checkpoint_dir: Path | None,
        profile: bool = False,
    ):
        self.config, self.corpora, self.origin = config, corpora, origin
        self.train_step, self.ranks, self.run_dir = train_step, ranks, Path(config.run_dir)
        state: dict[str, Any] = checkpoint.read_data(checkpoint_dir, "state") if checkpoint_dir else {"step": 0}
        self.step = self.first_step = state["step"]
        self.best: dict | None = checkpoint.read_best(self.run_dir) if checkpoint_dir else None
        if self.best and self.best["step"] > self.step:  # its checkpoint was damaged: it will be made again
            self.best = None
        self.saved, self.skipped_in_a_row, self.pending = checkpoint_dir, 0, None
        self.saver, self.watchdog = Saver(ranks), Watchdog(0)
        modalities = {name: task.modalities for name, task in config.tasks.items()}
        self.guards = Guards(config.monitors, loss_weights(config.tasks), modalities, state.get("monitors"))
        train_step.weights = self.guards.weigh()
        self.validation_errors_said = False
        self.crash_log = CrashLog(self.run_dir / f"crash-log-{ranks.rank}", config.num_workers)
        self.dataset = build_stream(
            config.tasks, corpora, config.model.tokenizers, config.seed, config.microbatches, config.round_to,
            ranks.rank, ranks.size, origin, self.crash_log, heads=config.model.heads,
        )  # fmt: skip
        self._open_stream()
        self.monitor = Monitor(self.run_dir, self.step, config.steps, config.track) if ranks.is_first else Silent()
        self.validation = Validation(config, train_step) if config.validate_every and ranks.is_first else None
        self.profile = Profile(self.run_dir) if profile and ranks.is_first else None
        self.compute = Compute(self.run_dir, self.step, config.country, train_step.device, ranks)
        if not checkpoint_dir:
            self.monitor.quarantine([refused_row(c.name, r) for c in corpora.values() for r in c.rejections])
            if config.init:
                for line in train_step.said:
                    self.monitor.say(line)
                if ranks.is_first:
                    record_base(self.run_dir, config.init)
        self.bad_fraction = BadFraction(config.max_bad_fraction, corpora, self.monitor.quarantined())
        for line in (*headline(config, train_step, corpora, self.step), *self.crash_log.messages):
            self.monitor.say(line)
        ranks.on_first(lambda: self.guards.write(self.run_dir))
        if any(monitor.action == "roll_back" for monitor in config.monitors.values()) and not checkpoint_dir:
            self.save()  # there is something to go back to from the first step on
        self.stop_signal = stop_signal
        stop_signal.catch_interrupts()  # until here Ctrl-C ends what has not begun
        self.watchdog = Watchdog(config.hang_timeout)
        self.last_time = time.monotonic()

    def _open_stream(self) -> None:
        config = self.config
        self.loader = Loader(self.dataset, self.step, config.steps, config.num_workers, self.guards.data_step)
        self.stream = iter(Prefetcher(self.loader, self.train_step.device))

    def goes_on(self) -> bool:
        """Whether there is another step to be done."""
        if self.step >= self.config.steps:
            self._log_pending()
            if not self.obey_monitors():
                return False
        return not self.is_out_of_patience()

    def is_due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def is_out_of_patience(self) -> bool:
        """Whether `patience` measurements in a row have brought no new best one."""
        every = self.config.evaluate_every if self.config.best.startswith("evaluate/") else self.config.validate_every
        if not self.config.patience or not self.best or not every:
            return False
        if (self.step // every) - (self.best["since"] // every) < self.config.patience:
            return False
        self.monitor.say(f"no better {self.config.best} since step {self.best['since']}: the run ends here")
        return True

    def next_batch(self) -> StepBatch | None:
        """What the next step reads; None where a signal has come to any rank. Raises UserError."""
        began = time.monotonic()
        data: Step | None = None if self.stop_signal.number else next(self.stream)
        self.data_wait = time.monotonic() - began
        own = data and (data.errors, data.counts, data.samples, _count_tokens(data))
        told = self.ranks.all_gather_objects((self.stop_signal.number, self.saver.failed(), own))
        stop = max(number for number, *_ in told)
        if stop:  # one that comes meanwhile is for the next step, and must not be forgotten
            self.stop_signal.number = stop
        if any(failed for _, failed, _ in told):
            self.saver.wait()  # raises what went wrong
        if stop or data is None:
            return None
        errors, counts, samples, tokens = (list(column) for column in zip(*(own for *_, own in told), strict=True))
        errors, samples, tokens = ([row for own in column for row in own] for column in (errors, samples, tokens))
        errors = [row | {"step": self.step + 1} for row in errors]  # where steps of the stream are left out, not theirs
        self.monitor.quarantine(errors)
        if errors and self.config.strict:
            self._abort(f"{strict_message(errors[0])}.")
        if not samples:
            self._abort(f"{self.run_dir}: not one sample of step {self.step + 1} could be read.")
        microbatches = [with_counts(batch, _sum_counts(counts)) for batch in data.batches]
        return StepBatch(microbatches, errors, samples, sum(n for n, _ in tokens), sum(filler for _, filler in tokens))

    def update(self, microbatches: list[Batch]) -> dict[str, torch.Tensor]:
        return self.train_step(self.step, microbatches, self.guards.wants_shares(self.step + 1))

    def finish_step(self, batch: StepBatch, report: dict[str, torch.Tensor]) -> None:
        """Counts a step. Its figures are read one step later, when the device has them, so that nothing waits."""
        self._log_pending()
        self.watchdog.feed()
        self.step += 1
        self.compute.add(batch.num_tokens)
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        counts = {"tokens": batch.num_tokens, "filler": batch.num_filler}
        pace = {
            "seconds": seconds,
            "data_wait": self.data_wait,
            "tokens_per_second": batch.num_tokens / seconds,
            "memory_gb": memory_gb(self.train_step.device),
        }
        if self.config.compile:
            pace["compile_seconds"] = self.train_step.compiled.seconds
        factor = optim.lr_factor(self.config.optim, self.step - 1, self.config.steps)
        weights = {f"weight/{name}": self.train_step.weights[name] for name in self.guards.factors}
        self.pending = {"step": self.step, "lr": self.config.optim.lr * factor, **weights, **counts, **pace}
        self.pending_report = read_later(report)
        self.pending_times = self.train_step.optimizer_times
        if self.config.log_samples:
            self.monitor.log_samples({"step": self.step, "samples": _in_stream_order(self.config, batch.samples)})
        if self.profile:
            self.profile.step()
        if batch.errors:
            self.bad_fraction.add(batch.errors)
            self.stop_if_bad()

    def _log_pending(self) -> None:
        row, self.pending = self.pending, None
        if row is None:
            return
        row = {"step": row.pop("step"), **self.pending_report(), **row}
        row["skipped"] = int(row["skipped"])
        row["optimizer_share"] = self.train_step.seconds_between(*self.pending_times) / row["seconds"]
        if self.config.monitors:
            row |= self._ask_monitors(row)
        self.monitor.log_step(row)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{self.run_dir}: {MAX_SKIPPED} steps in a row without a finite gradient (the last is {row['step']}); "
                "lower optim.lr, or look into the data"
            )

    def _ask_monitors(self, row: dict[str, Any]) -> dict[str, float]:
        """Queue what the monitors ask for at a step's figures; returns what the row says of it."""
        acts = self.ranks.on_first(lambda: self.guards.look(row, self.monitor.say))
        self.guards.queue += acts
        said = {f"monitor/{act['monitor']}": row[act["figure"]] for act in acts} | self.guards.carried
        self.guards.carried = {}
        for act in acts:
            self.monitor.say(describe(act))
        if acts:
            self.ranks.on_first(lambda: self.guards.write(self.run_dir))
        return said

    def obey_monitors(self) -> bool:
        """Do what the monitors have asked for; whether the run went back to an earlier step. Raises UserError."""
        acts, self.guards.queue = self.guards.queue, []
        if stops := [act for act in acts if act["action"] == "stop"]:
            self._stop(stops[0])
        if bad := [act for act in acts if act["action"] == "roll_back"]:
            self._roll_back(min(bad, key=lambda act: act["first"]))
            return True
        for act in acts:
            self.guards.factors = act.get("factors", self.guards.factors)
        self.train_step.weights = self.guards.weigh()
        return False

    def _roll_back(self, act: dict) -> None:
        """Go on from the last checkpoint before what a monitor has seen, without the data of the bad steps."""
        self.saver.wait()
        rule, done = self.config.monitors[act["monitor"]], self.guards.roll_backs.get(act["monitor"], 0)
        if done >= rule.max_roll_backs:
            self._stop(act, f"after {done} roll backs")
        folder = self.ranks.on_first(lambda: checkpoint.newest_before(self.run_dir, act["first"] - rule.margin))
        if folder is None:
            self._stop(act, "with no checkpoint from before")
        state = checkpoint.read_data(folder, "state")
        if state.get("stream_step", state["step"]) < self.origin.step:
            self._stop(act, "with no checkpoint since the mixture changed")
        self.loader.close()
        self.guards.roll_back(act, state["step"], state.get("monitors", {}))
        self.train_step.load(folder)
        self.train_step.weights = self.guards.weigh()
        self.step, self.saved, self.skipped_in_a_row, self.pending = state["step"], folder, 0, None
        if self.best and self.best["step"] > self.step:
            self.best = None
        self.monitor.rewind(self.step)
        self.bad_fraction = BadFraction(self.config.max_bad_fraction, self.corpora, self.monitor.quarantined())
        self.ranks.on_first(lambda: (discard_damaged(self.run_dir, folder), self.guards.write(self.run_dir)))
        self._open_stream()
        self.monitor.say(
            f"monitor {act['monitor']}: rolled back to step {self.step}, and the data left out that made it"
        )
        self.last_time = time.monotonic()

    def _stop(self, act: dict, why: str = "") -> NoReturn:
        """Saves what was done, beside the checkpoints before it, and raises UserError."""
        folder = self.save()
        self.saver.wait()
        raise UserError(f"{self.run_dir}: {' '.join(filter(None, (describe(act), why)))}; checkpoint: {folder}")

    def validate(self) -> None:
        """The figures that are due at this step; a new best one keeps a checkpoint of it."""
        self._log_pending()
        averaged = self.train_step.averaged()
        with self.watchdog.paused():
            figure = self.ranks.on_first(lambda: self._measure(averaged)).get(self.config.best)
        sign = 1 if self.config.best_mode == "min" else -1
        if (
            figure is not None
            and math.isfinite(figure)
            and (self.best is None or sign * figure <= sign * self.best["value"])
        ):
            # of equal ones the later, which has learned more: on few samples a score is soon at its highest
            since = self.best["since"] if self.best and figure == self.best["value"] else self.step
            self.best = {"figure": self.config.best, "value": figure, "step": self.step, "since": since}
            self.save()
        self.last_time = time.monotonic()

    def _measure(self, averaged: torch.nn.ModuleDict) -> dict[str, float]:
        """The figures that are due, written down; on the first rank alone. Raises UserError where `best` is none."""
        figures: dict[str, float] = {}
        if self.validation and self.is_due(self.config.validate_every):
            figures |= self.validation(averaged)
            if self.validation.errors and not self.validation_errors_said:
                self.validation_errors_said = True  # they are the same each time
                for line in Skipped(self.validation.errors).lines():
                    self.monitor.say(f"validation: {line.strip()}")
        if self.is_due(self.config.evaluate_every):
            figures |= run_evaluations(self.config, averaged)
        self.monitor.log({"step": self.step, **figures})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if k in ("validation/loss", self.config.best))
        self.monitor.say(f"step {self.step:>5}  {shown}")
        everything = all(map(self.is_due, filter(None, (self.config.validate_every, self.config.evaluate_every))))
        if everything and self.config.best and self.config.best not in figures:
            close = ", ".join(sorted(figures)[:8])
            raise UserError(f"best: no figure is called {self.config.best!r} (there are: {close}, ...)")
        return figures

    def save(self) -> Path:
        """Begins to write a checkpoint of this step, unless there is one already; returns where it will be."""
        self._log_pending()
        folder = checkpoint.folder_of(self.run_dir, self.step)
        if self.saved == folder:
            return folder
        self.watchdog.feed()
        best = dict(self.best) if self.best else None
        drawn = self.dataset.samples_read_by_task(self.guards.data_step(self.step))
        data = checkpoint_data(self.config, self.step, self.corpora, self.origin, drawn, self.guards, self.ranks.size)
        files = {modality: t.file for modality, t in self.config.model.tokenizers.items() if t.file}

        def after() -> None:
            checkpoint.write_best(self.run_dir, best)
            keep, every = self.config.keep, self.config.keep_every
            checkpoint.retain(self.run_dir, keep, best["step"] if best else None, every)

        self.saver.start(folder, self.train_step.tensors(), copy.deepcopy(data), files, after)
        self.compute.write(self.step)
        self.saved = folder
        self.last_time = time.monotonic()
        return folder

    def finish(self) -> Path:
        """Saves what is not saved yet. Raises SystemExit where a signal ended the run."""
        saved = self.save()
        self.saver.wait()
        for line in (*self.monitor.skipped.lines(), f"checkpoint: {saved}"):
            self.monitor.say(line)
        if self.stop_signal.number:
            self.monitor.say("interrupted: the same command with --resume goes on from there")
            raise SystemExit(128 + self.stop_signal.number)
        return saved

    def stop_if_bad(self) -> None:
        """Raises UserError, after saving, where too many of a source's samples are bad."""
        # the first rank alone has read the quarantine of earlier tries
        message = self.ranks.on_first(lambda: self.bad_fraction.message(self._samples_read()))
        if message:
            self._abort(message)

    def _samples_read(self) -> dict[str, int]:
        return self.dataset.samples_read(self.guards.data_step(self.step))

    def _abort(self, message: str) -> NoReturn:
        """Saves what was done and raises UserError."""
        if self.step != self.first_step:
            self.save()
            self.saver.wait()
        saved = f"; checkpoint: {self.saved}" if self.saved else ""
        raise UserError(f"{message} See {self.run_dir}/quarantine.jsonl{saved}")

    def close(self) -> None:
        for part in (
            self.watchdog,
            self.saver,
            self.loader,
            self.crash_log,
            self.monitor,
            self.compute,
            *([self.profile] if self.profile else []),
        ):
            part.close()


def _count_tokens(data: Step) -> list[tuple[int, int]]:
    """Tokens and filler of each microbatch."""
    return [(len(batch.tokens) - batch.num_filler, batch.num_filler) for batch in data.batches]


def _in_stream_order(config: TrainConfig, samples: list[tuple[str, int, str]]) -> list[str]:
    """The names of a step's samples in the stream's order, whoever read them."""
    tasks = list(config.tasks)
    return [name for _, _, name in sorted((tasks.index(task), position, name) for task, position, name in samples)]


def _sum_counts(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Target tokens by task and modality, over all ranks."""
    total: dict[str, dict[str, int]] = {}
    for own in counts:
        for task, by_modality in own.items():
            for modality, count in by_modality.items():
                total.setdefault(task, {})[modality] = total.get(task, {}).get(modality, 0) + count
            total.setdefault(task, {})
    return total
