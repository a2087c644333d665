"""What learns: the model, its running average and the optimizers; one update at a time."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import Config
from ..errors import UserError
from ..model import Model
from ..run_dir import checkpoint
from ..stream.mixture import mix
from ..stream.tasks import weights_of
from . import optim
from .grad_cache import forward_backward
from .parallel import Ranks


class Learner:
    """Built of a config, from nothing or from a checkpoint's `folder`. Raises UserError where no model can be built."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks, folder: Path | None):
        self.config, self.device, self.ranks = config, device, ranks
        self.weights = weights_of(config)
        torch.manual_seed(config.seed)
        try:
            self.model = Model(config).to(device)
            self.ema = Model(config).to(device).requires_grad_(False)
            self.optimizers = optim.build(config.optim, self.model)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"{config.run}: no model can be built of this config: {said}") from None
        self.ema.load_state_dict(self.model.state_dict())
        if folder:
            self.model.load_state_dict(checkpoint.read_tensors(folder, "model"))
            self.ema.load_state_dict(checkpoint.read_tensors(folder, "ema"))
            checkpoint.restore_optimizers(self.optimizers, checkpoint.read_tensors(folder, "optimizer"))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for weight in self.parameters:
            weight.grad = torch.zeros_like(weight)  # what a step does not touch has a zero gradient, not none
        if config.compile:
            self.model.backbone.compile(dynamic=True)

    def learn(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Update the weights by this rank's microbatches, and the others'.

        Returns losses and accuracies by name, the gradient's norm, the learning rate, and `skipped`: 1 where loss or
        gradient were not finite and the weights are left as they were.
        """
        rate = optim.factor(self.config.optim, step, self.config.steps)
        optim.set_rates(self.optimizers, rate)
        torch.manual_seed(mix(self.config.seed, step))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=False)
        batches = [batch.to(self.device) for batch in batches]
        report = forward_backward(self.model, self.weights, batches, self.config.precision, self.ranks)
        self.ranks.all_reduce([weight.grad for weight in self.parameters])
        report = _sums(self.ranks.all_gather_objects({name: float(value) for name, value in report.items()}))
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip or float("inf"))
        finite = bool(torch.isfinite(norm)) and math.isfinite(report["loss"])
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            share = 1 - min(self.config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), share)
        return {**report, "norm": float(norm), "lr": self.config.optim.lr * rate, "skipped": int(not finite)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it, by file."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizers),
        }


def _sums(told: list[dict[str, float]]) -> dict[str, float]:
    """The reports of all ranks, added up by name."""
    total: dict[str, float] = {}
    for report in told:
        for name, value in report.items():
            total[name] = total.get(name, 0.0) + value
    return total
