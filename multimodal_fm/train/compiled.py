"""`compile: true`: the backbone, the decoders, the embedders and the heads as torch.compile makes them.

Each part is compiled for a few fixed numbers of rows, up to which filler rounds, and not for shapes of any size: their
kernels are slower, and their guards are looked at in each step.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Experts, few_sizes
from ..heads import retrieval
from ..tokenizers.base import PredictIds

MOST_SIZES = 64  # for which a part is compiled; what comes after them runs as it is written


class Compiled:
    """The parts of a model and its objectives that are compiled; empty where nothing is.

    `seconds` is what the steps took in which something was compiled, `steps` how many they were.
    """

    def __init__(self):
        self.parts: list[Rows] = []
        self.backbones: set[tuple[int, int, bool]] = set()  # which of them, for how many rows, with gradients
        self.seconds, self.steps = 0.0, 0

    def add(self, model: nn.Module, objectives: nn.ModuleDict) -> None:
        """Compile what can be of both, in place; names of parameters stay. Nothing is compiled before its first use."""
        for module in (*model.modules(), *objectives.modules()):
            if isinstance(module, Backbone):
                module.compile(**_options())
                module.register_forward_pre_hook(self._note)
        for module in self._by_rows(model, objectives):
            self.parts.append(Rows(module.forward))
            module.forward = self.parts[-1]

    @staticmethod
    def _by_rows(model: Any, objectives: nn.ModuleDict) -> list[nn.Module]:
        """The modules whose rows do not depend on each other."""
        found = [*model.embedders.values(), *(h for h in model.heads.values() if isinstance(h, retrieval.Head))]
        for objective in objectives.values():
            predictors = getattr(objective, "predictors", {}).values()
            found += [one for one in predictors if not isinstance(one, PredictIds)]  # which is one product
        for module in (*model.modules(), *objectives.modules()):
            if isinstance(module, Experts):
                found += list(module.values())
        return found

    def _note(self, backbone: nn.Module, inputs: tuple) -> None:
        if backbone.training:
            self.backbones.add((id(backbone), few_sizes(len(inputs[0])), torch.is_grad_enabled()))

    def count_sizes(self) -> int:
        """For how many sizes of parts something was compiled so far."""
        return sum(len(part.sizes) for part in self.parts) + len(self.backbones)

    def time(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns. Where something was compiled in it, its seconds count."""
        before, began = self.count_sizes(), time.perf_counter()
        result = work()
        if self.count_sizes() > before:
            self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1
        return result


class Rows:
    """A function of tensors with the same number of rows, compiled for training; zeros fill them up to a few sizes."""

    def __init__(self, function: Callable[..., Tensor]):
        self.written = function
        self.compiled: Any = torch.compile(function, **_options())
        self.sizes: set[tuple[int, bool]] = set()

    def __call__(self, *tensors: Tensor) -> Tensor:
        count, module = len(tensors[0]), getattr(self.written, "__self__", None)
        if not count or not getattr(module, "training", True):
            return self.written(*tensors)
        size = few_sizes(count)
        self.sizes.add((size, torch.is_grad_enabled()))
        filled = [_fill(tensor, size - count) for tensor in tensors]
        return self.compiled(*filled).narrow(0, 0, count)


def _fill(tensor: Tensor, missing: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _options() -> dict[str, Any]:
    """No sizes that may vary; as many fixed ones as are needed, where this torch lets one say so."""
    known = inspect.signature(torch.compile).parameters
    return {"dynamic": False, **({"recompile_limit": MOST_SIZES} if "recompile_limit" in known else {})}
