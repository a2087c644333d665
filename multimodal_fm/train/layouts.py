"""How a learner lies on several ranks: whole on each of them (DDP), or in shards (FSDP2).

Losses are sums over counts of the whole step, so gradients are summed over the ranks, never averaged.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .learner import Learner, Reading
from .parallel import Config, Ranks


class Replicated:
    """Every rank holds all. DDP sums the gradients bucket by bucket while the backward goes on."""

    def __init__(self, learner: Learner):
        self.learner = learner
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
        settings: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        self._wrapped = DistributedDataParallel(_Reaching(learner), **settings)
        self._wrapped.register_comm_hook(None, _sum)

    def turns(self, count: int) -> int:
        return max(count, 1)

    def turn(self, is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_last else self._wrapped.no_sync()

    def forward(self, *arguments) -> Reading:
        return self._wrapped(*arguments)


def _sum(state, bucket):  # DDP wants types here as they are, not as the text that they are in this file
    """DDP's hook that sums a bucket, where DDP itself averages."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class _Reaching(nn.Module):
    """A learner whose loss reaches every parameter that learns, as DDP asks of every backward."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner

    def forward(self, *arguments) -> Reading:
        total, *others = self.learner(*arguments)
        parameters = [weight for weight in self.learner.parameters() if weight.requires_grad]
        return (_Reach.apply(total, *parameters), *others)  # pyright: ignore[reportReturnType]


class _Reach(torch.autograd.Function):
    """The total as it is; the backward comes by all parameters, and adds nothing to their gradients."""

    @staticmethod
    def forward(ctx, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return total.view_as(total)

    @staticmethod
    def backward(ctx, *gradients) -> Any:
        return (gradients[0], *[None] * ctx.count)


class Sharded:
    """Each rank holds a shard of the rows of every parameter, of its gradient and of all that is kept for it.

    A block of the backbone is whole only while it is computed, and with a precision below float32 travels as bfloat16,
    in half the time and memory; its gradients are summed in float32. Everything else, which is read outside of the
    blocks, is whole while a step's gradients are made. Single numbers are kept whole. All ranks call the same modules
    at the same time, so a rank with fewer microbatches goes through as many as the others have.
    """

    def __init__(self, learner: Learner, mesh: DeviceMesh, most: int, keep_gradients: bool = False):
        """most: microbatches that a rank has at most. keep_gradients: leave them whole where the backward made them;
        then blocks travel in float32, since FSDP2 puts gradients of another type where it alone finds them."""
        self.learner, self.mesh, self._most = learner, mesh, most
        learner.in_step = True
        self._root: Any = _shard(learner, learner["model"], mesh, "float32" if keep_gradients else learner.precision)
        for module in _sharded_modules(learner):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if keep_gradients:
            self._root.set_reshard_after_backward(False)

    def numbers(self) -> list[nn.Parameter]:
        """The parameters that are kept whole, whose gradients FSDP2 does not sum."""
        return [weight for weight in self.learner.parameters() if not weight.ndim and weight.requires_grad]

    def turns(self, count: int) -> int:
        return max(count, self._most)

    @contextlib.contextmanager
    def turn(self, is_last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_is_last_backward(is_last)
        yield

    def reshard(self) -> None:
        """Let go of what is whole."""
        for module in _sharded_modules(self.learner):
            module.reshard()

    def forward(self, *arguments) -> Reading:
        reading = self.learner(*arguments)
        for weight in self.learner.parameters():  # what is whole now: all ranks add up the same gradients
            if weight.requires_grad and weight.grad is None and not isinstance(weight, DTensor):
                weight.grad = torch.zeros_like(weight)
        return reading


def _sharded_modules(module: nn.Module) -> list[Any]:
    return [one for one in module.modules() if isinstance(one, FSDPModule)]


def _shard(root: nn.Module, model: Any, mesh: DeviceMesh, precision: str, reshard: bool | None = None) -> Any:
    """Shard a module that holds `model`, and each of its blocks apart."""
    whole = {weight for weight in root.parameters() if not weight.ndim}
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.backbone.blocks:
        policy = MixedPrecisionPolicy() if precision == "float32" else half
        fully_shard(block, mesh=mesh, ignored_params=whole, mp_policy=policy)
    return fully_shard(root, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)


def make_mesh(config: Config, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """The ranks in a row, for hsdp in rows of `shard_size`: shards along a row, copies from row to row."""
    config.check(ranks.size)
    if config.kind == "hsdp":
        shape = (ranks.size // config.shard_size, config.shard_size)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))


def shard_averages(averages: nn.ModuleDict, mesh: DeviceMesh, precision: str) -> None:
    """Shard the averaged model and objectives as the learner; the model may be called, as a teacher is."""
    _shard(averages["model"], averages["model"], mesh, precision, reshard=True)
    for objective in averages["objectives"].children():
        whole = {weight for weight in objective.parameters() if not weight.ndim}
        fully_shard(objective, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


# --- what a rank holds of a tensor ---


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    return detached.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; of a sharded one all ranks must ask at once."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if isinstance(tensor, DTensor) else detached


def own_rows(tensor: Tensor) -> slice | EllipsisType:
    """Which rows of a tensor this rank holds; `...` is all of a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return ...
    mesh = tensor.device_mesh
    number, count = mesh.get_local_rank("shard"), mesh.size(-1)  # the last dimension is that of the shards
    rows = -(-tensor.shape[0] // count)
    return slice(min(number * rows, tensor.shape[0]), min((number + 1) * rows, tensor.shape[0]))


def like(rows: Tensor, parameter: Tensor) -> Tensor:
    """A rank's rows of something of a parameter's shape, as a tensor that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or rows.ndim != parameter.ndim:
        return rows
    own = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False, **own)


def shard_group(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """The ranks among which these parameters are sharded; None where they are whole."""
    for tensor in parameters:
        if isinstance(tensor, DTensor):
            return tensor.device_mesh.get_group("shard")
    return None


@torch.no_grad()
def fill(module: nn.Module, read: Callable[[str, slice | EllipsisType, Tensor], Tensor]) -> None:
    """Set each tensor of a module's state by name: `read(name, rows, tensor)` gives the rows that this rank holds."""
    for name, tensor in module.state_dict().items():
        local(tensor).copy_(read(name, own_rows(tensor), tensor))
