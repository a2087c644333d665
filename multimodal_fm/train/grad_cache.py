"""One step's gradients, over microbatches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch, table_of
from ..model import Model
from .parallel import ALONE, Ranks


def forward_backward(
    model: Model,
    weights: dict[str, float],
    batches: list[Batch],
    precision: str = "float32",
    ranks: Ranks = ALONE,
) -> dict:
    """One step's gradients, added up over this rank's microbatches, and this rank's share of its losses by name.

    An objective that compares sequences over the whole step does so over all microbatches: with several, their features
    are made without gradients first, compared, and the features' gradients sent back through each microbatch in turn
    (gradient caching, Gao et al. 2021): the same gradients as in one batch, in a microbatch's memory.
    """
    device = next(model.parameters()).device.type
    cast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    whole = [name for name in weights if getattr(model.objectives[name], "whole_step", False)]
    report, returned = _Report(weights), {}
    if whole and (len(batches) > 1 or ranks.size > 1):
        features = _features(model, whole, batches, cast)
        for name in whole:
            returned[name] = _compared(model, name, weights[name], features[name], cast, ranks, report)
    for batch in batches:
        with cast:
            output, total = model(batch), 0.0
            for name, weight in weights.items():
                objective, targets = model.objectives[name], batch.tasks.get(_task_of(name))
                if targets is None:
                    continue
                if name in returned:
                    total = total + (objective.features(output, targets) * returned[name].pop(0)).sum()
                    continue
                if name in whole:
                    loss, numbers = objective.compare(objective.features(output, targets), targets)
                else:
                    loss, numbers = objective.loss(output, targets)
                report.add(name, loss, numbers)
                total = total + weight * loss
        total.backward()
    return report.numbers


class _Report:
    """Losses and what else the objectives say, by name, added up."""

    def __init__(self, weights: dict[str, float]):
        self.weights, self.numbers = weights, {"loss": 0.0}

    def add(self, name: str, loss: Tensor, numbers: dict) -> None:
        for key, value in {
            "loss": self.weights[name] * loss.detach(),
            f"loss/{name}": loss.detach(),
            **{f"loss/{name}/{key}": value for key, value in numbers.items()},
        }.items():
            self.numbers[key] = self.numbers.get(key, 0.0) + value


def _task_of(name: str) -> str:
    """The task whose samples an objective reads."""
    return name.split("+")[0]


def _features(model: Model, names: list[str], batches: list[Batch], cast) -> dict[str, list[tuple]]:
    """Each objective's features, without gradients, of each microbatch that has its task, and what they are of."""
    found: dict[str, list] = {name: [] for name in names}
    with torch.no_grad(), cast:
        for batch in batches:
            output = model(batch)
            for name in names:
                if targets := batch.tasks.get(_task_of(name)):
                    found[name].append((model.objectives[name].features(output, targets), targets))
    return found


def _compared(
    model: Model, name: str, weight: float, pairs: list[tuple], cast, ranks: Ranks, report: _Report
) -> list[Tensor]:
    """Compare one objective's features over all microbatches of all ranks: the gradients of each of this rank's."""
    own = [features for features, _ in pairs]
    tables = [table for told in ranks.all_gather_objects([targets.table() for _, targets in pairs]) for table in told]
    if not tables:
        return []
    device = model.device
    width = max(ranks.all_gather_objects(own[0].shape[1] if own else 0))
    every = ranks.all_gather(torch.cat(own) if own else torch.zeros(0, width, device=device))
    leaf = torch.cat(every).detach().requires_grad_()
    with cast:
        loss, numbers = model.objectives[name].compare(leaf, table_of(tables, device))
    loss = loss / ranks.size  # every rank compares all, and their gradients are added up
    (weight * loss).backward()
    report.add(name, loss, {key: value / ranks.size for key, value in numbers.items()})
    gradients = leaf.grad.split([len(one) for one in every])[ranks.rank] * ranks.size
    return list(gradients.split([len(one) for one in own]))
