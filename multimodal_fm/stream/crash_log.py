"""Records which sample each worker process is decoding, so that a crash can be attributed to a sample."""

from __future__ import annotations

import collections
import faulthandler
import json
import mmap
from pathlib import Path

from ..corpus.shards import Corpus
from ..run_dir.records import read_jsonl

SLOT_BYTES = 1024


class CrashLog:
    """Records which sample each worker process is decoding, and which samples have crashed a process.

    `file` has a slot for each worker and is mapped into memory: what is written there outlives the process. Crashes are
    kept in `crashes.jsonl` beside it. With num_workers=0 the main process decodes, and the next start of the run
    attributes its crash: Python's fault handler writes to a second file, so that a run that was killed blames none.

    Attributes:
        crash_counts: how many times each sample has crashed a process.
        messages: lines for the user about the previous run.
    """

    def __init__(self, file: Path, num_workers: int):
        self.file, self.fault_file, self.crashes_file = file, file.with_suffix(".fault"), file.parent / "crashes.jsonl"
        self.crash_counts: collections.Counter[str] = collections.Counter()
        self.messages: list[str] = []
        self.crash_counts.update(row["sample"] for row in read_jsonl(self.crashes_file) if "sample" in row)
        if self.fault_file.exists() and self.fault_file.stat().st_size and file.exists():
            names = self.format(self._record(file.read_bytes())) or "no sample"
            self.messages.append(f"the previous run crashed while it decoded {names}")
        file.unlink(missing_ok=True)  # a process of a killed run may still write to the old file
        file.write_bytes(bytes(SLOT_BYTES * max(num_workers, 1)))
        with open(file, "r+b") as opened:
            self._slots = mmap.mmap(opened.fileno(), 0)
        self._begin = 0
        self._fault_output = None
        if not num_workers:
            self._fault_output = open(self.fault_file, "w")
            faulthandler.enable(self._fault_output)

    def close(self) -> None:
        if self._fault_output:
            faulthandler.disable()
            self._fault_output.close()
        self._slots.close()
        self.file.unlink(missing_ok=True)
        self.fault_file.unlink(missing_ok=True)

    def use_slot(self, worker: int) -> None:
        """Called in a worker process: it writes to its own slot from now on."""
        self._begin = worker * SLOT_BYTES
        self.end()

    def begin(self, corpus: Corpus, index: int) -> None:
        """This process begins to decode a sample."""
        data = _sample_name(corpus, index).encode() + b"\0"
        self._slots[self._begin : self._begin + len(data)] = data

    def end(self) -> None:
        """This process is not decoding a sample."""
        self._slots[self._begin] = 0

    def record_crash(self, worker: int) -> list[str]:
        """Records that the worker crashed. Returns the sample that it was decoding, if any, in a list."""
        return self._record(self._slots[worker * SLOT_BYTES : (worker + 1) * SLOT_BYTES])

    def _record(self, slots: bytes) -> list[str]:
        names = (slots[i : i + SLOT_BYTES].partition(b"\0")[0] for i in range(0, len(slots), SLOT_BYTES))
        samples = [name.decode(errors="replace") for name in names if name]
        before = self.crashes_file.read_bytes() if self.crashes_file.exists() else b""
        with open(self.crashes_file, "a", encoding="utf-8") as file:
            file.write("\n" if before and not before.endswith(b"\n") else "")  # the last row was cut off
            for sample in samples:
                self.crash_counts[sample] += 1
                file.write(json.dumps({"sample": sample, "times": self.crash_counts[sample]}) + "\n")
        return samples

    def excludes(self, corpus: Corpus, index: int) -> bool:
        """Whether the sample is left out, since it has crashed a process twice."""
        return bool(self.crash_counts) and self.crash_counts[_sample_name(corpus, index)] >= 2

    @staticmethod
    def format(samples: list[str]) -> str:
        return ", ".join(sample.replace("\t", " ") for sample in samples)


def _sample_name(corpus: Corpus, index: int) -> str:
    """Source, shard and key; of a name that is longer than a slot the end, in which names differ most."""
    name = f"{corpus.name}\t{corpus.shard(index)}\t{corpus.key(index)}"
    return name.encode(errors="replace")[1 - SLOT_BYTES :].decode(errors="ignore")
