"""What a run said of each sample of a test set: `RUN/predictions-NAME.jsonl`, one object a sample.

`key` names the sample, `label` is what was right and `predicted` what the run said, `score` is 1 where it was right and
0 where not (or the sample's own score, such as an F1), and `confidence` is the probability that the run gave it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from ..corpus.storage import write_atomic
from ..errors import UserError

PREFIX = "predictions-"


def file_of(run: str | Path, name: str) -> Path:
    """Where the predictions on the evaluation `name` lie; what no file name should hold becomes `_`."""
    return Path(run) / f"{PREFIX}{re.sub(r'[^A-Za-z0-9._=,+-]+', '_', name).strip('_') or 'test'}.jsonl"


def write(run: str | Path, name: str, rows: Iterable[dict]) -> Path:
    """Write the predictions on the evaluation `name`, whole or not at all. Returns the file."""
    file = file_of(run, name)
    write_atomic(file, (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows))
    return file


def read(run: str | Path) -> dict[str, list[dict]]:
    """The predictions of a run by the name in their file's name; each row has a `key` and a finite `score`.

    Raises UserError where a file holds something else.
    """
    found = {}
    for file in sorted(Path(run).glob(f"{PREFIX}*.jsonl")):
        rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["key"], row["score"] = str(row["key"]), float(row["score"])
                if not math.isfinite(row["score"]):
                    raise ValueError("its score is no finite number")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: no prediction with a key and a score ({error})") from None
            rows.append(row)
        found[file.name.removeprefix(PREFIX).removesuffix(".jsonl")] = rows
    return found
