"""What is wrapped by DDP or FSDP2: the model and the objectives, from a microbatch to its weighted loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, SequenceTable, Targets, find_pairs
from ..model import Model, Output, autocast

Reading = tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


class Learner(nn.Module):
    """`learner(batch, weights)` is one forward of all that learns; `learner["model"]` and `learner["objectives"]`."""

    def __init__(self, model: Model, objectives: nn.ModuleDict, precision: str = "float32"):
        super().__init__()
        self.model, self.objectives = model, objectives
        self.precision = precision
        self.in_step = False  # whether all ranks must call the same modules, as shards ask for

    def __getitem__(self, name: str) -> nn.Module:
        """As a `ModuleDict`, which torch 2.11 does not shard."""
        return getattr(self, name)

    def forward(
        self,
        batch: Batch,
        weights: dict[str, float],
        teacher: Model | None = None,
        compared: Collection[str] = (),
        mode: str = "losses",
        measure: bool = False,
    ) -> Reading:
        """The weighted sum of the losses of a microbatch, the report, features, and squared gradient norms.

        weights: of each objective. compared: the objectives whose features are compared over the whole step; of them
        there are features (S, E) in place of losses. mode: `losses`; `features`, which leaves all losses out;
        `nothing`, for a rank that must keep step with the others and has no microbatch left: a loss of zero that
        reaches the backbone. measure: the last map, filled in by the backward, is the squared norm of each loss's
        gradient at the backbone's output. The report is this microbatch's share of `loss` and of each `loss/NAME`.
        """
        model: Any = self["model"]
        objectives: Any = self["objectives"]
        terms: list[Tensor] = []
        report, features, squares = {}, {}, {}
        with self.cast():
            output = model(batch)
            if mode != "features":
                output.teacher = read_teacher(teacher, batch, objectives, self.in_step)
            if mode == "nothing":
                return output.zero(), {}, {}, {}
            for name, weight in weights.items():
                targets = batch.tasks.get(task_of_objective(name))
                if targets is None or (mode == "features" and name not in compared):
                    continue
                seen = output if mode == "features" else _apart(output, name, squares if measure else None)
                if name in compared:
                    features[name] = objectives[name].features(seen, targets)
                    continue
                loss, figures = score(objectives[name], seen, targets, model)
                add_to(report, name, weight, loss, figures)
                terms.append(weight * loss)
            total = sum(terms[1:], terms[0]) if terms else output.zero()
        return total, report, features, squares

    @property
    def device(self) -> torch.device:
        model: Any = self["model"]
        return model.device

    def cast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.precision != "float32")


def _apart(output: Output, name: str, squares: dict[str, Tensor] | None) -> Output:
    """The output for one objective alone, whose gradient's squared norm the backward adds to `squares`, if any.

    Always, so that measuring changes neither what is added to what, nor so the last bit of a gradient.
    """
    content = output.tokens.content
    if not content.requires_grad:
        return output
    content = content.view_as(content)
    if squares is not None:
        kept = squares

        def keep(gradient: Tensor) -> None:
            kept[name] = gradient.float().square().sum()

        content.register_hook(keep)
    seen = copy.copy(output)
    seen.tokens = output.tokens.replace(content=content)
    return seen


@torch.no_grad()
def read_teacher(
    teacher: Model | None, batch: Batch, objectives: nn.ModuleDict, in_step: bool = False
) -> Output | None:
    """What the averaged model makes of the whole sequences whose states an objective predicts; None without them.

    in_step: where any objective predicts states the teacher reads something in every microbatch.
    """
    own: list[Any] = list(objectives.values())
    layers = max((objective.teacher_layers for objective in own), default=0)
    if teacher is None or not (batch.teacher or (layers and in_step)):
        return None
    output = teacher(batch.teacher or batch, layers)
    return output if batch.teacher else None


def score(objective, output: Output, targets: Targets, model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures of an objective on one microbatch, which holds all of its task's step."""
    if objective.whole_step:
        return objective.compare(objective.features(output, targets), pairs_of(targets.table, model))
    return objective.loss(output, targets)


def pairs_of(table: SequenceTable, model: Model) -> dict:
    return {name: pairs.to(model.device) for name, pairs in find_pairs(table, model.modalities).items()}


def task_of_objective(name: str) -> str:
    """The task whose samples an objective reads."""
    return name.partition("/")[0]


def add_to(report: dict[str, Tensor], name: str, weight: float, loss: Tensor, figures: dict[str, Tensor]) -> None:
    """Add an objective's loss and figures to a report, on the device."""
    own = {"loss": weight * loss.detach(), f"loss/{name}": loss.detach()}
    sum_into(report, own | {f"loss/{name}/{key}": value.detach() for key, value in figures.items()})


def sum_into(report: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for key, value in more.items():
        report[key] = report[key] + value if key in report else value
