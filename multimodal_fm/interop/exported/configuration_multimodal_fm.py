"""The configuration of a multimodal_fm model for Hugging Face `transformers`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MultimodalFMConfig(PretrainedConfig):
    """model: what `PaddedModel` is built from, as plain data."""

    model_type = "multimodal_fm"

    def __init__(self, model: dict[str, Any] | None = None, **other: Any):
        self.model = model or {}
        backbone, heads = self.model.get("backbone", {}), self.model.get("heads", {})
        self.hidden_size = backbone.get("width", 0)
        self.num_hidden_layers = backbone.get("depth", 0)
        self.num_attention_heads = backbone.get("num_heads", 0)
        self.projection_dim = heads.get("retrieval", {}).get("embed_dim", self.hidden_size)
        for known in ("hidden_size", "num_hidden_layers", "num_attention_heads", "projection_dim"):
            other.pop(known, None)
        super().__init__(**other)
