"""Checkpoints that are written while the training goes on.

The tensors of the step that was asked for are copied to the host; a thread writes them, hashes them and publishes the
folder. Of several ranks each writes its share of the files, and the first one publishes.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..run_dir import checkpoint
from .layouts import whole
from .parallel import Ranks

Parts = list[tuple[checkpoint.Part, dict[str, Tensor]]]


class Saver:
    """Writes one checkpoint at a time. All ranks call the same methods in the same order, but for `failed`."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks.in_background()
        self.main = ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        folder: Path,
        tensors: dict[str, dict[str, Tensor]],
        data: dict[str, dict],
        files: dict[str, str],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write a checkpoint: `tensors` by file and name, sharded ones too; the rest as in `checkpoint.save`.

        after: called on the first rank when it is published. Waits for the one before. Raises UserError.
        """
        self.wait()
        with checkpoint.explained(folder):
            work = self.main.on_first(lambda: checkpoint.begin(folder))
        parts, own, ready = copy_to_host(tensors, self.main)

        def write() -> None:
            try:
                ready()
                self._write(work, folder, parts, own, data, files)
                if self.ranks.is_first:
                    after()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, work: Path, folder: Path, parts: list[checkpoint.Part], own: Parts, data, files) -> None:
        error, written = "", {}
        try:
            with checkpoint.explained(folder):
                for part, tensors in own:
                    written |= checkpoint.write_part(work, part, tensors)
        except UserError as caught:
            error = str(caught)
        own.clear()
        told = self.ranks.all_gather_objects((error, written))
        error = next((one for one, _ in told if one), "")
        if self.ranks.is_first and not error:
            try:
                index: dict[str, list[checkpoint.Part]] = {}
                for part in parts:
                    index.setdefault(part.name, []).append(part)
                listing = {file: about for _, one in told for file, about in one.items()}
                with checkpoint.explained(folder):
                    checkpoint.publish(work, folder, listing, index, data, files)
            except UserError as caught:
                error = str(caught)
        (error, *_) = self.ranks.all_gather_objects(error)
        if error:
            if self.ranks.is_first:
                shutil.rmtree(work, ignore_errors=True)
            raise UserError(error)

    def failed(self) -> str:
        """Why the last checkpoint could not be written, as far as it is known; empty where it could."""
        return "" if self._error is None else str(self._error) or type(self._error).__name__

    def wait(self) -> None:
        """Until the checkpoint is published. Raises UserError, or what else went wrong, where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, patience: float = 30) -> None:
        """End, with what is being written if that does not take longer: another rank may have gone."""
        if self._thread is not None:
            self._thread.join(patience if self.ranks.size > 1 else None)


def copy_to_host(
    tensors: dict[str, dict[str, Tensor]], ranks: Ranks
) -> tuple[list[checkpoint.Part], Parts, Callable[[], None]]:
    """All files, those that this rank writes with copies of their tensors, and what waits until these are there."""
    sizes = {name: {k: t.numel() * t.element_size() for k, t in own.items()} for name, own in tensors.items()}
    parts, own, event = checkpoint.plan(sizes), [], None
    for number, part in enumerate(parts):
        mine, copies = number % ranks.size == ranks.rank, {}
        for key in part.keys:
            tensor = whole(tensors[part.name][key])  # of a sharded one all ranks get all rows, one after the other
            if mine:
                copies[key] = _copy(tensor)
        if mine:
            own.append((part, copies))
    if any(tensor.is_cuda for values in tensors.values() for tensor in values.values()):
        event = torch.cuda.Event()
        event.record()
    return parts, own, event.synchronize if event is not None else lambda: None


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
