"""What learns: the model, the objectives, their averaged weights and the optimizers; one update at a time."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import objectives
from ..backbone import Backbone
from ..batch import Batch
from ..errors import UserError
from ..model import Model, check_weights, load_weights
from ..run_dir import checkpoint
from ..stream.mixture import mix
from ..stream.tasks import loss_weights
from . import ema, optim, strict
from .compiled import Compiled
from .config import TrainConfig
from .cpu import keep_freed_memory
from .grad_cache import Alone, Layout, Step, forward_backward
from .layouts import Replicated, Sharded, fill, like, local, make_mesh, own_rows, shard_averages, whole
from .learner import Learner
from .muon import Muon, orthogonalize_all, orthogonalize_each
from .owners import RowsOfMatrices, WholeMatrices
from .parallel import ALONE, Ranks
from .precision import set_precision
from .setup import init_weights


class TrainStep:
    """Built of a config, from nothing or from a checkpoint. Raises UserError where no model can be built of it.

    Several ranks hold it whole or in shards, as `config.parallel` says.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, ranks: Ranks = ALONE, from_checkpoint: Path | None = None
    ):
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.device, self.ranks = config, device, ranks
        self.weights = loss_weights(config.tasks)
        self.said: list[str] = []  # what `init` took, in lines
        self.spare: Batch | None = None
        self.mesh = make_mesh(config.parallel, ranks, device) if self._is_sharded() else None
        whole = None if self.mesh and (from_checkpoint or not ranks.is_first) else self._build(not from_checkpoint)
        self.trained: Learner = whole if whole and self.mesh is None else self._skeleton()
        self._freeze(config.trainable)
        self.model: Any = self.trained["model"]
        self.objectives: Any = self.trained["objectives"]
        averages = self._skeleton() if self.mesh else self._learner(self.device)
        self._averages = nn.ModuleDict(dict(averages.named_children())).requires_grad_(False).eval()
        self._behind = False  # whether the averages are to be copied before they are read; see `ema`
        for module in self.trained.modules():
            if isinstance(module, Backbone):
                module.checkpointing = config.activation_checkpointing
        set_precision(self.model, config.precision, device)
        self.compiled = Compiled()
        if config.compile:
            self.compiled.add(self.model, self.objectives)
        self.layout = self._lay_out()
        if self.mesh is not None:
            self._receive(whole)
        self._copy_to_averages()
        self._prepare_updates()
        if from_checkpoint:
            self.load(from_checkpoint)

    @property
    def ema(self) -> nn.ModuleDict:
        """The averaged model and objectives. With `ema_decay: 0` they are the weights as they are, copied as needed."""
        if self._behind:
            self._copy_to_averages()
        return self._averages

    def _is_sharded(self) -> bool:
        return self.ranks.size > 1 and self.config.parallel.kind != "ddp"

    def _build(self, begin: bool) -> Learner:
        """The whole learner on the device, or for shards on the CPU; `begin`: with the weights of `config.init`."""
        torch.manual_seed(self.config.seed)
        learner = self._learner(torch.device("cpu") if self.mesh else self.device)
        if begin and self.config.init:
            self.said = init_weights(learner, self.config.init)
        return learner

    def _learner(self, device: torch.device) -> Learner:
        """A new learner. Raises UserError."""
        tasks = self.config.tasks
        try:
            with torch.device(device if device.type == "meta" else "cpu"):  # the same start on every device
                model = Model(self.config.model)
                modules = objectives.build(
                    {name: task.objectives for name, task in tasks.items()},
                    {name: task.modalities for name, task in tasks.items()},
                    model,
                )
            return Learner(model.to(device), modules.to(device), self.config.precision)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"{self.config.run_dir}: no model can be built of this config: {said}") from None

    def _skeleton(self) -> Learner:
        """A learner without memory. Raises UserError."""
        meta = torch.device("meta")
        try:
            return self._learner(meta)
        except UserError:  # a module reads numbers back while it is built, as a codec's quantizer does
            return self._learner(torch.device("cpu")).to(meta)

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

    def _lay_out(self) -> Layout:
        if self.mesh is not None:
            most = -(-self.config.microbatches // self.ranks.size)
            layout = Sharded(self.trained, self.mesh, most, self.config.strict_numerics)
            precision = "float32" if self.config.strict_numerics else self.config.precision
            shard_averages(self._averages, self.mesh, precision)
            return layout
        alone = self.ranks.size == 1 or self.config.strict_numerics  # strict sums are not DDP's
        return Alone(self.trained) if alone else Replicated(self.trained)

    def _receive(self, whole: Learner | None) -> None:
        """The shards, on the device, of what the first rank holds whole; without it their memory alone."""
        self.trained.to_empty(device=self.device)
        self.ema.to_empty(device=self.device)
        self._make_buffers(whole)
        if self.ranks.on_first(lambda: whole is not None):
            tensors = whole.state_dict() if whole is not None else {}
            fill(self.trained, lambda name, rows, like: self._broadcast(tensors.get(name), like)[rows])

    @torch.no_grad()
    def _make_buffers(self, whole: Learner | None) -> None:
        """The buffers that are in no checkpoint, such as tables of constants."""
        stored = self.trained.state_dict().keys()
        if {name for name, _ in self.trained.named_buffers()} <= stored:
            return
        made = dict((whole or self._learner(torch.device("cpu"))).named_buffers())
        for module in (self.trained, self.ema):
            for name, buffer in module.named_buffers():
                if name not in stored:
                    buffer.copy_(made[name])

    def _broadcast(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The first rank's tensor, on all ranks, of the shape of `like`."""
        received = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if tensor is not None:
            received.copy_(tensor)
        dist.broadcast(received, 0)
        return received

    @torch.no_grad()
    def _copy_to_averages(self) -> None:
        own, self._behind = self.trained.state_dict(), False
        for name, tensor in self._averages.state_dict().items():
            local(tensor).copy_(local(own[name]))

    def _prepare_updates(self) -> None:
        """The optimizers, and gradients of zero: what a step does not touch has a zero gradient, not none."""
        named = [(name, weight) for name, weight in self.trained.named_parameters() if weight.requires_grad]
        self.parameters = [weight for _, weight in named]
        rows = [(name, weight, local(weight)) for name, weight in named]
        self.held = {weight: own for _, weight, own in rows if own.numel()}
        self.names = {name: own for name, weight, own in rows if own.numel()}
        self.optimizers = optim.build(
            self.config.optim, self.trained, self.model.backbone, self.held, self._share_out_matrices(),
            fused=not self.config.strict_numerics,
        )  # fmt: skip
        if self.mesh is None:
            for weight in self.parameters:
                weight.grad = torch.zeros_like(weight)

    def _share_out_matrices(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """How the ranks share out Muon's matrices; see `owners`."""
        work = orthogonalize_each if self.config.strict_numerics else orthogonalize_all
        if self.mesh is not None:
            weights = self._muon_matrices()
            group, held = self.mesh.get_group("shard"), [w in self.held for w in weights]
            return RowsOfMatrices([w.shape for w in weights], held, group, self.device, work)
        return work if self.ranks.size == 1 or self.config.strict_numerics else WholeMatrices()

    def _muon_matrices(self) -> list[nn.Parameter]:
        if self.config.optim.name != "muon":
            return []
        return [w for w in self.model.backbone.blocks.parameters() if w.requires_grad and w.ndim == 2]

    def _files(self) -> dict[str, nn.Module]:
        """What a checkpoint holds of the modules, by file."""
        return {
            "model": self.model,
            "objectives": self.objectives,
            "ema": self.ema["model"],
            "ema_objectives": self.ema["objectives"],
        }

    def load(self, folder: Path) -> None:
        """Weights, averages and moments of a checkpoint, of shards only this rank's rows. Raises UserError."""
        for name, module in self._files().items():
            if self.mesh is None:
                tensors = checkpoint.read_tensors(folder, name)
                _check_types(module, tensors, folder)
                load_weights(module, tensors, folder)
            else:
                self._load_rows(module, folder, name)
        if self.mesh is None:
            state = checkpoint.read_tensors(folder, "optimizer")
        else:
            state = self._rows_of_state(checkpoint.Tensors(folder, "optimizer"))
        optim.load_optimizer_state(self.optimizers, self, state)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank updates: its rows of each parameter that learns, where it has any."""
        return iter(self.names.items())

    def _load_rows(self, module: nn.Module, folder: Path, name: str) -> None:
        stored = checkpoint.Tensors(folder, name)
        check_weights(module, stored.shapes, folder)

        def read(key: str, rows: slice | EllipsisType, tensor: Tensor) -> Tensor:
            own = stored.rows(key, rows)
            _check_type(key, own, tensor, folder)
            return own

        fill(module, read)

    def _rows_of_state(self, stored: checkpoint.Tensors) -> dict[str, Tensor]:
        """The state that a checkpoint holds of this rank's rows; what it has no rows of is left out."""
        weights, state = dict(self.trained.named_parameters()), {}
        for key, shape in stored.shapes.items():
            weight = weights.get(key.rpartition("/")[0])
            if weight is None or not weight.requires_grad:
                state[key] = torch.zeros(0)  # of nothing that learns here, which is said
            elif weight in self.held:
                state[key] = stored.rows(key, own_rows(weight) if shape == weight.shape else ...)
        return state

    def __call__(self, step: int, batches: list[Batch], measure: bool = False) -> dict[str, Tensor]:
        """Update the weights by this rank's microbatches, and the others'.

        Returns, on the device, losses and accuracies by name, the gradient's norm, and `skipped`: 1 where loss or
        gradient were not finite and weights and moments are left as they were. With `measure` also the shares of
        `guards.SHARES`. Nothing here waits for the device.
        """
        optim.set_lr(self.optimizers, optim.lr_factor(self.config.optim, step, self.config.steps))
        torch.manual_seed(mix(self.config.seed, step))
        batches = [batch.to(self.device) for batch in batches]
        report = self.compiled.time(lambda: self._gradients(batches, measure))
        if measure:
            report = self._with_shares(report)
        grad_norm = self._clip()
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
        families = {
            "grad_share": {name: squares[name].sqrt() for name in weights if name in squares},
            "loss_share": {n: w * report[f"loss/{n}"].abs() for n, w in weights.items() if f"loss/{n}" in report},
            "modality_grad_share": self._embedder_norms(read),
            "modality_loss_share": of_modality,
        }
        for family, parts in families.items():
            total = sum(parts.values())
            report |= {f"{family}/{name}": part / total for name, part in parts.items()}
        return report

    def _embedder_norms(self, modalities: list[str]) -> dict[str, Tensor]:
        """The norm of the gradient of each modality's embedder, of those that learn."""
        weights = {m: [w for w in self.model.embedders[m].parameters() if w.requires_grad] for m in modalities}
        weights = {modality: own for modality, own in weights.items() if own}
        zero = torch.zeros((), device=self.device)
        grads = {m: [self.held[w].grad for w in own if w in self.held] for m, own in weights.items()}
        squares = {m: sum([g.square().sum() for g in own if g is not None], zero) for m, own in grads.items()}
        if self.mesh is not None and squares:
            total = torch.stack(list(squares.values()))
            dist.all_reduce(total, group=self.mesh.get_group("shard"))
            squares = dict(zip(squares, total.unbind(), strict=True))
        return {modality: square.sqrt() for modality, square in squares.items()}

    def _gradients(self, batches: list[Batch], measure: bool) -> dict[str, Tensor]:
        """Set the gradients of all that this rank updates, summed over the step; the report of the whole step."""
        first = self.ranks.rank * self.config.microbatches // self.ranks.size
        asked = any(objective.teacher_layers for objective in self.objectives.values())
        teacher: Any = self.ema["model"] if asked else None
        if self.mesh is not None:
            for own in self.held.values():  # the rows' gradients, which `zero_grad` does not know
                own.grad = None
        if self.config.strict_numerics:
            self.trained.zero_grad()
            step = Step(self.layout, self.weights, batches, self.ranks, teacher, measure, first, self._spare(batches))
            report, gradients = strict.forward_backward(step)
            self.strict_norm = optim.total_norm(gradients)
            if isinstance(self.layout, Sharded):
                self.layout.reshard()
            for weight, gradient in zip(self.parameters, gradients, strict=True):
                if weight in self.held:
                    self.held[weight].grad = gradient[own_rows(weight)]
            return report
        # DDP's gradients are views of its buckets; elsewhere a first gradient is kept as it is, which spares a pass
        self.trained.zero_grad(set_to_none=not isinstance(self.layout, Replicated))
        report = forward_backward(
            self.model, self.objectives, self.weights, batches, self.config.precision, self.ranks, teacher, measure,
            self.layout, first, self._spare(batches),
        )  # fmt: skip
        if self.mesh is None:
            for weight in self.parameters:  # what a step does not touch has a zero gradient, not none
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        if isinstance(self.layout, Sharded):
            self.ranks.all_reduce([weight.grad for weight in self.layout.numbers() if weight.grad is not None])
            for weight, own in self.held.items():
                own.grad = None if weight.grad is None else local(weight.grad)
        return self.ranks.sum_by_name(report, self.device)

    def _spare(self, batches: list[Batch]) -> Batch | None:
        """What a rank reads that has no microbatch left, or none at all, while others have. Raises UserError."""
        if self.ranks.size > 1 and self.spare is None:
            if not batches:
                raise UserError("this rank's samples of its first step are all lost: look into quarantine.jsonl")
            self.spare = batches[0].clone()  # what was read ahead lies in buffers that go round
        return self.spare

    def _clip(self) -> Tensor:
        """Scale the gradients down to `grad_clip`, and return the norm that they had."""
        limit = self.config.optim.grad_clip or math.inf
        if self.config.strict_numerics:
            norm = self.strict_norm
        elif self.mesh is None:
            norm = optim.total_norm([weight.grad for weight in self.parameters if weight.grad is not None])
            if self.device.type == "cpu" and float(norm) <= limit:  # read back at no cost there, and a pass is spared
                return norm
        else:
            numbers = [own.grad for w, own in self.held.items() if not w.ndim and own.grad is not None]
            others = [own.grad for w, own in self.held.items() if w.ndim and own.grad is not None]
            norm = torch.zeros((), device=self.device) + optim.total_norm(others).square()
            dist.all_reduce(norm, group=self.mesh.get_group("shard"))
            norm = (norm + optim.total_norm(numbers).to(self.device).square()).sqrt()
        nn.utils.clip_grads_with_norm_(list(self.held.values()), limit, norm)
        return norm

    def _update(self, step: int, skipped: Tensor) -> None:
        began = self._now()
        is_strict = self.config.strict_numerics
        leave_out = is_strict and bool(skipped)  # what is not fused must be told by the host
        for optimizer in [] if leave_out else self.optimizers:
            if self.device.type != "meta" and not is_strict:
                # as torch.amp.GradScaler says it: the optimizer then changes nothing
                optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        self.optimizer_times = began, self._now()
        torch.manual_seed(mix(self.config.seed, step))
        objective: Any
        for objective in self.objectives.values():
            objective.after_update()
            objective.update_statistics(skipped, self.ranks.all_gather)
        if not self.config.ema_decay:
            self._behind = True
        elif not leave_out:
            ema.update(self._averages, self.trained, step, self.config.ema_decay, skipped, fused=not is_strict)

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
        """What a checkpoint holds of it, by file; of shards sharded tensors."""
        tensors = {name: module.state_dict() for name, module in self._files().items()}
        state = optim.optimizer_state(self.optimizers, self)
        return {**tensors, "optimizer": state if self.mesh is None else self._sharded_state(state)}

    def _sharded_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizers' state of all parameters, of which this rank has rows of some."""
        counter = next((value for key, value in state.items() if key.endswith("/step")), torch.zeros(()))
        counter = torch.tensor(max(self.ranks.all_gather_objects(float(counter))))  # some ranks may update nothing
        muon, found = set(self._muon_matrices()), {}
        for name, weight in self.trained.named_parameters():
            if weight.requires_grad:
                for key in optim.STATE[Muon if weight in muon else torch.optim.AdamW]:
                    empty = counter if key == "step" else torch.zeros_like(local(weight))
                    rows = state.get(f"{name}/{key}", empty)
                    found[f"{name}/{key}"] = rows if key == "step" else like(rows, weight)
        return found

    def averaged(self) -> nn.ModuleDict:
        """The averaged model and objectives, to be looked at by the first rank; all ranks ask at once.

        Shards come together on the first rank alone.
        """
        if self.mesh is None:
            return self.ema
        together = self._learner(self.device) if self.ranks.is_first else None
        own = together.state_dict() if together else {}
        for name, tensor in self.ema.state_dict().items():
            rows = whole(tensor)
            if together:
                own[name].copy_(rows)
        return nn.ModuleDict(dict(together.named_children())).requires_grad_(False).eval() if together else self.ema


def _check_types(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    for name, own in module.state_dict().items():
        if name in tensors:
            _check_type(name, tensors[name], own, folder)


def _check_type(name: str, stored: Tensor, own: Tensor, folder: Path) -> None:
    """Raises UserError where loading would turn a tensor into one of another type: the run would not be the same."""
    if stored.dtype != own.dtype:
        raise UserError(f"{folder}: {name} is of type {stored.dtype}, not {own.dtype}")
