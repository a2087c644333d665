"""Monitors that act: rules over the figures of training steps, each with a bound and an action.

A monitor names figures of `metrics.jsonl` (what the objectives report, losses, the gradient's norm, shares of the loss
and of the gradient) and a bound: a value, or a distance from the running median. Out of bounds it warns, ends the run,
rolls it back to the last good checkpoint and leaves out the data of the bad steps (as PaLM's training did by hand,
Chowdhery et al. 2022, section 5.1), or moves the objectives' weights towards equal shares (in the spirit of GradNorm,
Chen et al. 2018, with gradients at the backbone's output, Sener and Koltun 2018).

Figures of step s are read when step s + 1 is on its way, so that nothing waits for the device; what they ask for is
always done after step s + 1, whoever read them and when. All state is in the checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..corpus.storage import write_atomic

SHARES = ("grad_share", "loss_share", "modality_grad_share", "modality_loss_share")
"""Figures that are only computed in the steps at which a monitor looks at one of them; see `TrainStep`."""
FILE = "monitors.jsonl"
LEAST_SHARE = 1e-6  # a smaller one counts as this where weights are moved
LEAST_DEVIATION = 1e-3  # of the median, so that rounding of a constant figure is no deviation


@dataclass
class Config:
    """One monitor: which figures it looks at, when they are out of bounds, and what is done then."""

    figure: str  # of a training step in metrics.jsonl: a name, or a pattern as in loss/*/latent/*_target_std
    above: float | None = None  # a larger value is out of bounds
    below: float | None = None  # a smaller value is out of bounds
    factor: float | None = None  # a value above so many times the running median is out of bounds
    deviations: float | None = None  # and so is one above it by so many standard deviations (1.4826 times the MAD)
    window: int = 32  # values of the running median, which is there after so many
    after: int = 0  # the steps at the beginning of the run that it does not look at
    every: int = 1  # looks at every so-many-th step; shares are only computed then
    patience: int = 1  # looks in a row out of bounds, after which it acts
    action: Literal["warn", "stop", "roll_back", "reweigh"] = "warn"
    """`stop` ends the run, `roll_back` goes back to the last good checkpoint and leaves out the data of the bad steps,
    `reweigh` moves the weights of the objectives towards equal shares."""
    margin: int = 1  # roll_back: steps before the first bad one whose data is left out too
    max_roll_backs: int = 3  # roll_back: how often, after which it stops the run
    rate: float = 0.5  # reweigh: how far at a time, 1 is all the way
    max_factor: float = 10.0  # reweigh: weights stay within this many times, and this part of, the configured ones

    def __post_init__(self):
        if all(bound is None for bound in (self.above, self.below, self.factor, self.deviations)):
            raise ValueError("needs a bound: above, below, factor or deviations")
        if min(self.window, self.every, self.patience) < 1 or min(self.after, self.margin, self.max_roll_backs) < 0:
            raise ValueError("window, every and patience are at least 1; after, margin and max_roll_backs at least 0")
        if not 0 < self.rate <= 1 or not 1 < self.max_factor < math.inf:
            raise ValueError("rate is above 0, at most 1; max_factor is above 1")
        if self.action == "reweigh" and not self.is_of_shares:
            raise ValueError(f"action reweigh needs a figure that is a share: {', '.join(SHARES)}")

    @property
    def is_of_shares(self) -> bool:
        return self.figure.partition("/")[0] in SHARES

    def looks_at(self, step: int) -> bool:
        return step > self.after and step % self.every == 0

    def breach(self, value: float, recent: list[float]) -> str:
        """Which bound a value is beyond, in words; empty where it is within all of them."""
        if not math.isfinite(value):
            return "not finite"
        if self.above is not None and value > self.above:
            return f"above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"below {self.below:g}"
        if len(recent) < self.window:
            return ""
        median = statistics.median(recent)
        if self.factor is not None and value > self.factor * median > 0:
            return f"above {self.factor:g} times the running median {median:.4g}"
        deviation = 1.4826 * statistics.median(abs(one - median) for one in recent)
        deviation = max(deviation, LEAST_DEVIATION * abs(median))
        if self.deviations is not None and value > median + self.deviations * deviation:
            return f"above the running median {median:.4g} by {(value - median) / deviation:.1f} standard deviations"
        return ""


def matches(name: str, pattern: str) -> bool:
    """Whether a figure is of a pattern, in which * stands for anything between two slashes."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


class Guards:
    """All monitors of a run and what they remember. The first rank looks, all ranks do what it found.

    Args:
        monitors: by name.
        weights: the configured weight of each objective, by `task/objective`.
        modalities: those of each task.
        state: what `state` returned, of a checkpoint.
    """

    def __init__(
        self,
        monitors: dict[str, Config],
        weights: dict[str, float],
        modalities: dict[str, list[str]],
        state: dict | None = None,
    ):
        self.monitors, self.weights, self.modalities = monitors, weights, modalities
        self.not_looked = set(monitors)  # those that have not looked yet
        self.carried: dict[str, float] = {}  # what the next row says of a roll back
        self.restore(state or {})

    def restore(self, state: dict) -> None:
        """The memory that a checkpoint holds; what it holds of monitors that are gone is left out."""
        known = self.monitors
        self.recent: dict[str, dict] = {name: own for name, own in state.get("recent", {}).items() if name in known}
        self.streaks: dict[str, dict] = {name: own for name, own in state.get("streaks", {}).items() if name in known}
        self.factors: dict[str, float] = {n: f for n, f in state.get("factors", {}).items() if n in self.weights}
        self.skips: list[list[int]] = [list(one) for one in state.get("skips", [])]
        self.roll_backs: dict[str, int] = dict(state.get("roll_backs", {}))
        self.events: list[dict] = list(state.get("events", []))
        acts = (act for act in state.get("queue", []) if act["monitor"] in known)
        self.queue: list[dict] = [act for act in acts if known[act["monitor"]].action == act["action"]]

    def state(self) -> dict:
        """What a checkpoint holds of it, as JSON."""
        names = ("recent", "streaks", "factors", "skips", "roll_backs", "events", "queue")
        return {name: getattr(self, name) for name in names}

    def wants_shares(self, step: int) -> bool:
        return any(monitor.is_of_shares and monitor.looks_at(step) for monitor in self.monitors.values())

    def look(self, row: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> list[dict]:
        """What a step's figures ask for; called on the first rank, once for each step. Adds to `events`."""
        acts = []
        for name, monitor in self.monitors.items():
            if not monitor.looks_at(row["step"]):
                continue
            figures = [figure for figure in row if matches(figure, monitor.figure)]
            if not figures and name in self.not_looked:
                say(f"warning: monitor {name}: no figure is called {monitor.figure!r} (there are: {', '.join(row)})")
            self.not_looked.discard(name)
            for figure in figures:
                if why := self._judge(name, figure, row["step"], float(row[figure])):
                    acts.append(self._act(name, figure, row, why))
        self.events += [
            _event(act) for act in acts if act["action"] != "roll_back"
        ]  # which is one only once it is done
        return acts

    def _judge(self, name: str, figure: str, step: int, value: float) -> str:
        """Why a monitor acts on a figure; empty where it does not. The value joins the running median."""
        monitor = self.monitors[name]
        recent = self.recent.setdefault(name, {}).setdefault(figure, [])
        streaks = self.streaks.setdefault(name, {})
        why = monitor.breach(value, recent)
        if math.isfinite(value) and not (monitor.factor is None and monitor.deviations is None):
            recent[:] = [*recent, value][-monitor.window :]
        if not why:
            streaks.pop(figure, None)
            return ""
        first, count = streaks.get(figure, (step, 0))
        count += 1
        streaks[figure] = [first, count]
        repeats = monitor.action in ("stop", "roll_back") or (
            monitor.action == "reweigh" and count % monitor.patience == 0
        )
        return why if count == monitor.patience or (count > monitor.patience and repeats) else ""

    def _act(self, name: str, figure: str, row: dict, why: str) -> dict:
        monitor, value = self.monitors[name], float(row[figure])
        act = {
            "step": row["step"],
            "monitor": name,
            "figure": figure,
            "value": value if math.isfinite(value) else None,
            "why": why,
            "action": monitor.action,
            "first": self.streaks[name][figure][0],
        }
        if monitor.action == "reweigh":
            act["factors"] = self._move_weights(monitor, figure.partition("/")[0], row)
        return act

    def _move_weights(self, monitor: Config, family: str, row: dict) -> dict[str, float]:
        """Factors of the objectives' weights, nearer to those with which all shares of a family would be equal.

        A share of a modality is moved by the objectives of the tasks that read it.
        """
        shares = {name.removeprefix(f"{family}/"): row[name] for name in row if name.startswith(f"{family}/")}
        if not all(math.isfinite(share) for share in shares.values()):
            return dict(self.factors)
        needed = {name: -math.log(len(shares) * max(share, LEAST_SHARE)) for name, share in shares.items()}
        factors, most = dict(self.factors), math.log(monitor.max_factor)
        for objective in self.weights:
            task = objective.partition("/")[0]
            read = [objective] if family in ("grad_share", "loss_share") else self.modalities[task]
            if own := [needed[name] for name in read if name in needed]:
                moved = math.log(factors.get(objective, 1.0)) + monitor.rate * sum(own) / len(own)
                factors[objective] = math.exp(min(max(moved, -most), most))
        return factors

    def weigh(self) -> dict[str, float]:
        """The weight of each objective as it now is."""
        return {name: weight * self.factors.get(name, 1.0) for name, weight in self.weights.items()}

    def data_step(self, step: int) -> int:
        """The step of the stream that is read at a step of the run, both from 0: the same but for what is left out."""
        for start, stop in self.skips:
            if step >= start:
                step += stop - start
        return step

    def skip(self, first: int, last: int) -> None:
        """Leave out what the steps from `first` to `last`, numbered from 1, have read."""
        ranges = sorted([*self.skips, [self.data_step(first - 1), self.data_step(last - 1) + 1]])
        merged = ranges[:1]
        for start, stop in ranges[1:]:
            if start <= merged[-1][1]:
                merged[-1] = [merged[-1][0], max(merged[-1][1], stop)]
            else:
                merged.append([start, stop])
        self.skips = merged

    def roll_back(self, act: dict, to: int, state: dict) -> None:
        """Remember what the checkpoint of step `to` does, and beyond it that and why the run went back to it."""
        first = max(1, act["first"] - self.monitors[act["monitor"]].margin)
        self.skip(first, act["step"])
        skips, events = self.skips, self.events
        roll_backs = {**self.roll_backs, act["monitor"]: self.roll_backs.get(act["monitor"], 0) + 1}
        self.restore(state)
        self.skips, self.roll_backs = skips, roll_backs
        events = [event for event in events if event["step"] <= to or event["action"] == "roll_back"]
        self.events = [*events, {**_event(act), "to": to, "skipped": [first, act["step"]]}]
        self.carried = {f"monitor/{act['monitor']}": math.nan if act["value"] is None else act["value"]}

    def write(self, run_dir: Path) -> None:
        """Write RUN/monitors.jsonl, a row for each time that a monitor acted, where there is anything to write."""
        file = run_dir / FILE
        if self.events or file.exists():
            write_atomic(file, (f"{json.dumps(event)}\n".encode() for event in self.events))


def _event(act: dict) -> dict:
    return {name: act[name] for name in ("step", "monitor", "figure", "value", "why", "action")}


def describe(act: dict) -> str:
    """One line about what a monitor saw."""
    value = "" if act["value"] is None else f" {act['value']:.4g}"
    return f"monitor {act['monitor']}: step {act['step']}: {act['figure']}{value} is {act['why']}"
