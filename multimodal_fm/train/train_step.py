"""What learns: the model, the objectives, their averaged weights and the optimizers; one update at a time."""

from __future__ import annotations

import fnmatch
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from ..batch import Batch
from ..errors import UserError
from ..model import Model, load_weights
from ..run_dir import checkpoint
from ..stream.mixture import mix
from ..stream.tasks import loss_weights
from . import ema, optim
from .config import TrainConfig
from .grad_cache import forward_backward
from .parallel import ALONE, Ranks


class TrainStep:
    """Built of a config, from nothing or from a checkpoint. Raises UserError where no model can be built of it."""

    def __init__(
        self, config: TrainConfig, device: torch.device, ranks: Ranks = ALONE, from_checkpoint: Path | None = None
    ):
        self.config, self.device, self.ranks = config, device, ranks
        self.weights = loss_weights(config.tasks)
        try:
            torch.manual_seed(config.seed)
            self.model, self.objectives = self._modules()
            self.ema = nn.ModuleDict(dict(zip(("model", "objectives"), self._modules()))).requires_grad_(False)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"{config.run_dir}: no model can be built of this config: {said}") from None
        self.trained = nn.ModuleDict({"model": self.model, "objectives": self.objectives})
        self.ema.load_state_dict(self.trained.state_dict())
        self.ema.eval()
        self._freeze(config.trainable)
        self.optimizers = optim.build(config.optim, self.trained, self.model.backbone)
        if from_checkpoint:
            for name, module in self._files().items():
                load_weights(module, checkpoint.read_tensors(from_checkpoint, name), from_checkpoint)
            state = checkpoint.read_tensors(from_checkpoint, "optimizer")
            optim.load_optimizer_state(self.optimizers, self.trained, state)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        for weight in self.parameters:
            weight.grad = torch.zeros_like(weight)  # what a step does not touch has a zero gradient, not none
        if config.compile:
            self.model.backbone.compile(dynamic=True)

    def _freeze(self, trainable: list[str]) -> None:
        """Leave only the parameters that the patterns name to learn; no patterns: all. Raises UserError."""
        names = {name.removeprefix("model."): weight for name, weight in self.trained.named_parameters()}
        for pattern in trainable:
            if not fnmatch.filter(names, pattern):
                raise UserError(
                    f"trainable: {pattern!r} names no parameter (there are: {', '.join(list(names)[:4])}, ...)"
                )
        for name, weight in names.items():
            weight.requires_grad_(not trainable or any(fnmatch.fnmatchcase(name, p) for p in trainable))

    def _modules(self) -> tuple[Model, nn.ModuleDict]:
        tasks = self.config.tasks
        with torch.device(self.device if self.device.type == "meta" else "cpu"):  # the same start on every device
            model = Model(self.config.model)
            modules = objectives.build(
                {name: task.objectives for name, task in tasks.items()},
                {name: task.modalities for name, task in tasks.items()},
                model,
            )
        return model.to(self.device), modules.to(self.device)

    def _files(self) -> dict[str, nn.Module]:
        """What a checkpoint holds of the modules, by file."""
        return {
            "model": self.model,
            "objectives": self.objectives,
            "ema": self.ema["model"],
            "ema_objectives": self.ema["objectives"],
        }

    def __call__(self, step: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Update the weights by this rank's microbatches, and the others'.

        Returns, on the device, losses and accuracies by name, the gradient's norm, and `skipped`: 1 where loss or
        gradient were not finite and weights and moments are left as they were. Nothing here waits for the device.
        """
        optim.set_lr(self.optimizers, optim.lr_factor(self.config.optim, step, self.config.steps))
        torch.manual_seed(mix(self.config.seed, step))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=False)
        batches = [batch.to(self.device) for batch in batches]
        report = forward_backward(self.model, self.objectives, self.weights, batches, self.config.precision, self.ranks)
        self.ranks.all_reduce([weight.grad for weight in self.parameters if weight.grad is not None])
        report = self.ranks.sum_by_name(report, self.device)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip or float("inf"))
        skipped = (~(torch.isfinite(grad_norm) & torch.isfinite(report["loss"]))).float()
        self._update(step, skipped)
        return {**report, "grad_norm": grad_norm, "skipped": skipped}

    def _update(self, step: int, skipped: Tensor) -> None:
        began = self._now()
        for optimizer in self.optimizers:
            if self.device.type != "meta":
                # as torch.amp.GradScaler says it: the optimizer then changes nothing
                optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        self.optimizer_times = began, self._now()
        objective: Any
        for objective in self.objectives.values():
            objective.after_update()
        ema.update(self.ema, self.trained, step, self.config.ema_decay, skipped)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, began: Any, ended: Any) -> float:
        """The seconds between the two `optimizer_times` of a step; on a GPU this waits for that step to end."""
        if self.device.type != "cuda":
            return ended - began
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it, by file."""
        tensors = {name: module.state_dict() for name, module in self._files().items()}
        return {**tensors, "optimizer": optim.optimizer_state(self.optimizers, self.trained)}
