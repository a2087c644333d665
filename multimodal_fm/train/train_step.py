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
            self.load(from_checkpoint)
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

    def load(self, folder: Path) -> None:
        """Weights, averages and moments of a checkpoint. Raises UserError."""
        for name, module in self._files().items():
            load_weights(module, checkpoint.read_tensors(folder, name), folder)
        state = checkpoint.read_tensors(folder, "optimizer")
        optim.load_optimizer_state(self.optimizers, self.trained, state)

    def __call__(self, step: int, batches: list[Batch], measure: bool = False) -> dict[str, Tensor]:
        """Update the weights by this rank's microbatches, and the others'.

        Returns, on the device, losses and accuracies by name, the gradient's norm, and `skipped`: 1 where loss or
        gradient were not finite and weights and moments are left as they were. With `measure` also the shares of
        `guards.SHARES`. Nothing here waits for the device.
        """
        optim.set_lr(self.optimizers, optim.lr_factor(self.config.optim, step, self.config.steps))
        torch.manual_seed(mix(self.config.seed, step))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=False)
        batches = [batch.to(self.device) for batch in batches]
        teacher: Any = self.ema["model"]
        report = forward_backward(
            self.model, self.objectives, self.weights, batches, self.config.precision, self.ranks, teacher, measure
        )
        self.ranks.all_reduce([weight.grad for weight in self.parameters if weight.grad is not None])
        report = self.ranks.sum_by_name(report, self.device)
        if measure:
            report = self._with_shares(report)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip or float("inf"))
        skipped = (~(torch.isfinite(grad_norm) & torch.isfinite(report["loss"]))).float()
        self._update(step, skipped)
        return {**report, "grad_norm": grad_norm, "skipped": skipped}

    def _with_shares(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        """The report with each objective's and each modality's share of the weighted loss and of the gradient's norm.

        An objective's gradient is taken at the backbone's output, a modality's at the weights of its embedder; a
        modality's loss is what the objectives report of it.
        """
        weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        squares = {name: report.pop(key) for name in self.weights if (key := f"grad_square/{name}") in report}
        read = [m for m in self.model.modalities if any(m in task.modalities for task in self.config.tasks.values())]
        of_modality: dict[str, Tensor] = {}
        for name, weight in weights.items():
            for modality in read:
                if (figure := report.get(f"loss/{name}/{modality}")) is not None:
                    of_modality[modality] = of_modality.get(modality, 0.0) + weight * figure.abs()
        embedders = {m: [w.grad for w in self.model.embedders[m].parameters() if w.requires_grad] for m in read}
        families = {
            "grad_share": {name: squares[name].sqrt() for name in weights if name in squares},
            "loss_share": {n: w * report[f"loss/{n}"].abs() for n, w in weights.items() if f"loss/{n}" in report},
            "modality_grad_share": {
                m: torch.stack([grad.square().sum() for grad in own if grad is not None]).sum().sqrt()
                for m, own in embedders.items()
                if own
            },
            "modality_loss_share": of_modality,
        }
        for family, parts in families.items():
            total = sum(parts.values())
            report |= {f"{family}/{name}": part / total for name, part in parts.items()}
        return report

    def _update(self, step: int, skipped: Tensor) -> None:
        began = self._now()
        for optimizer in self.optimizers:
            if self.device.type != "meta":
                # as torch.amp.GradScaler says it: the optimizer then changes nothing
                optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        self.optimizer_times = began, self._now()
        torch.manual_seed(mix(self.config.seed, step))
        objective: Any
        for objective in self.objectives.values():
            objective.after_update()
            objective.update_statistics(skipped, self.ranks.all_gather)
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
