"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum whose matrices are orthogonalized.

The arithmetic is that of `torch.optim.Muon` with its default settings. Two things are faster here: matrices of equal
shape are orthogonalized together, and a CPU computes in float32, since most processors only emulate bfloat16.

Several ranks share the matrices out (`owners`): each is orthogonalized once, by the rank that owns it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of X, (X Xᵀ) X and (X Xᵀ)² X
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay, for parameters that are matrices.

    Arguments:
        params: parameters with two dimensions, or groups of such; ValueError otherwise.
        lr: the learning rate of a square or wide matrix; that of a tall one is sqrt(rows / columns) times as large.
        weight_decay: decoupled, times `lr`.
        momentum: the decay of the running mean of the gradients.
        shapes: those of the whole matrices, where the parameters are some of their rows.
        spread: called with all updates, gives them orthogonalized; of whole matrices, or of this rank's rows of them.
    """

    found_inf: Tensor | None = None  # as torch.amp.GradScaler sets it: 1 where this step must change nothing

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        shapes: dict[Tensor, torch.Size] | None = None,
        spread: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.shapes, self.spread = shapes or {}, spread or orthogonalize_all
        if any(weight.ndim != 2 for group in self.param_groups for weight in group["params"]):
            raise ValueError("Muon updates matrices: every parameter must have two dimensions")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        found: list[tuple[Tensor, dict, Tensor]] = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                grad = weight.grad if self.found_inf is None else weight.grad.masked_fill(self.found_inf > 0, 0.0)
                average = state["momentum_buffer"].lerp_(grad, (1 - group["momentum"]) * keep)
                found.append((weight, group, grad.lerp(average, group["momentum"])))
        updates = self.spread([update for *_, update in found])
        for (weight, group, _), update in zip(found, updates, strict=True):
            rows, columns = self.shapes.get(weight, weight.shape)
            weight.mul_(1 - group["lr"] * group["weight_decay"] * keep)
            weight.sub_(update * (group["lr"] * max(1.0, rows / columns) ** 0.5 * keep))
        return loss


def orthogonalize_all(updates: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` of matrices of any shapes, those of equal shape together."""
    same: dict[tuple, list[int]] = {}
    for number, update in enumerate(updates):
        same.setdefault((update.shape, update.dtype, update.device), []).append(number)
    results: dict[int, Tensor] = {}
    for numbers in same.values():
        found = orthogonalize(torch.stack([updates[number] for number in numbers]))
        results.update(zip(numbers, found.unbind(), strict=True))
    return [results[number] for number in range(len(updates))]


def orthogonalize_each(updates: list[Tensor]) -> list[Tensor]:
    """The same, one by one: what comes out of a product does not depend on what else is multiplied."""
    return [orthogonalize(update[None])[0] for update in updates]


def orthogonalize(matrices: Tensor) -> Tensor:
    """U S Vᵀ -> about U Vᵀ for each of the matrices (B, M, N), by a Newton-Schulz iteration of fifth order.

    The singular values of the result lie between about 0.5 and 1.5, which trains as well as ones would. It is of type
    bfloat16 on a GPU and float32 elsewhere.
    """
    if matrices.shape[1] > matrices.shape[2]:  # the Gram matrix is square in the rows: make them the shorter side
        return orthogonalize(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
