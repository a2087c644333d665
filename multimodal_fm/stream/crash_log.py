"""Which samples are being read right now, so that a decoder that ends the program can be told by its sample."""

from __future__ import annotations

import collections
import itertools
import json
import mmap
import threading
from pathlib import Path

import torch

from ..corpus.shards import Corpus


class Journal:
    """Which samples are being read right now, so that a decoder that ends the program can be told by its sample.

    A file with a slot for each reader, mapped into memory; writing to it outlives the process. `faulthandler` says
    beside it whether the program was ended by a fault of its own or by somebody else.
    """

    SLOT = 1024

    def __init__(self, file: Path, readers: int):
        self.file, self.trace, self.rows = file, file.with_suffix(".fault"), file.parent / "crashes.jsonl"
        self.times: collections.Counter[str] = collections.Counter()
        self.told: list[str] = []  # lines for a person
        if self.rows.exists():
            self.times.update(row["sample"] for row in map(json.loads, self.rows.read_bytes().splitlines()))
        if self.trace.exists() and self.trace.stat().st_size:
            self.blame(self._slots())
            self.told.append(f"the run before was ended by a fault while it read: {self.named(self._slots())}")
        size = self.SLOT * max(readers, 1)
        self.file.unlink(missing_ok=True)  # what a killed run has left may still write to the file it knows
        self.file.write_bytes(bytes(size))
        self._opened = open(self.file, "r+b")
        self._map = mmap.mmap(self._opened.fileno(), size)
        self._local = threading.local()
        self._next = itertools.count()
        self._readers = max(readers, 1)

    def watch(self) -> None:
        """Have faults of this process written down."""
        import faulthandler

        self._trace = open(self.trace, "w")
        faulthandler.enable(self._trace)

    def close(self) -> None:
        import faulthandler

        if faulthandler.is_enabled() and hasattr(self, "_trace"):
            faulthandler.disable()
            self._trace.close()
        self._map.close()
        self._opened.close()
        for file in (self.file, self.trace):
            file.unlink(missing_ok=True)

    def _place(self) -> int:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            return info.id * self.SLOT
        if not hasattr(self._local, "slot"):
            self._local.slot = next(self._next) % self._readers
        return self._local.slot * self.SLOT

    def note(self, corpus: Corpus, index: int) -> None:
        """This thread, or worker process, begins to read a sample."""
        text = _sample(corpus, index).encode()
        place = self._place()
        self._map[place : place + len(text) + 1] = text + b"\0"

    def clear(self) -> None:
        self._map[self._place()] = 0

    def _slots(self, which: int | None = None) -> list[str]:
        data = self.file.read_bytes() if self.file.exists() else b""
        texts = [
            data[i : i + self.SLOT].split(b"\0", 1)[0].decode(errors="replace") for i in range(0, len(data), self.SLOT)
        ]
        return [text for i, text in enumerate(texts) if text and which in (None, i)]

    @staticmethod
    def named(samples: list[str]) -> str:
        return ", ".join(sample.replace("\t", " ") for sample in samples) or "no sample that could be told"

    def blame(self, samples: list[str]) -> None:
        """Write down that the program ended while these were read."""
        with open(self.rows, "a", encoding="utf-8") as file:
            for sample in samples:
                self.times[sample] += 1
                file.write(json.dumps({"sample": sample, "times": self.times[sample]}) + "\n")

    def blame_worker(self, worker: int) -> list[str]:
        samples = self._slots(worker)
        self.blame(samples)
        return samples

    def blocks(self, corpus: Corpus, index: int) -> bool:
        """Whether reading the sample ended the program twice."""
        return bool(self.times) and self.times[_sample(corpus, index)] >= 2


def _sample(corpus: Corpus, index: int) -> str:
    """The sample's full name, or of a very long one the end, which tells it from others best."""
    name = f"{corpus.name}\t{corpus.shard(index)}\t{corpus.key(index)}"
    return name.encode()[1 - Journal.SLOT :].decode(errors="ignore")
