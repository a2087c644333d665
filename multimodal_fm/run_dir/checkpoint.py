"""Checkpoints: a folder that is published whole or not at all, without a pickle in it.

`RUN/checkpoints/step-00000100/` holds model.json and model.safetensors, from which a model is loaded, and
ema.safetensors with its averaged weights; objectives.safetensors and ema_objectives.safetensors;
optimizer.safetensors; config.json and state.json of the run; the tokenizers' files; and MANIFEST.json with the size and
SHA-256 of each file. It is written beside its place, synced and renamed.

What would be larger than `MAX_FILE_BYTES` lies in several files, NAME-00001-of-00003.safetensors and so on, which
NAME.safetensors.index.json names as Hugging Face's libraries do. A tensor is whole in one file, however many ranks held
it and wrote the files, so that any number of them reads it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..corpus import storage
from ..errors import UserError
from . import hub, trust

MANIFEST = "MANIFEST.json"
MAX_FILE_BYTES = 5_000_000_000  # as in Hugging Face's libraries


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
    with explained(folder):
        work = begin(folder)
        try:
            written, index = {}, {}
            for part in plan({name: {k: _size(v) for k, v in own.items()} for name, own in tensors.items()}):
                written |= write_part(work, part, {key: tensors[part.name][key].detach() for key in part.keys})
                index.setdefault(part.name, []).append(part)
            publish(work, folder, written, index, data, files)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return folder


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is written, as a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", "") or str(error)
        mend = "make room, and --resume goes on from the last one that is whole"
        raise UserError(f"{folder}: the checkpoint cannot be written: {said}; {mend}") from None


@dataclass(frozen=True)
class Part:
    """One of the files that hold the tensors of a name, as `model`."""

    name: str
    file: str
    keys: tuple[str, ...]  # of its tensors


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def plan(sizes: dict[str, dict[str, int]]) -> list[Part]:
    """Which tensors, given their bytes by name and key, go into which file."""
    parts = []
    for name, own in sizes.items():
        files: list[list[str]] = [[]]
        held = 0
        for key, size in own.items():
            if files[-1] and held + size > MAX_FILE_BYTES:
                files.append([])
                held = 0
            files[-1].append(key)
            held += size
        several = len(files) > 1
        for number, keys in enumerate(files, 1):
            ending = f"-{number:05d}-of-{len(files):05d}" if several else ""
            parts.append(Part(name, f"{name}{ending}.safetensors", tuple(keys)))
    return parts


def begin(folder: Path) -> Path:
    """A new folder beside `folder`, to be written to and published as it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    work.mkdir()
    return work


def write_part(work: Path, part: Part, tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Write one file and sync it; returns its line of the manifest."""
    path = work / part.file
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    _sync(path)
    return {part.file: _describe(path)}


def publish(
    work: Path, folder: Path, written: dict[str, dict], parts: dict[str, list[Part]], data: dict[str, dict], files: dict
) -> None:
    """Write what belongs beside the tensors, and put the folder `work` in its place.

    written: the manifest's lines of the files that are there already. parts: the files of each name.
    """
    for name, value in data.items():
        (work / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, own in parts.items():
        if len(own) > 1:
            total = sum(written[part.file]["bytes"] for part in own)
            index = {"metadata": {"total_size": total}, "weight_map": {k: part.file for part in own for k in part.keys}}
            (work / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    for modality, file in files.items():
        shutil.copyfile(file, tokenizer_file(work, modality, file))
    write_manifest(work, written)
    (work / trust.SIGNATURE).write_text(trust.sign((work / MANIFEST).read_bytes()))
    for path in (*work.iterdir(), work):
        if path.name not in written:
            _sync(path)
    remove(folder)  # the same step again, after a resume: the bytes are the same
    os.rename(work, folder)
    _sync(folder.parent)


def write_manifest(folder: Path, known: dict[str, dict] | None = None) -> None:
    """Write the size and the hash of each file of a folder, as far as they are not `known`, into its manifest."""
    known = known or {}
    names = sorted(known.keys() | {path.name for path in folder.iterdir()})
    listing = {name: known.get(name) or _describe(folder / name) for name in names}
    (folder / MANIFEST).write_text(json.dumps(listing, indent=1), encoding="utf-8")


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def remove(folder: Path) -> None:
    """Delete a checkpoint, if there is one: by another name first, so that it is never there in part."""
    if folder.exists():
        torn = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
        os.rename(folder, torn)
        shutil.rmtree(torn, ignore_errors=True)


def retain(run: str | Path, keep: int, best: int | None = None, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints, that of step `best` and those of every `keep_every`-th step, and
    what earlier kills left unfinished. One that lacks a file, or a part of one, does not count among the newest."""
    whole = [folder for folder in steps(run) if _is_complete(folder)]
    for folder in whole[:-keep]:
        step = int(folder.name[5:])
        if step != best and not (keep_every and step % keep_every == 0):
            remove(folder)
    for folder in (Path(run) / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether all files are there in their full length; `verify` looks into them too."""
    try:
        listing = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / Path(name).name).stat().st_size == one["bytes"] for name, one in listing.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _tensor_files(folder: Path, name: str) -> list[Path]:
    """The files that hold the tensors of a name. Raises UserError where its index cannot be read."""
    index = folder / f"{name}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{name}.safetensors"]
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(file).name for file in sorted(files)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: {error}") from None


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's NAME.safetensors, or of the files of its index. Raises UserError."""
    tensors = {}
    for file in _tensor_files(folder, name):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
    return tensors


class Tensors:
    """The tensors of a name in a checkpoint, of which parts can be read. Opening it raises UserError."""

    def __init__(self, folder: Path, name: str):
        self.shapes: dict[str, torch.Size] = {}
        self._file: dict[str, Any] = {}
        for file in _tensor_files(folder, name):
            try:
                opened = safe_open(file, "pt")
                for key in opened.keys():  # noqa: SIM118
                    self.shapes[key] = torch.Size(opened.get_slice(key).get_shape())
                    self._file[key] = opened
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None

    def rows(self, key: str, rows: slice | EllipsisType = ...) -> torch.Tensor:
        """Some rows of a tensor, or all of it."""
        whole = rows is ... or not self.shapes[key]
        return self._file[key].get_tensor(key) if whole else self._file[key].get_slice(key)[rows]


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
        return best if isinstance(best["step"], int) and math.isfinite(best["value"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
