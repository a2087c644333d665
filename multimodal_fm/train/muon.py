"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum whose matrices are orthogonalized.

The arithmetic is that of `torch.optim.Muon` with its default settings. Two things are faster here: matrices of equal
shape are orthogonalized together, and a CPU computes in float32, since most processors only emulate bfloat16.
"""

from __future__ import annotations

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
    """

    found_inf: Tensor | None = None  # as torch.amp.GradScaler sets it: 1 where this step must change nothing

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(weight.ndim != 2 for group in self.param_groups for weight in group["params"]):
            raise ValueError("Muon updates matrices: every parameter must have two dimensions")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            same_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                grad = weight.grad if self.found_inf is None else weight.grad.masked_fill(self.found_inf > 0, 0.0)
                average = state["momentum_buffer"].lerp_(grad, (1 - group["momentum"]) * keep)
                update = grad.lerp(average, group["momentum"])
                same_shape.setdefault((weight.shape, weight.dtype, weight.device), []).append((weight, update))
            for pairs in same_shape.values():
                for (weight, _), update in zip(pairs, orthogonalize(torch.stack([u for _, u in pairs])), strict=True):
                    rows, columns = weight.shape
                    weight.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                    weight.sub_(update * (group["lr"] * max(1.0, rows / columns) ** 0.5 * keep))
        return loss


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
