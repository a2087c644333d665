"""Checkpoints: a folder that is published whole or not at all, without a pickle in it.

`RUN/checkpoints/step-00000100/` holds model.json and model.safetensors, from which a model is loaded, and
ema.safetensors with its averaged weights; objectives.safetensors and ema_objectives.safetensors;
optimizer.safetensors; config.json and state.json of the run; the tokenizers' files; and MANIFEST.json with the size and
SHA-256 of each file. It is written beside its place, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..corpus import storage
from ..errors import UserError
from . import hub, trust

MANIFEST = "MANIFEST.json"


def folder_of(run: str | Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def tokenizer_file(folder: str | Path, modality: str, file: str) -> Path:
    """Where a run's folder, or a checkpoint's, keeps the file of the tokenizer of a modality."""
    return Path(folder) / f"tokenizer-{modality}{Path(file).suffix}"


def save(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], data: dict[str, dict], files: dict[str, str]
) -> Path:
    """Publish `folder`: each of `tensors` as NAME.safetensors, each of `data` as NAME.json, copies of the tokenizers'
    `files` by modality.

    Raises UserError where it cannot be written, as on a full disk; what was there before is left as it was.
    """
    try:
        return _save(folder, tensors, data, files)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", "") or str(error)
        mend = "make room, and --resume goes on from the last one that is whole"
        raise UserError(f"{folder}: the checkpoint cannot be written: {said}; {mend}") from None


def _save(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], data: dict[str, dict], files: dict[str, str]
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        for name, values in tensors.items():
            save_file({k: v.detach().contiguous() for k, v in values.items()}, work / f"{name}.safetensors")
        for name, value in data.items():
            (work / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        for modality, file in files.items():
            shutil.copyfile(file, tokenizer_file(work, modality, file))
        write_manifest(work)
        (work / trust.SIGNATURE).write_text(trust.sign((work / MANIFEST).read_bytes()))
        for path in (*work.iterdir(), work):
            _sync(path)
        if folder.exists():  # the same step again, after a resume: the bytes are the same
            shutil.rmtree(folder)
        os.rename(work, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def write_manifest(folder: Path) -> None:
    """Write the size and the hash of each file of a folder into its manifest."""
    listing = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(listing, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str:
    """Empty where every file of the manifest is whole, else what is wrong."""
    try:
        listing = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not listing.keys():
            return f"{folder}: its manifest is empty"
        for name, wanted in listing.items():
            path = folder / Path(name).name
            if path.stat().st_size != wanted["bytes"] or _hash(path) != wanted["sha256"]:
                return f"{path} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: {error}"
    return ""


def steps(run: str | Path) -> list[Path]:
    """The published checkpoints, oldest first, whole or not."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("step-*") if p.name[5:].isdigit())


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def newest(run: str | Path, warn=_warn) -> Path:
    """The newest checkpoint that is whole; damaged ones are named and passed over. `hf:user/name` names one on the Hub.

    Raises UserError.
    """
    run = hub.fetch(str(run)) if hub.is_hub(run) else Path(run)
    try:
        found = [run] if (run / MANIFEST).exists() else steps(run)  # a checkpoint's own folder, or a run's
        if not found:
            hub.refuse_pickle(run)
        if not run.is_dir():
            raise UserError(f"{run}: no such run folder")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(run)[:80]}: {getattr(error, 'strerror', error)}") from None
    for folder in reversed(found):
        wrong = verify(folder)
        if not wrong:
            return folder
        warn(f"warning: {wrong}; trying the checkpoint before it")
    raise UserError(f"{run}: no {'whole ' if found else ''}checkpoint in it")


def newest_before(run: str | Path, step: int) -> Path | None:
    """The newest whole checkpoint of a step before `step`, from 0 on; None where there is none."""
    early = [folder for folder in steps(run) if folder.name < folder_of(run, max(step, 1)).name]
    return next((folder for folder in reversed(early) if not verify(folder)), None)


def retain(run: str | Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`, and what earlier kills left unfinished."""
    for folder in steps(run)[:-keep]:
        if folder.name != folder_of(run, -1 if best is None else best).name:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (Path(run) / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's NAME.safetensors. Raises UserError."""
    file = folder / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def read_data(folder: Path, name: str) -> dict:
    """The map that a checkpoint's NAME.json holds. Raises UserError."""
    file = folder / f"{name}.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds no map of keys")
    return data


def write_best(run: str | Path, best: dict | None) -> None:
    """Keep in RUN/best.json which checkpoint is the best: {"figure", "value", "step", "since"}.

    since: the step at which the value was first reached.
    """
    if best is not None:
        storage.write_atomic(Path(run) / "best.json", json.dumps(best).encode())


def read_best(run: str | Path) -> dict | None:
    """What `write_best` kept; None where there is nothing, or nothing that can be read."""
    try:
        best = json.loads((Path(run) / "best.json").read_text(encoding="utf-8"))
        best.setdefault("since", best["step"])
        return best if isinstance(best["step"], int) and isinstance(best["value"], float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
