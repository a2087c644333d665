"""Texts, pictures and sounds as the inputs of a multimodal_fm model. Needs PyTorch, `transformers` and Pillow.

Longer texts are cut to the model's longest sequence, and longer sounds to their first window; multimodal_fm itself
reads all windows and averages their vectors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin


class MultimodalFMProcessor(ProcessorMixin):
    """modalities: what the model's configuration says of them."""

    def __init__(self, tokenizer: Any = None, modalities: dict[str, dict[str, Any]] | None = None):
        self.tokenizer, self.modalities, self.chat_template = tokenizer, modalities or {}, None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any):  # pyright: ignore
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        where = {name: value for name, value in kwargs.items() if name in names}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **where)
        modalities, tokenizer = settings["modalities"], None
        if "text" in modalities and settings.get("reads_strings"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **where)
        return cls(tokenizer, modalities)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> list[str]:
        from pathlib import Path

        reads = self.tokenizer is not None
        data = {"processor_class": type(self).__name__, "modalities": self.modalities, "reads_strings": reads}
        data["auto_map"] = {"AutoProcessor": "processing_multimodal_fm.MultimodalFMProcessor"}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        file = Path(save_directory) / "processor_config.json"
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        return [str(file), *(self.tokenizer.save_pretrained(save_directory) if reads else ())]

    @property
    def model_input_names(self) -> list[str]:  # pyright: ignore
        return ["input_ids", "attention_mask", "pixel_patches", "audio_patches"]

    def __call__(self, images=None, text=None, audio=None, sampling_rate: int | None = None, **kwargs: Any):  # pyright: ignore
        """Tensors for the model: of texts, of pictures (PIL, arrays (H, W, 3) or tensors (3, H, W) of uint8) or of
        sounds (arrays (T,) or (C, T) at the model's sample rate, which `sampling_rate` confirms)."""
        found: dict[str, Tensor] = {}
        if text is not None:
            if self.tokenizer is None:
                raise ValueError("this model reads ids only: its tokenizer could not be written")
            texts = [text] if isinstance(text, str) else list(text)
            most = min(self.modalities["text"]["max_tokens"], kwargs.get("max_length") or 1 << 30)
            found |= self.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        if images is not None:
            found |= self._pad("pixel", [self.read_picture(one) for one in _listed(images)])
        if audio is not None:
            asked = (kwargs.get("audio_kwargs") or {}).get("sampling_rate")
            found |= self._pad("audio", [self.read_sound(one, sampling_rate or asked) for one in _listed(audio)])
        return BatchFeature(found)

    def _pad(self, name: str, read: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        length = torch.tensor([len(content) for content, _ in read])
        content, position = (pad_sequence(list(column), batch_first=True) for column in zip(*read))
        mask = (torch.arange(content.shape[1]) < length[:, None]).long()
        return {f"{name}_patches": content, f"{name}_position": position, f"{name}_mask": mask}

    # -------------------------------------------------------------------------------------------------------- pictures

    def read_picture(self, picture: Any) -> tuple[Tensor, Tensor]:
        """Patches (N, patch * patch * 3) uint8 and positions (N, 3), row by row."""
        patch, pixels = self.modalities["image"]["patch"], _to_pixels(picture)
        rows, columns = self.grid(pixels.shape[1], pixels.shape[2])
        size = rows * patch, columns * patch
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
        patches = pixels.unflatten(1, (rows, patch)).unflatten(3, (columns, patch))  # (3, rows, patch, columns, patch)
        return patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1).contiguous(), _positions(1, rows, columns)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of these pixels."""
        of = self.modalities["image"]
        limit, patch, ratio = of["max_tokens"], of["patch"], width / height
        if of["square"]:
            own = limit if of["enlarge"] else max(1, round(math.sqrt(width * height) / patch)) ** 2
            side = math.isqrt(min(limit, own))
            return side, side
        if not of["enlarge"]:
            rows, columns = max(1, round(height / patch)), max(1, round(width / patch))
            if rows * columns <= limit:
                return rows, columns
        rows = min(max(1, math.floor(math.sqrt(limit / ratio))), limit)
        columns = min(max(1, math.floor(math.sqrt(limit * ratio))), limit // rows)
        options = [(r, c) for r in (rows, rows + 1) for c in (columns, columns + 1) if r * c <= limit]
        return min(options, key=lambda o: abs(math.log(o[0] / o[1] * ratio)) - 0.5 * math.log(o[0] * o[1]))

    # ---------------------------------------------------------------------------------------------------------- sounds

    def read_sound(self, wave: Any, sampling_rate: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-mel patches (N, patch_mels * patch_frames) and positions (N, 3), column by column."""
        of = self.modalities["audio"]
        if isinstance(wave, dict):
            wave, sampling_rate = wave["array"], wave["sampling_rate"]
        if sampling_rate not in (None, of["sample_rate"]):
            raise ValueError(f"this model reads {of['sample_rate']} samples a second, not {sampling_rate}: resample it")
        if of.get("features", "log_mel") != "log_mel":
            raise ValueError(
                "this model's patches overlap (features: fbank): give audio_patches of multimodal_fm itself"
            )
        wave = torch.as_tensor(np.asarray(wave), dtype=torch.float32)
        wave = wave.mean(0) if wave.ndim == 2 else wave
        rows, samples = of["n_mels"] // of["patch_mels"], of["patch_frames"] * of["hop_length"]
        columns = max(1, min(round(len(wave) / samples), of["max_tokens"] // rows))
        wave = F.pad(wave[: columns * samples], (0, max(0, columns * samples - len(wave))))
        mel = self._log_mel(wave, columns * of["patch_frames"])
        content = mel.unflatten(0, (rows, of["patch_mels"])).unflatten(2, (columns, of["patch_frames"]))
        return content.permute(2, 0, 1, 3).flatten(2).flatten(0, 1).contiguous(), _positions(columns, rows, 1)

    def _log_mel(self, wave: Tensor, frames: int) -> Tensor:
        """(n_mels, frames), normalized over the sound, within 80 dB of its loudest."""
        of = self.modalities["audio"]
        n_fft = 1 << (of["win_length"] - 1).bit_length()
        window = torch.hann_window(of["win_length"])
        bins = torch.stft(wave, n_fft, of["hop_length"], of["win_length"], window, return_complex=True)
        power = bins.real.square() + bins.imag.square()
        mel = _mel_filters(of["sample_rate"], n_fft, of["n_mels"]).T @ power[:, :frames]
        mel = mel.clamp(min=1e-8).log10()
        mel = mel.clamp(min=mel.max() - 8)
        return (mel - mel.mean()) / (mel.std() + 1e-3)


def _mel_filters(rate: int, n_fft: int, count: int) -> Tensor:
    """Triangles (bins, count) on the mel scale of HTK, from 20 Hz to half the sample rate."""
    frequency = torch.linspace(0, rate // 2, n_fft // 2 + 1)
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (20.0, float(rate // 2)))
    corner = 700.0 * (10.0 ** (torch.linspace(low, high, count + 2) / 2595.0) - 1.0)
    slope = corner[None] - frequency[:, None]
    width = corner[1:] - corner[:-1]
    return torch.minimum(-slope[:, :-2] / width[:-1], slope[:, 2:] / width[1:]).clamp(min=0)


def _listed(given: Any) -> Sequence[Any]:
    """A list of inputs, also of one. A list of numbers is one sound."""
    if isinstance(given, (list, tuple)) and len(given) and not isinstance(given[0], (int, float)):
        return given
    return [given]


def _to_pixels(picture: Any) -> Tensor:
    """(3, H, W) uint8, upright, over white where it is transparent, in the memory layout of an array (H, W, 3)."""
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError("a picture as a tensor is (3, H, W) uint8")
        return picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits, or numbers up to any
            values = np.asarray(picture, dtype=np.float64)
            top = 65535.0 if picture.mode.startswith("I") else max(float(values.max(initial=0)), 1e-9)
            picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
        if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = np.array(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError("a picture as an array is (H, W, 3) uint8")
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)


def _positions(times: int, rows: int, columns: int) -> Tensor:
    """(N, 3): time, row, column. In sounds the band is the row."""
    axes = torch.meshgrid(torch.arange(times), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([one.flatten() for one in axes], 1)
