"""A multimodal_fm model for Hugging Face `transformers` and sentence-transformers, without multimodal_fm.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    words = model.get_text_features(**processor(text=["a red bus"])).pooler_output
    pictures = model.get_image_features(**processor(images=[picture])).pooler_output
    words @ pictures.T

B sequences, L tokens of the longest, P learned tokens before each, D width, E length of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_multimodal_fm import MultimodalFMConfig
from .padded_multimodal_fm import PaddedModel


@dataclass
class MultimodalFMOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # (B, P + L, D)
    pooler_output: Tensor | None = None  # (B, E) unit vectors; the features where the model has no retrieval head
    features: Tensor | None = None  # (B, D) the mean of the hidden states over the tokens
    logits: Tensor | None = None  # (B, C) of the classes, where there is a classifier
    hidden_mask: Tensor | None = None  # (B, P + L) True where there is a token


class MultimodalFMModel(PreTrainedModel):
    config_class = MultimodalFMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: MultimodalFMConfig):
        super().__init__(config)
        self.model = PaddedModel(config.model)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """All weights come from the file."""

    def _read(self, modality: str, content: Tensor, mask: Tensor | None, position: Tensor | None = None):
        if modality not in self.model.config["modalities"]:
            raise ValueError(f"this model reads {', '.join(self.model.config['modalities'])}, not {modality}")
        reading = self.model(modality, content, mask, position)
        return MultimodalFMOutput(
            last_hidden_state=reading.hidden,
            pooler_output=reading.embedding,
            features=reading.features,
            logits=reading.logits,
            hidden_mask=reading.mask,
        )

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MultimodalFMOutput:
        """input_ids (B, L), attention_mask (B, L): 1 where there is a token."""
        return self._read("text", input_ids, attention_mask)

    def get_image_features(
        self, pixel_patches: Tensor, pixel_position: Tensor, pixel_mask: Tensor | None = None
    ) -> MultimodalFMOutput:
        """pixel_patches (B, L, patch * patch * 3) from 0 to 255, pixel_position (B, L, 3), pixel_mask (B, L)."""
        return self._read("image", pixel_patches, pixel_mask, pixel_position)

    def get_audio_features(
        self, audio_patches: Tensor, audio_position: Tensor, audio_mask: Tensor | None = None
    ) -> MultimodalFMOutput:
        """audio_patches (B, L, values) of log-mel, audio_position (B, L, 3), audio_mask (B, L)."""
        return self._read("audio", audio_patches, audio_mask, audio_position)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        pixel_position: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        audio_patches: Tensor | None = None,
        audio_position: Tensor | None = None,
        audio_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultimodalFMOutput | tuple:
        """One modality at a time."""
        given = {"input_ids": input_ids, "pixel_patches": pixel_patches, "audio_patches": audio_patches}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"give one of {', '.join(given)}")
        if input_ids is not None:
            output = self.get_text_features(input_ids, attention_mask)
        elif pixel_patches is not None:
            output = self._read("image", pixel_patches, pixel_mask, pixel_position)
        else:
            assert audio_patches is not None
            output = self._read("audio", audio_patches, audio_mask, audio_position)
        return output.to_tuple() if return_dict is False else output
