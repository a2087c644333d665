"""What the exporters of weights share: a run's model over padded batches, the check against the original, the folder.

An exporter is a file of this folder with `write(source, work)`: it writes its files into the folder `work`, compares
what another library makes of them with the original and returns a `Written`. `export` publishes the folder with
export.json, whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch import Example
from ..config import to_data
from ..errors import UserError
from ..heads import classify, retrieval
from ..model import Model, load, merge_adapter
from ..run_dir import checkpoint
from ..tokenizers import audio, image, text
from ..tokenizers.base import Tokenizer, find_prompt
from ..tokens import Tokens, constant, make_sequence
from .exported.padded_multimodal_fm import PaddedModel

FORMAT = "multimodal_fm export 1"
TARGETS = {
    "hf": "export_hugging_face",
    "onnx": "export_onnx",
    "torch-export": "export_torch",
    "timm": "export_timm",
    "open_clip": "export_open_clip",
}
LIMIT = 1e-4  # the largest difference from the original that is published, of its largest value or of 1
TEXT, IMAGE = ("vocab_size", "causal", "max_tokens"), ("patch", "max_tokens", "enlarge", "square")
AUDIO = ("sample_rate", "n_mels", "hop_length", "win_length", "patch_frames", "patch_mels", "max_tokens", "features")


@dataclass
class Source:
    """A run's model, in float32 on the CPU, adapters worked into the weights, and which modalities are wanted."""

    model: Model
    modalities: list[str]
    folder: Path | None = None  # the checkpoint
    left_out: list[str] = field(default_factory=list)  # what the export does not hold, in words

    @property
    def name(self) -> str:
        if self.folder is None:
            return "model"
        return (self.folder.parent.parent if self.folder.parent.name == "checkpoints" else self.folder).resolve().name


@dataclass
class Written:
    """What an exporter did."""

    differences: dict[str, dict[str, float]]  # by modality, see `difference`
    mapping: dict[str, str]  # the original's names of tensors -> those in the file
    notes: list[str] = field(default_factory=list)  # how it was written, in words
    limit: float = LIMIT


def export(run: str | Path, to: str, out: str | Path, modalities: Sequence[str] = ()) -> dict[str, Any]:
    """Write a run's averaged weights as files of another library into the new folder `out`; what export.json says.

    to: hf, onnx, torch-export, timm or open_clip. modalities: those to be exported; empty: all that can be. Raises
    UserError where something cannot be expressed, a package is missing, or the result differs from the original.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to!r} is none of {', '.join(TARGETS)}")
    out = Path(out)
    check_free(out)
    exporter = import_module(f"{__package__}.{TARGETS[to]}")
    source = open_run(run, modalities)
    with publish(out) as work:
        written: Written = exporter.write(source, work)
        for modality, found in written.differences.items():
            worst = max(value for name, value in found.items() if name != "inputs")
            if not worst <= written.limit:
                raise UserError(
                    f"{to}: {modality} differs from the original by {worst:.2g} of its largest value, more than "
                    f"{written.limit:g}: nothing was written"
                )
        about = _describe(source, to, written, work)
        (work / "export.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return about


def _describe(source: Source, to: str, written: Written, work: Path) -> dict[str, Any]:
    """What export.json says."""
    about: dict[str, Any] = {"format": FORMAT, "to": to, "run": source.name}
    if source.folder is not None:
        about["checkpoint"] = source.folder.name
        about["manifest_sha256"] = hash_file(source.folder / checkpoint.MANIFEST)
    named = ("torch", "transformers", "onnx", "onnxruntime", "timm", "open_clip_torch")
    versions = {"python": platform.python_version()}
    for name in named:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return about | {
        "modalities": source.modalities,
        "difference": written.differences,
        "limit": written.limit,
        "left_out": source.left_out,
        "notes": written.notes,
        "mapping": written.mapping,
        "versions": versions,
        "sha256": {str(f.relative_to(work)): hash_file(f) for f in sorted(work.rglob("*")) if f.is_file()},
    }


def hash_file(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def need(*packages: str, extra: str) -> None:
    """Raises UserError where a package cannot be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise UserError(f'this needs {package}: pip install "multimodal_fm[{extra}]"') from None


# ---------------------------------------------------------------------------------------------------------- the folder


def check_free(out: Path) -> None:
    """Raises UserError where a folder cannot be written there, or would replace something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not empty; name a new folder")


@contextlib.contextmanager
def publish(out: Path):
    """A folder beside `out`, which becomes `out` when the block ends, and is gone when it fails."""
    work = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        work.mkdir(parents=True)
        yield work
        for path in (*work.rglob("*"), work):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        check_free(out)
        os.rename(work, out)  # over an empty folder too
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- the model


def open_run(run: str | Path, modalities: Sequence[str] = ()) -> Source:
    """A run's newest checkpoint, to be exported. Raises UserError."""
    folder = checkpoint.newest(run)
    return open_model(load(folder, device="cpu"), modalities, folder)


def open_model(model: Model, modalities: Sequence[str] = (), folder: Path | None = None) -> Source:
    """A model on the CPU, to be exported. Raises UserError where a modality is missing or cannot be expressed."""
    known = {name: describe(one) for name, one in model.tokenizers.items() if one.prompt() is None}
    able = [name for name, found in known.items() if found]
    for name in modalities:
        if name not in known:
            raise UserError(f"the run has no modality {name!r} (it has: {', '.join(known)})")
        if not known[name]:
            raise UserError(f"{name}: its tokenizer `{model.tokenizers[name].name}` has no form outside this package")
    wanted = [name for name in able if not modalities or name in modalities]
    if not wanted:
        raise UserError("none of the run's modalities can be exported: text, image and audio can")
    left_out = [f"modality {name}" for name in known if name not in wanted]
    left_out += [f"head {name}" for name, head in model.heads.items() if not _exported_head(name, head)]
    left_out += ["mask_tokens, which only training reads"]
    model = merge_adapter(model) if model.config.lora.rank else model
    return Source(model.eval(), wanted, folder, left_out)


def _exported_head(name: str, head: Any) -> bool:
    kinds = {"retrieval": retrieval.Head, "classify": classify.Head}
    return name in kinds and type(head) is kinds[name]


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a padded model is told of a modality; empty where it cannot read it."""
    config = to_data(tokenizer)
    kinds = {text.Tokenizer: ("ids", TEXT), image.Tokenizer: ("pixels", IMAGE), audio.Tokenizer: ("values", AUDIO)}
    if type(tokenizer) not in kinds:
        return {}
    kind, names = kinds[type(tokenizer)]
    found = {"kind": kind, **{name: config[name] for name in names}}
    if kind == "pixels":
        found["size"] = 3 * config["patch"] ** 2
    elif kind == "values":
        found["size"] = config["patch_frames"] * config["patch_mels"]
    return found


def padded_model(source: Source) -> PaddedModel:
    """The model over padded batches, with the original's weights."""
    model = source.model
    prompt = find_prompt(model.tokenizers)
    of_prompt = None if prompt is None else (model.modalities[int(prompt.modality[0])], len(prompt))
    heads = {}
    for name, head in model.heads.items():
        if _exported_head(name, head):
            heads[name] = {key: value for key, value in to_data(head.config).items()}
    config = {
        "backbone": to_data(model.config.backbone),
        "modalities": {name: describe(model.tokenizers[name]) for name in source.modalities},
        "prompt": of_prompt,
        "heads": heads,
    }
    padded = PaddedModel(config)
    tensors = model.state_dict()
    padded.load_state_dict({name: tensors[name] for name in padded.state_dict()})
    return padded.eval()


# ----------------------------------------------------------------------------------------------------------- the check


def examples(model: Model, modality: str, seed: int = 0, whole: bool = False) -> list[Tokens]:
    """Random sequences of a modality, of several lengths. whole: pictures that fill the grid, as a ViT wants them."""
    draw, tokenizer = torch.Generator().manual_seed(seed), model.tokenizers[modality]
    config, (times, rows, columns) = tokenizer.config, model.config.backbone.extent()
    sequences = []
    if isinstance(tokenizer, text.Tokenizer):
        longest = int(min(config.max_tokens, times, 64))
        for length in {longest, max(longest // 2, 2), 3, 2}:
            content = torch.randint(config.vocab_size, (length,), generator=draw)
            position = torch.zeros(length, 3)
            position[:, 0] = torch.arange(length)
            tokens = make_sequence(content, position)
            sequences.append(tokens.replace(order=torch.arange(length)) if config.causal else tokens)
        return sequences
    if isinstance(tokenizer, image.Tokenizer):
        side = int(min(config.max_tokens**0.5, rows, columns))
        grids = [(1, side, side)] * 3 if whole else {(1, side, side), (1, 1, side), (1, side, max(side // 2, 1))}
    else:
        most, rows, columns = tokenizer.extent() or (1, 1, 1)
        grids = {(n, rows, columns) for n in (int(min(most, times)), max(int(min(most, times)) // 2, 1), 1)}
    for grid in sorted(grids):
        position = torch.stack([one.flatten() for one in torch.meshgrid(*map(torch.arange, grid), indexing="ij")], 1)
        size = describe(tokenizer)["size"]
        if isinstance(tokenizer, image.Tokenizer):
            content = torch.randint(256, (len(position), size), generator=draw, dtype=torch.uint8)
        else:
            content = torch.randn(len(position), size, generator=draw)
        sequences.append(make_sequence(content, position.float()))
    return sequences


def pad(sequences: list[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    """Content (B, L, ...), mask (B, L) int64 and position (B, L, 3) int64 of sequences, padded on the right."""
    content = pad_sequence([tokens.content for tokens in sequences], batch_first=True)
    position = pad_sequence([tokens.position for tokens in sequences], batch_first=True).long()
    length = torch.tensor([len(tokens) for tokens in sequences])
    return content, (torch.arange(content.shape[1]) < length[:, None]).long(), position


@torch.no_grad()
def read(model: Model, modality: str, sequences: list[Tokens]) -> dict[str, Tensor]:
    """What the original makes of sequences: hidden (a row for each token, prompts first), features (B, D), embeddings
    (B, E) where it has the head, and logits (B, C) where it has a classifier."""
    number = model.modalities.index(modality)
    own = [tokens.replace(modality=constant(number, len(tokens))) for tokens in sequences]
    examples = [(i, Example([tokens], [None])) for i, tokens in enumerate(own)]
    batch = model.collate({"all": examples}, {"all": {}})
    output, targets = model(batch), batch.tasks["all"]
    which = output.tokens.sequence
    found = {"hidden": torch.cat([output.tokens.content[which == i] for i in targets.sequence])}
    found["features"] = output.mean_pool().index_select(0, targets.sequence)
    heads: Any = model.heads
    if "retrieval" in heads:
        found["embeddings"] = output.embedding(targets.sequence, targets.modality)
    if "classify" in heads and _exported_head("classify", heads["classify"]):
        found["logits"] = heads["classify"].logits(heads["classify"].pool(output, targets.sequence))
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each output from the original's, as a share of its largest value, or of 1 where that
    is smaller; and of how many inputs."""
    shares: dict[str, float] = {"inputs": len(next(iter(found.values())))}
    for name, value in found.items():
        wanted = expected[name].double()
        shares[name] = float((value.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
    return shares
