"""A codec: a trained model with the head `codes`, which turns pictures or sounds into codes and back.

`export` puts what a run's checkpoint holds of it into one file, a safetensors whose metadata is the model's
configuration, so that a checkpoint that generates codes can carry the codec that decodes them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..batch import Example, count_targets, plan_reading
from ..config import build
from ..corpus import storage
from ..errors import UserError
from ..heads.codes import Head
from ..model import Model, ModelConfig, load_weights
from ..tokenizers import image
from ..tokens import Tokens, constant, join, make_sequence
from . import checkpoint, hub, trust

FORMAT = "multimodal_fm codec 1"


def serialize(run: str | Path) -> bytes:
    """The codec of a run's newest checkpoint, or of one checkpoint's folder, as the bytes of a file: averaged weights
    and configuration.

    Equal checkpoints give equal bytes. Raises UserError where it holds no codec.
    """
    folder = checkpoint.newest(run)
    data, tensors = checkpoint.read_data(folder, "model"), checkpoint.read_tensors(folder, "ema")
    _build(data, tensors, folder)
    about = json.dumps({"format": FORMAT, "model": data})  # one key: safetensors writes several in any order
    return save({name: tensors[name] for name in sorted(tensors)}, {"codec": about})


def export(run: str | Path, file: str | Path) -> None:
    """Write a run's codec to one file; see `serialize`."""
    storage.write_atomic(file, serialize(run))


def _build(data: dict, tensors: dict[str, Tensor], where: Path) -> Model:
    model = Model(build(ModelConfig, data, str(where), plugins=False))
    load_weights(model, tensors, where)
    find_head(model, where)
    return model.eval()


def find_head(model: Model, where: Any = "the model") -> Head:
    """The model's one head that makes codes. Raises UserError where there is none, or are several."""
    heads = [head for head in model.heads.values() if isinstance(head, Head)]
    if len(heads) != 1:
        raise UserError(f"{where}: a codec has one head `codes`, this model has {len(heads)}")
    return heads[0]


def hash_file(file: str | Path) -> str:
    """The SHA-256 of a codec's file, by which a data card names it."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@functools.lru_cache(maxsize=4)
def load(file: str) -> Codec:
    """The codec of a file that `export` wrote. Nothing is unpickled, no plug-in imported. Raises UserError."""
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["codec"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about["format"] != FORMAT:
            raise ValueError("its format is another one")
        data = dict(about["model"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a codec's file ({str(error) or type(error).__name__})") from None
    return Codec(_build(data, tensors, Path(file)))


def load_own(run: str) -> Codec:
    """The codec of a run, or of one checkpoint's folder, that was trained here by this user: what else a setting names
    may be a stranger's choice, and is not opened. Raises UserError."""
    if hub.is_hub(run):
        raise UserError(f"{run}: a codec of a setting is not fetched: set `file` of the tokenizer to a copy of it")
    folders = [Path(run)] if (Path(run) / checkpoint.MANIFEST).exists() else checkpoint.steps(run)
    for folder in folders:  # before anything in it is read
        if not trust.is_own(folder, checkpoint.MANIFEST):
            raise UserError(
                f"{folder}: was not trained here by you: set `file` of the tokenizer to a copy (codec.export)"
            )
    return _load_folder(checkpoint.newest(run))


@functools.lru_cache(maxsize=4)
def _load_folder(folder: Path) -> Codec:
    return Codec(_build(checkpoint.read_data(folder, "model"), checkpoint.read_tensors(folder, "ema"), folder))


class Codec:
    """A model, in eval mode, and its head `codes`: raw content -> codes -> raw content."""

    def __init__(self, model: Model, head: Head | None = None):
        self.model, self.head = model, find_head(model) if head is None else head
        self.modality = self.head.modality
        self.tokenizer = model.tokenizers[self.modality]
        self.codebook_size: int = self.head.config.codebook_size

    @torch.no_grad()
    def encode(self, sequences: list[Tokens]) -> Tensor:
        """The codes (N,) of raw sequences of the codec's modality, one after the other, in their tokens' order."""
        number = self.model.modalities.index(self.modality)
        examples = []
        for i, tokens in enumerate(sequences):
            tokens = tokens.replace(modality=constant(number, len(tokens)))
            rows = torch.arange(len(tokens))
            examples.append((i, Example([tokens], [None], [tokens], [rows])))
        counts = count_targets([example for _, example in examples], self.model.modalities)
        batch = self.model.collate({"encode": examples}, {"encode": counts})
        rows = batch.tasks["encode"].rows[self.modality]
        return self.head.encode(self.model(batch).tokens.content.index_select(0, rows)).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor, positions: list[Tensor]) -> Tensor:
        """The raw content (N, ...) that codes (N,) of sequences stand for, whose tokens are at `positions` (n, 3)."""
        number = self.model.modalities.index(self.modality)
        tokens = join([make_sequence(constant(0, len(own)), own, number) for own in positions])
        device = self.model.device
        reading = plan_reading(tokens, len(self.model.modalities)).to(device)
        vectors = self.head.lookup(codes.to(device)).index_select(0, reading.tokens.content)
        values = self.head.decode(vectors, reading.tokens, reading.attention, reading.routing)
        return self.head.reconstructor.content(values.index_select(0, reading.rows)).cpu()

    def grid(self, sequences: list[Tokens]) -> tuple[int, ...]:
        """The shape of the array of codes of one input: (rows, columns) of a picture, (frames,) of a sound.

        Raises UserError where a sound has several tokens at a time.
        """
        if isinstance(self.tokenizer, image.Tokenizer):
            rows, columns = (int(n) + 1 for n in sequences[0].position[:, 1:].max(0).values)
            return (rows, columns)
        if any(tokens.position[:, 1:].any() for tokens in sequences):
            raise UserError(f"codes of {self.modality} need one token at a time: patch_mels equal to n_mels")
        return (sum(map(len, sequences)),)


def to_npy(codes: Tensor, shape: tuple[int, ...], codebook_size: int) -> bytes:
    """A member `codes.npy`: codes (N,) in this shape, two bytes each where the codebook allows it, else four."""
    kind = np.uint16 if codebook_size <= 1 << 16 else np.int32
    data = io.BytesIO()
    np.save(data, codes.numpy().astype(kind).reshape(shape), allow_pickle=False)
    return data.getvalue()
