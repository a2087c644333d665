"""OpenCLIP's models are two towers with blocks of their own; a run is one trunk that all modalities share."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .export_base import Source, Written


def write(source: Source, work: Path) -> Written:
    """Raises UserError: a run has one trunk, and a model of OpenCLIP cannot be made of it."""
    raise UserError(
        "open_clip: cannot be expressed: its models are two towers with blocks of their own, a run is one trunk, and "
        "it knows no mean over a text's tokens, as which a run's texts are read (docs/interop.md, Export); "
        "--to hf writes a run of one tower as CLIPTextModel or CLIPVisionModel, and any other one with its code"
    )
