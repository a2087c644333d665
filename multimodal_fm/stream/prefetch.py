"""Steps go to a GPU one ahead, on a stream of their own, while the step before is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..transfer import list_tensors
from .dataset import Step


@dataclass
class Prefetcher:
    """The same steps with their batches on the device. On a CPU they are handed on as they are."""

    steps: Iterable[Step]
    device: torch.device

    def __iter__(self) -> Iterator[Step]:
        return self._read_ahead() if self.device.type == "cuda" else iter(self.steps)

    def _read_ahead(self) -> Iterator[Step]:
        stream, ahead = torch.cuda.Stream(self.device), None
        for step in self.steps:
            with torch.cuda.stream(stream):
                moved = dataclasses.replace(step, batches=[batch.to(self.device) for batch in step.batches])
                ready = torch.cuda.Event()
                ready.record(stream)
            if ahead is not None:
                yield self._hand_over(*ahead)
            ahead = moved, ready
        if ahead is not None:
            yield self._hand_over(*ahead)

    def _hand_over(self, step: Step, ready: torch.cuda.Event) -> Step:
        """The step for the stream that computes, which waits for the copy; its memory is not used anew before that
        stream has read it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for batch in step.batches:
            for tensor in list_tensors(batch):
                tensor.record_stream(current)
        return step
