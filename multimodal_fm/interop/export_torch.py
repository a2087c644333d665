"""A modality as a `torch.export` program: MODALITY.pt2, with a batch and a length of any size.

tower = torch.export.load("out/text.pt2").module()
embeddings, features = tower(input_ids, attention_mask)
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from .export_base import Source, Written, examples, padded_model
from .export_towers import check, describe_tower, make_tower, trace, write_towers


def write(source: Source, work: Path) -> Written:
    """See the top of the file."""
    model = padded_model(source)
    differences, about = {}, {}
    for modality in source.modalities:
        about[modality] = of = describe_tower(model.config, modality, f"{modality}.pt2")
        tower = make_tower(model, modality)
        program = trace(tower, of["tokenizer"]["kind"], examples(source.model, modality))
        torch.export.save(program, work / of["file"])
        loaded = torch.export.load(io.BytesIO((work / of["file"]).read_bytes())).module()
        differences[modality] = check(loaded, of, source, modality)
    write_towers(work, about)
    return Written(differences, {name: f"model.{name}" for name in model.state_dict()})
