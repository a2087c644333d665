"""RUN/evaluations.json: what was measured of a run, by the name of the evaluation, for reports, cards and comparisons.

Each entry is `{"on": [shards], "step": int, "seed": int, "figures": {name: figure}, "notes": [text]}`; a figure is what
`evals.metrics.estimate` makes. A measurement replaces the earlier one of its name.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from ..corpus.storage import write_atomic
from ..errors import UserError
from . import checkpoint, trust

FILE, LOCK = "evaluations.json", ".evaluations.lock"


def read(run: str | Path) -> dict[str, dict]:
    """The entries by name; empty where there is no file. Raises UserError where it is not what `write` wrote."""
    path = Path(run) / FILE
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and evaluate again") from None
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise UserError(f"{path}: is not a map of evaluations; delete it and evaluate again")
    return entries


def _is_entry(entry) -> bool:
    figures = entry.get("figures") if isinstance(entry, dict) else None
    return isinstance(figures, dict) and all(
        isinstance(figure, dict) and {"value", "low", "high"} <= figure.keys() for figure in figures.values()
    )


def write(run: str | Path, name: str, entry: dict) -> None:
    """Add an entry, or replace that of the same name. Raises OSError where the folder cannot be written."""
    with open(Path(run) / LOCK, "w") as lock:  # several evaluations of a run may end at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = read(run) | {name: entry}
        write_atomic(Path(run) / FILE, json.dumps(entries, indent=1).encode())


def keep(folder: Path, name: str, entry: dict) -> str:
    """`write` for the run of the checkpoint `folder`, whose step the entry gets, where the run is the user's own.

    Returns why nothing was written, which is no error; empty where it was.
    """
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if not trust.is_own(folder, checkpoint.MANIFEST):
        return f"{run} was not trained here by you: the figures are not kept in it"
    try:
        write(run, name, {"step": checkpoint.read_data(folder, "state")["step"], **entry})
    except (OSError, UserError) as error:
        return f"the figures are not kept: {error}"
    return ""
