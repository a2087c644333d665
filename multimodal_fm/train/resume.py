"""What a checkpoint holds of a run, and what a run that goes on from it must have in common with it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from ..config import Config, to_data
from ..corpus.shards import Corpus
from ..errors import UserError
from ..run_dir import checkpoint
from ..stream.tasks import Origin

LOCK = ".lock"  # in a run's folder
MAY_CHANGE = (  # between a run and its resume
    *("run", "steps", "workers", "readers", "keep", "save_every", "evaluate", "device", "trace", "strict", "max_bad"),
)
MIXTURE = ("sources", "by", "temperature")  # of a task: a change begins a new phase of its stream


def start(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run. Raises UserError."""
    try:
        if resume and not (run.is_dir() and not checkpoint.steps(run)):
            whole = checkpoint.newest(run)
            for folder in checkpoint.steps(run):
                if folder > whole:  # damaged, and made again by the run that goes on
                    shutil.rmtree(folder)
            return whole
        if not resume and run.exists() and any(path.name != LOCK for path in run.iterdir()):
            raise UserError(f"{run} already holds a run: go on with --resume, or name another folder with run=FOLDER")
        return None  # a run that was stopped before its first checkpoint begins again
    except OSError as error:
        raise UserError(f"run={str(run)[:80]}: {error.strerror}") from None


@contextlib.contextmanager
def alone(run: Path):
    """While it lasts, no other process trains in the run's folder. Raises UserError where one does."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            mend = "wait for it, or name another folder with run=FOLDER"
            raise UserError(f"{run}: another process is training there; {mend}") from None
        except OSError:
            pass  # a filesystem without locks
        yield


def resumed(config: Config, folder: Path, corpora: dict[str, Corpus], allow: bool) -> tuple[Config, Origin]:
    """The given config with the checkpoint's tokenizers, and since when its mixture holds.

    Raises UserError where config or data have changed; the mixture may change: a new phase begins.
    """
    before, now = checkpoint.read_data(folder, "config"), to_data(config)
    state = checkpoint.read_data(folder, "state")
    old, new = json.loads(json.dumps([before, now]))
    changed = [
        k for k in new if k not in (*MAY_CHANGE, "tasks", "sources") and _unfitted(old.get(k)) != _unfitted(new[k])
    ]
    mixtures = []
    for data in (old, new):
        mixtures.append({n: {k: s.pop(k, None) for k in MIXTURE} for n, s in data["tasks"].items()})
    if old["tasks"] != new["tasks"]:
        changed.append("tasks")
    if any(name in old["sources"] and old["sources"][name] != source for name, source in new["sources"].items()):
        changed.append("sources")
    if changed:
        raise UserError(f"{folder}: the run was made with other {', '.join(changed)}; resume it with the same config")
    other = [name for name, corpus in corpora.items() if state["data"].get(name, "") not in ("", corpus.fingerprint())]
    if other and not allow:
        raise UserError(
            f"{folder}: the shards of {', '.join(other)} have changed since; restore them, start a new run, "
            "or go on with --allow-data-change"
        )
    origin = Origin(**state["origin"])
    if mixtures[0] != mixtures[1] or other:
        origin = Origin(state["step"], state["drawn"])
        why = f"the shards of {', '.join(other)} have changed" if other else "the mixture has changed"
        print(f"from step {state['step']} on another phase: {why}", file=sys.stderr)
    tokenizers = {}
    for modality, tokenizer in config.tokenizers.items():
        file = before["tokenizers"][modality].get("file")
        if file:
            kept = checkpoint.tokenizer_file(config.run, modality, file)
            own = shutil.copyfile(checkpoint.tokenizer_file(folder, modality, file), f"{kept}.{os.getpid()}")
            os.replace(own, kept)  # at once: another rank may be reading it
            tokenizer = tokenizer.replace(file=str(kept))
        tokenizers[modality] = tokenizer
    return dataclasses.replace(config, tokenizers=tokenizers), origin


def _unfitted(data):
    """Settings without the files that fitting wrote, as JSON gives them back."""
    data = json.loads(json.dumps(data))
    if isinstance(data, dict):
        return {k: {n: v for n, v in s.items() if n != "file"} if isinstance(s, dict) else s for k, s in data.items()}
    return data


def state_of(config: Config, step: int, corpora: dict[str, Corpus], origin: Origin, drawn: dict) -> dict[str, dict]:
    """What a checkpoint holds beside its tensors. drawn: how much of each source was read, by task."""
    return {
        "config": to_data(config),
        "state": {
            "step": step,
            "seed": config.seed,
            "data": {name: corpus.fingerprint() for name, corpus in corpora.items()},
            "origin": dataclasses.asdict(origin),
            "drawn": drawn,
        },
    }
