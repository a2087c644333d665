"""What has to be there before the first step: sources, tokenizers that have learned, and where to start from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

from ..corpus.shards import Corpus, list_shards
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..lora import plain_name
from ..model import read_config
from ..run_dir import checkpoint
from ..stream.quarantine import refused_row, strict_message
from ..stream.tasks import Origin, build_stream, fit_tokenizers
from .config import TrainConfig
from .learner import Learner
from .parallel import Ranks
from .resume import keep_tokenizers, resume_config


def open_sources(config: TrainConfig) -> dict[str, Corpus]:
    """The sources, opened. Raises UserError where shards of them, or of the evaluations, are missing."""
    tokenizers = config.model.tokenizers
    corpora = {name: Corpus(source, name, tokenizers.values()) for name, source in config.sources.items()}
    for name, evaluation in config.evaluate.items():
        list_shards(evaluation.on, f"evaluate.{name}")
        if evaluation.train:
            list_shards(evaluation.train, f"evaluate.{name}.train")
    for name, source in config.sources.items():
        if source.validation:
            list_shards(source.validation, f"sources.{name}.validation")
    for name, corpus in corpora.items():
        if config.strict and corpus.rejections:
            raise UserError(strict_message(refused_row(name, corpus.rejections[0])))
    build_stream(
        config.tasks, corpora, tokenizers, fitted=False, heads=config.model.heads
    )  # raises where a source offers a task nothing
    return corpora


def prepare_tokenizers(
    config: TrainConfig, corpora: dict[str, Corpus], ranks: Ranks, start: Path | None, allow_data_change: bool
) -> tuple[TrainConfig, Origin]:
    """The configuration with tokenizers that have learned, and since when its mixture holds. Raises UserError."""
    if start:
        config, origin = resume_config(config, start, corpora, allow_data_change)
    else:
        config, origin = _with_inherited_tokenizers(config), Origin()
        run_dir = Path(config.run_dir)
        tokenizers = ranks.first_then_others(
            lambda: fit_tokenizers(config.tasks, corpora, config.model.tokenizers, config.seed, run_dir)
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizers=tokenizers))
    for tokenizer in config.model.tokenizers.values():
        tokenizer.check()
    return config, origin


def _with_inherited_tokenizers(config: TrainConfig) -> TrainConfig:
    """With `init`, a tokenizer that would have to learn takes the file of the run that the weights come from."""
    files, parts = {}, {"": config.init} if isinstance(config.init, str) else config.init
    for init in filter(None, parts.values()):
        checkpoint.newest(init)  # raises before anything is written
    for modality, tokenizer in config.model.tokenizers.items():
        init = parts.get(modality) or parts.get("", "")
        if init and tokenizer.learns:
            before = read_config(checkpoint.newest(init)).tokenizers
            if modality in before and before[modality].file:
                files[modality] = Path(before[modality].file)
    return keep_tokenizers(config, files) if files else config


def init_weights(trained: Learner, init: str | dict[str, str]) -> list[str]:
    """Copy the averaged weights of other runs into a model and its objectives by name; what does not fit stays.

    Returns lines that name what was taken, what has another shape and so starts anew, and what is new. Raises UserError
    where there is no such run, and where a part that `init` names by itself does not fit.
    """
    if not isinstance(init, str):
        return [_init_part(trained, init, part) for part in init]
    folder, lines = checkpoint.newest(init), []
    for name, file in (("model", "ema"), ("objectives", "ema_objectives")):
        tensors, own = checkpoint.read_tensors(folder, file), trained[name].state_dict()
        known = {n: tensors[plain_name(n)] for n in own if plain_name(n) in tensors}
        taken = {n: value for n, value in known.items() if value.shape == own[n].shape}
        trained[name].load_state_dict(taken, strict=False)
        resized = sorted(known.keys() - taken.keys())
        new = sorted(own.keys() - known.keys())
        lines.append(f"init: {len(taken)} of {len(own)} tensors of {name} taken from {folder}")
        lines += [f"init: of another shape, starts anew: {', '.join(resized)}"] * bool(resized)
        lines += [f"init: new: {', '.join(new)}"] * bool(new)
    return lines


def _init_part(trained: Learner, init: dict[str, str], part: str) -> str:
    """Copy one part of the model from the run that `init` names for it; returns the line that says so."""
    folder, own = checkpoint.newest(init[part]), trained["model"].state_dict()
    tensors = checkpoint.read_tensors(folder, "ema")
    names = [name for name in own if _part_of(name, init) == part]
    known = {name: tensors[plain_name(name)] for name in names if plain_name(name) in tensors}
    here = f"init.{part}"
    if not known:
        mend = "name a modality, or the beginning of tensors' names as in backbone"
        raise UserError(f"{here}: {folder} and this model share no tensors of it: {mend}")
    for name, value in known.items():
        if value.shape != own[name].shape:
            mend = "parts go together only at one width, and a text's only with its vocab_size"
            shapes = f"is {tuple(value.shape)} in {folder}, this model has {tuple(own[name].shape)}"
            raise UserError(f"{here}: {name} {shapes}: {mend}")
    trained["model"].load_state_dict(known, strict=False)
    return f"init: {len(known)} of {len(names)} tensors of {part} taken from {folder}"


def _part_of(name: str, init: dict[str, str]) -> str:
    """The part of `init` that a tensor belongs to: the longest beginning of its name, where a modality stands for its
    embedder and its two learned vectors; empty where there is none."""
    group, _, rest = name.partition(".")
    modality = rest.partition(".")[0] if group in ("embedders", "modality_vectors", "mask_tokens") else ""
    fitting = [part for part in init if part == modality or f"{name}.".startswith(f"{part}.")]
    return max(fitting, key=lambda part: len(name) if part == modality else len(part), default="")


def record_base(run_dir: Path, init: str | dict[str, str]) -> None:
    """Write RUN/base.json: which checkpoint, by the hash of its manifest, the weights come from, and its own base; of
    several by the part of the model."""
    base = _base(init) if isinstance(init, str) else {"init": init, "parts": {k: _base(v) for k, v in init.items()}}
    write_atomic(run_dir / "base.json", json.dumps(base, indent=1).encode())


def _base(init: str) -> dict:
    folder = checkpoint.newest(init)
    digest = hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()
    base = {"init": init, "checkpoint": folder.name, "manifest_sha256": digest}
    with contextlib.suppress(OSError, ValueError):
        base["base"] = json.loads((folder.parent.parent / "base.json").read_text(encoding="utf-8"))
    return base
