"""One step on the meta device: what it would hold in memory and how much it would compute, with nothing allocated.

Tensors of the meta device have shapes but no values, so that a step of a model of any size runs in seconds. The trace
sees every tensor that Python code, autograd's graph and the backward pass make, and when each is freed; FLOPs are those
that `torch.utils.flop_counter` counts.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..batch import Batch
from . import parallel
from .config import TrainConfig
from .train_step import TrainStep

META = torch.device("meta")
T = TypeVar("T")
PRODUCTS = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "conv1d",
    "conv2d",
}
"""What autocast computes in half precision, by the functions' names, beside attention."""
WIDE = {"layer_norm", "softmax", "log_softmax", "logsumexp", "cross_entropy", "mse_loss", "smooth_l1_loss", "normalize"}
WIDE |= {"exp", "log", "pow", "sum", "norm", "cumsum", "prod"}
"""What it computes in float32 (PyTorch's list for CUDA)."""
IS_CUDA: Any = Tensor.is_cuda.__get__  # pyright: ignore[reportAttributeAccessIssue]
FUSED = "fused"  # the phase of an update that is one kernel on the real device, and holds nothing
ATTENTION = "scaled_dot_product_attention"


@dataclass
class Trace:
    """What one step of one rank would do. Memory in bytes, work in floating-point operations (a product and a sum are
    two)."""

    parameters: dict[str, int]  # by part of the model, and each objective's own
    trainable: int  # of them learn
    held: dict[str, int]  # weights, moments, average: bytes that stay from step to step
    peak: dict[str, int]  # gradients and what else by phase: bytes when forward and backward hold most beside these
    update: dict[str, int]  # the same of the optimizers
    flops: int  # of forward and backward, what activation checkpointing does again among them
    update_flops: int  # of the optimizers
    files: dict[str, int]  # bytes of the tensors of a checkpoint, by file
    block: int  # parameters of the largest block of the backbone


class _Attention(torch.autograd.Function):
    """What a fused kernel of attention holds: its inputs, its result and one number a row; no table of weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, rows, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Watch(TorchFunctionMode):
    """Follows the storages of the tensors that appear while it is active, by the phase in which they do.

    half: products are in bfloat16, as autocast would have them: it does not exist on the meta device. gpu: optimizers
    are told that they work on a GPU, where some of them compute otherwise.
    """

    def __init__(self, half: bool, gpu: bool = False):
        super().__init__()
        self.half, self.gpu, self.phase = half, gpu, "batch"
        self.live: Counter[str] = Counter()  # bytes by phase
        self.most, self.snapshot = 0, {}
        self.flops = 0  # of attention, which no counter of PyTorch's sees here
        self.held: dict[int, Any] = {}  # storages that are counted elsewhere
        self._known: dict[int, tuple[Any, str]] = {}  # storages, and under what they are counted

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out: they stay from step to step."""
        self.held |= {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    def restart(self) -> dict[str, int]:
        """The peak so far, by phase; from now on that of what follows."""
        peak = {phase: size for phase, size in self.snapshot.items() if size}
        self.most, self.snapshot = sum(self.live.values()), dict(self.live)
        return peak

    def see(self, value: Any, phase: str = "") -> None:
        """Count what these tensors stand in, once each, until it is freed, under the phase."""
        if isinstance(value, (tuple, list)):
            for one in value:
                self.see(one, phase)
        elif isinstance(value, Tensor) and value.device == META and self.phase != FUSED:
            storage, phase = value.untyped_storage(), phase or self.phase
            key, size = id(storage), storage.nbytes()
            if key in self._known or key in self.held or not size:
                return

            def freed(_) -> None:
                self.live[self._known.pop(key)[1]] -= size

            self._known[key] = weakref.ref(storage, freed), phase
            self.live[phase] += size
            if (total := sum(self.live.values())) > self.most:
                self.most, self.snapshot = total, dict(self.live)

    def call_gradients(self, tensors: Iterable[Any]) -> None:
        """Count these as gradients from now on."""
        for tensor in tensors:
            key = id(tensor.untyped_storage()) if isinstance(tensor, Tensor) else None
            if key in self._known:
                reference, phase = self._known[key]
                size = tensor.untyped_storage().nbytes()
                self.live[phase] -= size
                self.live["gradients"] += size
                self._known[key] = reference, "gradients"

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.gpu and self.phase == "update" and func == IS_CUDA:
            return True
        if name == "backward" or func is torch.autograd.grad:
            return self._backward(func, args, kwargs)
        if self.half and self.phase != "update":
            args, kwargs = self._autocast(name, args, kwargs)
        if name == ATTENTION and args[0].device == META:
            q, k, v = args[:3]
            products = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
            products = products // 2 if kwargs.get("is_causal") else products
            self.flops += products * (3 if torch.is_grad_enabled() and q.requires_grad else 1)
            out = _Attention.apply(q, k, v)
        else:
            out = func(*args, **kwargs)
        self.see(out)
        return out

    def _backward(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The backward pass. PyTorch runs it with this mode off: it is on at each node, for what Python does there."""
        before, self.phase = self.phase, "backward"

        def enter(*_) -> None:
            self.__enter__()

        def leave(grad_inputs: tuple, grad_outputs: tuple) -> None:
            self.__exit__(None, None, None)
            self.see(grad_outputs)
            self.see(grad_inputs)

        def accumulated(grad_inputs: tuple, grad_outputs: tuple) -> None:
            leave(grad_inputs, grad_outputs)
            self.call_gradients(grad_outputs)

        handles, weights = [], []
        for node in _graph([one.grad_fn for one in _flatten(args[0]) if one.grad_fn is not None]):
            accumulates = hasattr(node, "variable")
            weights += [node.variable] if accumulates else []
            hook = accumulated if accumulates else leave
            handles += [node.register_prehook(enter), node.register_hook(hook)]
        try:
            return func(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            self.see(gradients)
            self.call_gradients(gradients)
            self.phase = before

    def _autocast(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments as autocast would give them."""
        if name in PRODUCTS or name == ATTENTION:
            return self._to_half(args), {key: self._to_half(value) for key, value in kwargs.items()}
        if name in WIDE:
            return tuple(one.float() if _is_half(one) else one for one in args), kwargs
        return args, kwargs

    def _to_half(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._to_half, value))
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        half = value.to(torch.bfloat16)
        self.see(half)
        return half


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _graph(roots: list[Any]) -> Iterator[Any]:
    """All nodes of autograd's graph behind these."""
    seen, waiting = set(), roots
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [one for one, _ in node.next_functions]


def _save(watch: _Watch):
    """What autograd keeps of operations that have no Python name is seen when it is kept."""

    def pack(tensor: Tensor) -> Tensor:
        watch.see(tensor)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def trace(config: TrainConfig, batches: list[Batch], gpu: bool = False) -> Trace:
    """What a step with these microbatches, those of one rank, would do, on a GPU or on a CPU. Raises UserError."""
    step = TrainStep(dataclasses.replace(config, compile=False, parallel=parallel.Config()), META)
    half = config.precision != "float32"
    counter, first = FlopCounterMode(display=False), _Watch(half, gpu)
    with counter:  # it holds on to what is computed again, so that memory is looked at in another step
        work = _run(step, 0, batches, first, lambda: counter.get_total_flops() + first.flops)
    watch = _Watch(half, gpu)
    watch.hold([tensor for name, own in _held(step).items() if name != "gradients" for tensor in own])
    watch.see([weight.grad for weight in step.parameters], "gradients")
    peaks = _run(step, 1, batches, watch, watch.restart)
    if config.activation_checkpointing == "selective":  # PyTorch does not see that attention's results are kept
        backbone, longest = config.model.backbone, max(len(batch.tokens) for batch in batches)
        kept = longest * backbone.depth * (backbone.width * (2 if half else 4) + 4 * backbone.num_heads)
        peaks[0]["activations"] = peaks[0].get("activations", 0) + kept
    held = held_bytes(step)
    del held["gradients"]
    return Trace(
        _count_parameters(step),
        sum(weight.numel() for weight in step.parameters),
        held,
        *peaks,
        work[0],
        work[1] - work[0],
        {name: _bytes(tensors.values()) for name, tensors in step.tensors().items()},
        max(sum(weight.numel() for weight in block.parameters()) for block in step.model.backbone.blocks),
    )


def _run(step: TrainStep, number: int, batches: list[Batch], watch: _Watch, look: Callable[[], T]) -> tuple[T, T]:
    """A step that is watched; what `look` returns between backward and update, and at the end."""
    found: list[T] = []

    def begin_update(optimizer, args, kwargs) -> None:
        if not found:
            found.append(look())
        watch.phase = FUSED if isinstance(optimizer, torch.optim.AdamW) else "update"

    def begin_model(*_) -> None:
        watch.phase = "activations"

    def end_model(*_) -> None:
        watch.phase = "losses"

    hooks = [
        step.model.register_forward_pre_hook(begin_model),
        step.model.register_forward_hook(end_model),
        register_optimizer_step_pre_hook(begin_update),
    ]
    try:
        with warnings.catch_warnings(), _save(watch), watch:
            warnings.simplefilter("ignore")  # of kernels that the real device has
            step(number, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0], look()


def held_bytes(step: TrainStep) -> dict[str, int]:
    """What a train step holds from one update to the next: bytes of weights, gradients, moments and the average."""
    return {name: _bytes(tensors) for name, tensors in _held(step).items()}


def _held(step: TrainStep) -> dict[str, list[Tensor]]:
    states = [state for optimizer in step.optimizers for state in optimizer.state.values()]
    return {
        "weights": [*step.trained.parameters(), *step.trained.buffers()],
        "gradients": [weight.grad for weight in step.parameters if weight.grad is not None],
        "moments": [value for state in states for value in state.values() if isinstance(value, Tensor)],
        "average": [*step.ema.parameters(), *step.ema.buffers()],
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of these tensors, once each."""
    storages = {id(storage): storage for storage in (one.untyped_storage() for one in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _count_parameters(step: TrainStep) -> dict[str, int]:
    """The parameters by part: each modality's embedder, backbone, heads, objectives."""
    counts: Counter[str] = Counter()
    for name, weight in step.trained.named_parameters():
        owner, part, *rest = name.split(".")
        if owner == "objectives":
            counts[f"objectives.{part}"] += weight.numel()
        else:
            counts[f"{part}.{rest[0]}" if part in ("embedders", "heads") else part] += weight.numel()
    return dict(counts)
