"""Strict numerics: gradients and losses that are the same, bit for bit, for any number of ranks.

Sums of floating-point numbers depend on their order. Here each microbatch's gradients are made by themselves, gathered
by all ranks, and summed in a binary tree over the microbatches' numbers; what is compared over the whole step is worked
out by every rank alike. It costs the memory of log2(microbatches) + ranks gradients, and time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .grad_cache import Step
from .learner import sum_into
from .parallel import Ranks

Node = tuple[int, int]  # of the tree: its level and its number from the left; (0, n) is microbatch n


def forward_backward(step: Step) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What `grad_cache.forward_backward` does, in the order of a tree: the report of the whole step, and the gradients
    of all parameters that learn, whole, both the same on every rank."""
    objectives: Any = step.layout.learner["objectives"]
    counts = step.ranks.all_gather_objects(len(step.batches))
    step.first = sum(counts[: step.ranks.rank])
    idle = step.layout.turns(len(step.batches)) - len(step.batches)
    turns: list[int | None] = [*[None] * idle, *range(len(step.batches))]
    names = [name for name in step.weights if objectives[name].whole_step]
    if names:  # each microbatch is read alike, whoever reads it
        step.compare(names, {number: step.first_pass(names, number) for number in turns}, alike=True)
    compared, direct, step.direct = step.report, step.direct, []
    reports: dict[int, dict[str, Tensor]] = {}
    gradients: dict[int, list[Tensor]] = {}
    for number in turns:
        step.report = {}
        with step.layout.turn(False):
            step.backward(number, step.read(number, step.compared))
        found = _take(_learning(step))
        if number is not None:
            reports[step.first + number], gradients[step.first + number] = step.report, found
    leaves, keys = _flatten(reports, gradients, step)
    total = _sum_tree(leaves, sum(counts), step.ranks, step.layout.learner.device)
    sizes = [weight.numel() for weight in _learning(step)]
    *parts, figures = total.split([*sizes, len(keys)])
    result = [part.view_as(weight) for part, weight in zip(parts, _learning(step), strict=True)]
    for weight, gradient in direct:
        result[_place(weight, _learning(step))] += gradient
    report = dict(zip(keys, figures.unbind(), strict=True))
    sum_into(report, compared)
    return report, result


def _learning(step: Step) -> list[nn.Parameter]:
    return [weight for weight in step.layout.learner.parameters() if weight.requires_grad]


def _place(weight: Tensor, weights: list[nn.Parameter]) -> int:
    return next(number for number, one in enumerate(weights) if one is weight)


def _take(weights: list[nn.Parameter]) -> list[Tensor]:
    """The gradients, which are left out of the parameters from now on."""
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return found


def _flatten(reports: dict, gradients: dict, step: Step) -> tuple[dict[int, Tensor], list[str]]:
    """Each microbatch's gradients and figures end to end, and the figures' names, those of all ranks."""
    told = step.ranks.all_gather_objects(sorted({key for report in reports.values() for key in report}))
    keys = sorted({key for own in told for key in own})
    zero = torch.zeros((), device=step.layout.learner.device)
    leaves = {}
    for number, report in reports.items():
        figures = [report.get(key, zero).float().reshape(1) for key in keys]
        leaves[number] = torch.cat([*(one.reshape(-1) for one in gradients.pop(number)), *figures])
    return leaves, keys


def _sum_tree(leaves: dict[int, Tensor], count: int, ranks: Ranks, device) -> Tensor:
    """The sum of all ranks' leaves, of which there are `count` together, in the tree's order."""
    nodes: dict[Node, Tensor] = {}
    for number in sorted(leaves):
        _insert(nodes, (0, number), leaves.pop(number), count)
    if ranks.size > 1:
        told = ranks.all_gather_objects([(node, value.numel()) for node, value in nodes.items()])
        size = max(length for own in told for _, length in own)
        everything: dict[Node, Tensor] = {}
        own = list(nodes.values())
        for turn in range(max(map(len, told))):
            mine = own[turn] if turn < len(own) else torch.zeros(size, device=device)
            gathered = [torch.empty_like(mine) for _ in told]
            dist.all_gather(gathered, mine)
            everything |= {about[turn][0]: one for about, one in zip(told, gathered, strict=True) if turn < len(about)}
        nodes = {}
        for node in sorted(everything):
            _insert(nodes, node, everything[node], count)
    (total,) = nodes.values()
    return total


def _insert(nodes: dict[Node, Tensor], node: Node, value: Tensor, count: int) -> None:
    """Add a node's value, and go up the tree as far as both children, or the only one, are there."""
    level, number = node
    while -(-count // 2**level) > 1:
        sibling, width = (level, number ^ 1), -(-count // 2**level)
        if sibling[1] < width:
            if sibling not in nodes:
                break
            other = nodes.pop(sibling)
            value = value + other if number % 2 == 0 else other + value
        level, number = level + 1, number // 2
    nodes[level, number] = value
