"""Codes of pictures or sounds, which a trained codec makes while a corpus is packed (`mmfm pack --codes RUN`).

Each sample is coded by itself, so that its codes depend on its bytes and on the codec alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SampleError
from ..run_dir import codec
from ..run_dir.codec import serialize as serialize
from .settings import Settings
from .state import State


def codec_file(state: State) -> Path:
    """Where a pack keeps its copy of the codec while it goes on: the run may learn meanwhile."""
    return state.file("codec.safetensors")


def add(state: State, settings: Settings, members: dict[str, bytes], failed: list) -> None:
    """Add the codes of a sample to its members, where it has the codec's modality; what cannot be coded to `failed`."""
    one = codec.load(str(codec_file(state)))
    members.pop(settings.codes_member, None)  # of an earlier codec
    raw = {ending: members[ending] for ending in one.tokenizer.extensions if ending in members}
    if not raw:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the worker processes, so that the codes do not depend on how many there are
    try:
        sequences = one.tokenizer.read(raw)
        if sequences:
            codes = one.encode(sequences)
            members[settings.codes_member] = codec.to_npy(codes, one.grid(sequences), one.codebook_size)
    except SampleError as error:
        failed.append((one.modality, error))
    finally:
        torch.set_num_threads(threads)


def describe(state: State, settings: Settings) -> dict:
    """What the data card says of the codec."""
    one = codec.load(str(codec_file(state)))
    return {
        "sha256": codec.hash_file(codec_file(state)),
        "member": settings.codes_member,
        "modality": one.modality,
        "quantizer": one.head.config.quantizer,
        "codebook_size": one.codebook_size,
    }
