"""One step's gradients, over microbatches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, Pairs, SequenceTable, Targets, find_pairs
from ..model import Model, Output, autocast
from .parallel import ALONE, Ranks


def forward_backward(
    model: Model,
    objectives: nn.ModuleDict,
    weights: dict[str, float],
    batches: list[Batch],
    precision: str = "float32",
    ranks: Ranks = ALONE,
    teacher: Model | None = None,
    measure: bool = False,
) -> dict[str, Tensor]:
    """Add one step's gradients up over this rank's microbatches; returns this rank's share of the losses by name.

    An objective that compares sequences over the whole step does so over all microbatches of all ranks: with several,
    their features are made without gradients first, compared, and the features' gradients sent back through each
    microbatch in turn (gradient caching, Gao et al. 2021): the same gradients as in one batch, in the memory of a
    microbatch. Nothing here waits for the device.

    teacher: the averaged model, which reads `Batch.teacher` where an objective predicts its states. measure: also
    report `grad_square/NAME`, the squared norm of each loss's gradient at the backbone's output.
    """
    cast = autocast(model.device, precision == "bfloat16")
    whole_step = [name for name in weights if objectives[name].whole_step]
    report, cached = _Report(weights, model.device), {}
    if whole_step and (len(batches) > 1 or ranks.size > 1):
        features = _features(model, objectives, whole_step, batches, cast, ranks)
        for name in whole_step:
            cached[name] = _compare(objectives[name], name, weights[name], features[name], model, cast, ranks, report)
    for number, batch in enumerate(batches):
        with cast:
            _seed(ranks, len(batches), number)
            output = model(batch)
            output.teacher = read_teacher(teacher, batch, objectives)
            terms: dict[str, Tensor] = {}
            for name, weight in weights.items():
                objective: Any = objectives[name]
                targets = batch.tasks.get(task_of_objective(name))
                if targets is None:
                    continue
                if name in cached:
                    terms[name] = (objective.features(output, targets) * cached[name].pop(0)).sum()
                    continue
                loss, figures = score(objective, output, targets, model)
                report.add(name, loss, figures)
                terms[name] = weight * loss
        if measure:
            report.add_gradients(terms, output.tokens.content)
        total: Any = sum(terms.values(), 0.0)
        total.backward()
    return report.values


@torch.no_grad()
def read_teacher(teacher: Model | None, batch: Batch, objectives: nn.ModuleDict) -> Output | None:
    """What the averaged model makes of the whole sequences whose states an objective predicts; None without them."""
    if batch.teacher is None or teacher is None:
        return None
    own: list[Any] = list(objectives.values())
    return teacher(batch.teacher, max(objective.teacher_layers for objective in own))


def score(objective, output: Output, targets: Targets, model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures of an objective on one microbatch, which holds all of its task's step."""
    if objective.whole_step:
        return objective.compare(objective.features(output, targets), _pairs(targets.table, model))
    return objective.loss(output, targets)


class _Report:
    """Losses, and what else the objectives say, by name, added up on the device."""

    def __init__(self, weights: dict[str, float], device):
        self.weights, self.values = weights, {"loss": torch.zeros((), device=device)}

    def add(self, name: str, loss: Tensor, figures: dict[str, Tensor]) -> None:
        for key, value in {
            "loss": self.weights[name] * loss.detach(),
            f"loss/{name}": loss.detach(),
            **{f"loss/{name}/{key}": value for key, value in figures.items()},
        }.items():
            self.values[key] = self.values[key] + value if key in self.values else value

    def add_gradients(self, terms: dict[str, Tensor], content: Tensor) -> None:
        """Add the squared norm of each term's gradient at `content`, from which there is no way on to the weights."""
        for name, term in terms.items():
            gradient = None
            if term.requires_grad and content.requires_grad:
                (gradient,) = torch.autograd.grad(term, content, retain_graph=True, allow_unused=True)
            if gradient is not None:
                key, square = f"grad_square/{name}", gradient.float().square().sum()
                self.values[key] = self.values[key] + square if key in self.values else square


def task_of_objective(name: str) -> str:
    """The task whose samples an objective reads."""
    return name.partition("/")[0]


def _pairs(table: SequenceTable, model: Model) -> dict[str, Pairs]:
    return {name: pairs.to(model.device) for name, pairs in find_pairs(table, model.modalities).items()}


def _seed(ranks: Ranks, count: int, number: int) -> None:
    """Dropout draws the same in both readings of a microbatch, on whatever rank it is: by the step's seed alone."""
    torch.manual_seed((torch.initial_seed() & ~0xFFFF) | ((ranks.rank * count + number) & 0xFFFF))


def _features(model, objectives, names: list[str], batches: list[Batch], cast, ranks: Ranks) -> dict[str, list[tuple]]:
    """Each objective's features, without gradients, of each microbatch that has its task, and their tables."""
    features: dict[str, list] = {name: [] for name in names}
    with torch.no_grad(), cast:
        for number, batch in enumerate(batches):
            _seed(ranks, len(batches), number)
            output = model(batch)
            for name in names:
                if targets := batch.tasks.get(task_of_objective(name)):
                    features[name].append((objectives[name].features(output, targets), targets.table))
    return features


def _compare(objective, name, weight, features: list[tuple], model, cast, ranks: Ranks, report) -> list[Tensor]:
    """Compare one objective's features over all microbatches of all ranks: the gradients of each of this rank's."""
    own = [one for one, _ in features]
    tables = [table for told in ranks.all_gather_objects([table.clone() for _, table in features]) for table in told]
    if not tables:
        return []
    width = max(ranks.all_gather_objects(own[0].shape[1] if own else 0))
    gathered = ranks.all_gather(torch.cat(own) if own else torch.zeros(0, width, device=model.device))
    leaf = torch.cat(gathered).detach().requires_grad_()
    with cast:
        loss, figures = objective.compare(leaf, _pairs(SequenceTable.concatenate(tables), model))
    loss = loss / ranks.size  # every rank compares all, and their gradients are added up
    (weight * loss).backward()
    report.add(name, loss, {key: value / ranks.size for key, value in figures.items()})
    assert leaf.grad is not None
    gradients = leaf.grad.split([len(one) for one in gathered])[ranks.rank] * ranks.size
    return list(gradients.split([len(one) for one in own]))
