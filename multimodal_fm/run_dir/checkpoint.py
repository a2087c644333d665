"""Checkpoints: a folder that is published whole or not at all, without a pickle in it.

`RUN/checkpoints/step-00000100/`: model.safetensors, ema.safetensors, optimizer.safetensors, state.json, config.json,
the tokenizers' files, and MANIFEST.json with the size and SHA-256 of each. It is written beside, synced and renamed.
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

from ..errors import UserError

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
        listing = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps(listing, indent=1), encoding="utf-8")
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
    """The newest checkpoint that is whole; damaged ones are named and passed over. Raises UserError."""
    run = Path(run)
    try:
        found = [run] if (run / MANIFEST).exists() else steps(run)  # a checkpoint's own folder, or a run's
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


def retain(run: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what earlier kills left half-written."""
    for folder in steps(run)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (Path(run) / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(folder: Path, name: str, device="cpu") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors", device=str(device))


def read_data(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """All state of the optimizers as named tensors."""
    tensors = {}
    for place, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"{place}.{index}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    states = [{} for _ in optimizers]
    for path, value in tensors.items():
        place, index, name = path.split(".", 2)
        states[int(place)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
