"""What a run keeps in its folder to go on from, and what a run that goes on must have in common with it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
import shutil
import sys
from pathlib import Path

from ..config import to_data
from ..corpus.shards import Corpus
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..run_dir import checkpoint
from ..stream.tasks import Origin
from .config import TrainConfig
from .guards import Guards

LOCK = ".lock"
OWN = (  # what a run leaves in its folder before its first checkpoint
    *("metrics.jsonl", "quarantine.jsonl", "samples.jsonl", "changes.jsonl", "crashes.jsonl", "crash-log-*"),
    *("tensorboard", "wandb", "profile.json", "profile.txt", "best.json", "tokenizer-*", ".tmp-*"),
    *("compute.json", "base.json"),  # what the run cost and began with
    *("monitors.jsonl", "data", "base"),  # what its monitors did, and the data of a tune
    *("checkpoints", "checkpoints/step-*.tmp-*"),
)
MAY_CHANGE = (
    *("run_dir", "steps", "num_workers", "keep", "save_every", "device", "log_samples", "strict", "max_bad_fraction"),
    *(
        "evaluate",
        "evaluate.*",
        "evaluate_every",
        "validate_every",
        "validation_steps",
        "best",
        "best_mode",
        "patience",
        "track",
    ),
    *("optim.lr", "optim.muon_lr", "optim.weight_decay", "optim.betas", "optim.grad_clip", "optim.warmup_steps"),
    *("optim.schedule", "optim.decay_fraction", "optim.final_lr_fraction", "ema_decay", "threads", "compile"),
    "activation_checkpointing",
    *("tasks.*.weight", "tasks.*.objectives.*.weight", "microbatches", "precision", "round_to", "init", "init.*"),
    *("parallel", "parallel.*", "strict_numerics", "deterministic", "keep_every", "hang_timeout"),
    *("monitors", "monitors.*", "sources.*.validation", "model.tokenizers.*.file", "country", "card", "card.*"),
)
NOT_RECORDED = ("run_dir", "init", "init.*", "model.tokenizers.*.file")
MIXTURE = ("tasks.*.sources", "tasks.*.sources.*", "tasks.*.weigh_by", "tasks.*.temperature")  # begins a new phase


@contextlib.contextmanager
def locked(run_dir: Path):
    """While it lasts, no other process trains in the run's folder. Raises UserError where one does."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in (run_dir, *run_dir.iterdir(), *(run_dir / "checkpoints").glob("*")):
            if path.is_symlink() and path != run_dir:
                raise UserError(f"{path} is a link, which a run would write through: remove it")
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"run_dir={str(run_dir)[:80]}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            mend = "wait for it, or name another folder with run_dir=FOLDER"
            raise UserError(f"{run_dir}: another process is training there; {mend}") from None
        except OSError:
            pass  # a filesystem without locks
        yield


def find_start(run_dir: Path, resume: bool | str) -> Path | None:
    """The checkpoint to go on from, None for a new run. Call it under `locked`. Raises UserError.

    resume: True, False, or "auto": go on where there is a checkpoint, else begin.
    """
    if checkpoint.steps(run_dir):
        if not resume:
            mend = "go on with --resume, or name another folder with run_dir=FOLDER"
            raise UserError(f"{run_dir} already holds a run: {mend}")
        return checkpoint.newest(run_dir)
    entries = [path for path in (*run_dir.iterdir(), *(run_dir / "checkpoints").glob("*")) if path.name != LOCK]
    own = [path for path in entries if _matches(str(path.relative_to(run_dir)), OWN)]
    if foreign := [path for path in entries if path not in own]:
        mend = "name another folder with run_dir=FOLDER"
        raise UserError(f"{run_dir} holds {foreign[0].relative_to(run_dir)}, which is not of a run: {mend}")
    if resume is True and not own:
        raise UserError(f"{run_dir}: there is no run to go on with; leave out --resume, or say --resume auto")
    for path in own:  # of a start that did not reach its first checkpoint
        if path.parent != run_dir:
            shutil.rmtree(path)
        elif path.suffix == ".jsonl" and path.name != "crashes.jsonl":
            path.unlink()
    return None


def discard_damaged(run_dir: Path, newest: Path) -> None:
    """Remove the checkpoints after `newest`, the newest whole one: the run that goes on makes them again."""
    for folder in checkpoint.steps(run_dir):
        if folder > newest:
            checkpoint.remove(folder)


def resume_config(
    config: TrainConfig, folder: Path, corpora: dict[str, Corpus], allow_data_change: bool
) -> tuple[TrainConfig, Origin]:
    """The given configuration with the checkpoint's tokenizers, and since when its mixture holds.

    Raises UserError, with the keys and both values, where something has changed that must not; all that has changed
    otherwise is printed and written to changes.jsonl. A change of the mixture begins a new phase of the stream.
    """
    before, state = checkpoint.read_data(folder, "config"), checkpoint.read_data(folder, "state")
    old, new = (_leaves(json.loads(json.dumps(data))) for data in (before, to_data(config)))
    own = config.sources.keys() ^ before["sources"].keys()  # new ones, and those that are not read any more
    changes = {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key.startswith(f"sources.{name}.") for name in own)
    }
    refused = {k: both for k, both in changes.items() if not _matches(k, (*MAY_CHANGE, *MIXTURE))}
    if refused:
        lines = "; ".join(f"{key} was {before}, is {after}" for key, (before, after) in refused.items())
        raise UserError(f"{folder}: the run was made with another configuration: {lines}. Resume it with the same one")
    other = [name for name, corpus in corpora.items() if state["data"].get(name, "") not in ("", corpus.fingerprint())]
    if other and not allow_data_change:
        raise UserError(
            f"{folder}: the shards of {', '.join(other)} have changed since; restore them, start a new run, "
            "or go on with --allow-data-change"
        )
    origin = Origin(**state["origin"])
    if other or any(_matches(key, MIXTURE) for key in changes):
        origin = Origin(state.get("stream_step", state["step"]), state["drawn"])
        why = f"the shards of {', '.join(other)} have changed" if other else "the mixture has changed"
        print(f"from step {state['step']} on another phase: {why}", file=sys.stderr)
    recorded = {key: both for key, both in changes.items() if not _matches(key, NOT_RECORDED)}
    now = int(os.environ.get("WORLD_SIZE", 1))
    if state.get("ranks", now) != now:
        recorded["ranks"] = (state["ranks"], now)
    _record(config, state["step"], recorded)
    files = {m: t["file"] for m, t in before["model"]["tokenizers"].items() if t.get("file")}
    return keep_tokenizers(config, {m: checkpoint.tokenizer_file(folder, m, f) for m, f in files.items()}), origin


def _leaves(data, path: str = "") -> dict[str, object]:
    """Dotted keys and their values. The order of a task's objectives, the first of which arranges, is a value too."""
    if not isinstance(data, dict) or not data:
        return {path: data}
    leaves: dict[str, object] = {f"{path} (order)": list(data)} if fnmatch.fnmatch(path, "tasks.*.objectives") else {}
    for key, value in data.items():
        leaves |= _leaves(value, f"{path}.{key}" if path else key)
    return leaves


def _matches(key: str, patterns) -> bool:
    return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)


def _record(config: TrainConfig, step: int, changes: dict[str, tuple]) -> None:
    if not changes or os.environ.get("RANK", "0") != "0":
        return
    with open(Path(config.run_dir) / "changes.jsonl", "a", encoding="utf-8") as file:
        for key, (before, after) in changes.items():
            print(f"from step {step} on: {key} was {before}, is {after}", file=sys.stderr)
            file.write(json.dumps({"step": step, "key": key, "before": before, "after": after}) + "\n")


def keep_tokenizers(config: TrainConfig, files: dict[str, Path]) -> TrainConfig:
    """The configuration with the files of tokenizers, by modality, copied from a checkpoint to the run's folder."""
    tokenizers = dict(config.model.tokenizers)
    for modality, file in files.items():
        kept = checkpoint.tokenizer_file(config.run_dir, modality, file.name)
        write_atomic(kept, file.read_bytes())
        tokenizers[modality] = tokenizers[modality].replace(file=str(kept))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizers=tokenizers))


def checkpoint_data(
    config: TrainConfig,
    step: int,
    corpora: dict[str, Corpus],
    origin: Origin,
    drawn: dict,
    guards: Guards,
    ranks: int = 1,
) -> dict[str, dict]:
    """What a checkpoint holds beside its tensors. drawn: how many samples of each source were read, by task."""
    return {
        "config": to_data(config),
        "model": to_data(config.model),
        "state": {
            "step": step,
            "seed": config.seed,
            "ranks": ranks,
            "data": {name: corpus.fingerprint() for name, corpus in corpora.items()},
            "origin": dataclasses.asdict(origin),
            "drawn": drawn,
            "stream_step": guards.data_step(step),  # of the stream, which is that of the run unless a part was left out
            "monitors": guards.state(),
        },
    }
