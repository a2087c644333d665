"""One step's gradients, over microbatches and ranks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch import Batch, SequenceTable
from ..model import Model
from .learner import Learner, Reading, add_to, pairs_of, sum_into, task_of_objective
from .parallel import ALONE, Ranks


class Layout(Protocol):
    """How a learner lies on the ranks: `Alone`, or one of `layouts`."""

    learner: Learner
    forward: Any  # called as the learner is, where gradients are wanted

    def turns(self, count: int) -> int:
        """How many microbatches a rank goes through that has so many of its own."""
        ...

    def turn(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around a microbatch's forward and backward; that of the last one adds the gradients up over the ranks."""
        ...


class Alone:
    """The layout of one rank."""

    def __init__(self, learner: Learner):
        self.learner = self.forward = learner

    def turns(self, count: int) -> int:
        return count

    def turn(self, is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def forward_backward(
    model: Model,
    objectives: nn.ModuleDict,
    weights: dict[str, float],
    batches: list[Batch],
    precision: str = "float32",
    ranks: Ranks = ALONE,
    teacher: Model | None = None,
    measure: bool = False,
    layout: Layout | None = None,
    first: int | None = None,
    spare: Batch | None = None,
) -> dict[str, Tensor]:
    """Add one step's gradients up over this rank's microbatches; returns this rank's share of the losses by name.

    An objective that compares sequences over the whole step does so over all microbatches of all ranks: their features
    are made without gradients first (only of the sequences that are compared), compared, each rank working out its part
    of the loss, and the features' gradients sent back through each microbatch in turn (gradient caching, Gao et al.
    2021): the same gradients as in one batch, in the memory of a microbatch. The last microbatch is read once, with
    gradients, so that one microbatch a rank costs no second forward. Nothing here waits for the device.

    teacher: the averaged model, which reads `Batch.teacher` where an objective predicts its states. measure: also
    report `grad_square/NAME`, the squared norm of each loss's gradient at the backbone's output. layout: how the
    learner lies on the ranks. first: the number of the first microbatch among all ranks'. spare: what a rank reads, and
    learns nothing of, that has fewer microbatches than others and must keep step with them.
    """
    layout = layout or Alone(Learner(model, objectives, precision))
    first = ranks.rank * len(batches) if first is None else first
    step = Step(layout, weights, batches, ranks, teacher, measure, first, spare)
    idle = layout.turns(len(batches)) - len(batches)
    turns: list[int | None] = [*[None] * idle, *range(len(batches))]
    names = [name for name in weights if objectives[name].whole_step]
    if names and (len(batches) > 1 or ranks.size > 1):
        kept = turns.pop() if turns else None
        features = {number: step.first_pass(names, number) for number in turns}
        with layout.turn(not turns):
            reading = step.read(kept, names)
            step.compare(names, {**features, kept: reading[2]})
            step.backward(kept, reading)
    for place, number in enumerate(turns):
        with layout.turn(place == len(turns) - 1):
            step.backward(number, step.read(number, step.compared))
    return step.report


@dataclass
class Step:
    """One rank's part of a step. A microbatch's number counts from 0 on this rank; None is the `spare` one."""

    layout: Layout
    weights: dict[str, float]
    batches: list[Batch]
    ranks: Ranks
    teacher: Model | None
    measure: bool
    first: int  # the number of this rank's first microbatch among all ranks'
    spare: Batch | None
    compared: list[str] = field(default_factory=list)  # objectives whose features' gradients are known
    gradients: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)  # of each microbatch's features
    direct: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parameters, and gradients of the comparison

    def __post_init__(self):
        self.report = {"loss": torch.zeros((), device=self.layout.learner.device)}

    @torch.no_grad()
    def first_pass(self, names: list[str], number: int | None) -> dict[str, Tensor]:
        """The features of a microbatch, without gradients, by the objectives named."""
        batch = self._choose(number)
        if batch is None:
            return {}
        model: Any = self.layout.learner["model"]
        if not (model.config.backbone.drop_path or model.config.lora.dropout):  # which draw for all of a batch at once
            batch = batch.first_pass or batch
        self._seed(number)
        found = self.layout.learner(batch, self.weights, None, names, "features")[2]
        return found if number is not None else {}

    def read(self, number: int | None, compared: list[str]) -> Reading:
        """One microbatch, with gradients."""
        batch = self._choose(number)
        if batch is None:
            return self.report["loss"], {}, {}, {}
        self._seed(number)
        mode = "losses" if number is not None else "nothing"
        return self.layout.forward(batch, self.weights, self.teacher, compared, mode, self.measure)

    def backward(self, number: int | None, reading: Reading) -> None:
        """Add the gradients of what was read to the parameters', and its losses to the report."""
        total, report, features, squares = reading
        for name, own in features.items():
            total = total + (own * self.gradients.pop((name, number))).sum()
        for parameter, gradient in self.direct:
            total = total + (parameter * gradient).sum()
        self.direct = []
        if total.requires_grad:
            total.backward()
        sum_into(self.report, report)
        sum_into(self.report, {f"grad_square/{name}": square for name, square in squares.items()})

    def compare(self, names: list[str], features: dict[int | None, dict[str, Tensor]], alike: bool = False) -> None:
        """Compare the features of all microbatches of all ranks.

        alike: every rank works out and reports all of the loss, and nothing is summed over the ranks.
        """
        own = {name: [(n, one[name].detach()) for n, one in sorted_items(features) if name in one] for name in names}
        tables = {
            name: [self.batches[number].tasks[task_of_objective(name)].table.clone() for number, _ in found]
            for name, found in own.items()
        }
        about = {n: (tables[n], *((one.shape[1], one.dtype) for _, one in own[n][:1])) for n in names}
        told = self.ranks.all_gather_objects(about)
        for name in names:
            if any(tables for tables, *_ in (one[name] for one in told)):
                self._compare(name, own[name], [one[name] for one in told], alike)
        self.compared = list(names)

    def _compare(self, name: str, own: list[tuple], told: list[tuple], alike: bool) -> None:
        learner, ranks = self.layout.learner, self.ranks
        objective: Any = dict(learner["objectives"].named_children())[name]
        model: Any = learner["model"]
        table = SequenceTable.concatenate([table for tables, *_ in told for table in tables])
        counts = [sum(map(len, tables)) for tables, *_ in told]
        width, dtype = next(shape[0] for _, *shape in told if shape)
        rows = torch.cat([torch.zeros(0, width, dtype=dtype, device=model.device), *(one for _, one in own)])
        order = torch.argsort(table.sample, stable=True)  # the stream's, whatever the microbatches
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        gathered = torch.cat(ranks.all_gather(rows, counts)).index_select(0, order.to(model.device))
        leaf = gathered.detach().requires_grad_()
        table = SequenceTable(*(column[order] for column in (table.modality, table.sample, table.group)))
        share = [len(table) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1)]
        part = {} if alike or ranks.size == 1 else {"rows": range(*share)}
        with learner.cast():
            loss, figures = objective.compare(leaf, pairs_of(table, model), **part)
        parameters = [weight for weight in objective.parameters() if weight.requires_grad]
        found = torch.autograd.grad(self.weights[name] * loss, [leaf, *parameters], allow_unused=True)
        gradient, *direct = found
        gradient = torch.zeros_like(leaf) if gradient is None else gradient.contiguous()
        if part:
            ranks.all_reduce([gradient])
            for key in objective.maxima:  # what is reported is summed over the ranks
                if key in figures:
                    figures[key] = torch.cat(ranks.all_gather(figures[key].reshape(1))).amax() / ranks.size
        start = sum(counts[: ranks.rank])
        mine = gradient.index_select(0, place[start : start + counts[ranks.rank]].to(model.device))
        for (number, _), rows in zip(own, mine.split([len(one) for _, one in own]), strict=True):
            self.gradients[name, number] = rows
        self.direct += [(w, g) for w, g in zip(parameters, direct, strict=True) if g is not None]
        add_to(self.report, name, self.weights[name], loss, figures)

    def _choose(self, number: int | None) -> Batch | None:
        return self.spare if number is None else self.batches[number]

    def _seed(self, number: int | None) -> None:
        """Dropout draws the same in both readings of a microbatch, on whatever rank it is: by the step's seed alone."""
        number = 0xFFFF if number is None else self.first + number
        torch.manual_seed((torch.initial_seed() & ~0xFFFF) | (number & 0xFFFF))


def sorted_items(features: dict[int | None, dict[str, Tensor]]) -> list[tuple[Any, dict[str, Tensor]]]:
    """The features of this rank's own microbatches, in their order."""
    return sorted((number, one) for number, one in features.items() if number is not None)
