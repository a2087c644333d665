"""One tower of an OpenCLIP model as a model with `block: classic` (Radford et al. 2021; Ilharco et al. 2021).

A folder is what OpenCLIP pushes to the Hub: open_clip_config.json and open_clip_model.safetensors. They are read as
data; `open_clip` is needed for the certificate, and for the tokenizer of a folder without one. The two towers have
blocks of their own, which one shared trunk cannot hold: each is imported as a model, with its projection as the head
`retrieval`, so that vectors of the two models are comparable. Towers of timm, ResNets and Hugging Face's text models
are refused by name.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Config as BackboneConfig
from ..config import build
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..tokenizers import text
from ..tokenizers.base import Tokenizer
from .base import (
    Imported,
    Names,
    Tensors,
    make_model,
    picture_tokenizers,
    read_blocks,
    read_json,
    read_patches,
    read_tensors,
    retrieval_head,
    weight_files,
    whole_number,
)
from .strings import Strings, clip_bpe, import_strings

BLOCK = Names(
    "transformer.resblocks.{}.",
    ("attn.in_proj",),
    "attn.out_proj",
    "ln_1",
    "mlp.c_fc",
    "mlp.c_proj",
    "ln_2",
    "ls_1.gamma",
    "ls_2.gamma",
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's, the default
SWITCHES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
PLAIN: dict[str, Any] = {**dict.fromkeys(SWITCHES, False), "final_ln_after_pool": False, "block_type": None}
PLAIN |= {"act_kwargs": None, "norm_kwargs": None}
VISION = PLAIN | {"attentional_pool": False, "pos_embed_type": "learnable", "pool_type": "tok", "timm_model_name": None}
TEXT = PLAIN | {"embed_cls": False, "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False}
TEXT |= {"proj_type": "linear", "hf_model_name": None}
SIZES = ("layers", "width", "mlp_ratio", "ls_init_value")
OPEN = {"vision": (*SIZES, "head_width", "patch_size", "image_size", "no_ln_pre"), "text": (*SIZES, "heads")}
OPEN["text"] += ("context_length", "vocab_size")
WITHOUT_EFFECT = ("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "eos_id")
WITHOUT_EFFECT += ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "timm_model_pretrained")
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def import_folder(folder: Path, tower: str = "", tokenizer_file: str = "") -> Imported:
    """A tower as a model. Raises UserError for what cannot be expressed or read."""
    if tower not in ("text", "image"):
        raise UserError(f"{folder}: holds two towers, which do not share a trunk; take one: tower 'text' or 'image'")
    config = read_json(folder / "open_clip_config.json")
    model = config.get("model_cfg")
    kind = "vision" if tower == "image" else "text"
    settings = model.get(f"{kind}_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(settings, dict):
        raise UserError(f"{folder / 'open_clip_config.json'}: has no model_cfg with {kind}_cfg")
    _check(settings, kind, folder)
    tensors = Tensors(read_tensors(weight_files(folder, "open_clip_model")), str(folder))
    everything = dict(tensors.all)
    tensors.rename(r"^text\.", "")
    tensors.drop("a buffer", "attn_mask")
    tensors.drop("the temperature, which training alone needs", "logit_scale", "logit_bias")
    visual = r"visual\..*"
    tensors.drop("of the other tower", visual if tower == "text" else rf"(?!{visual}).*")
    tensors.rename(r"^visual\.", "")
    tensors.rename(r"\.in_proj_(weight|bias)$", r".in_proj.\1")
    activation = "quick_gelu" if model.get("quick_gelu") is True else "gelu"
    backbone = _backbone(settings, kind, activation, folder)
    details: dict[str, Any] = {"tokenizer": {}, "ids": None, "differences": []}
    if tower == "image":
        preprocess = config.get("preprocess_cfg")
        mean, std = _normalization(preprocess if isinstance(preprocess, dict) else {}, folder)
        tokenizers = _read_pictures(settings, tensors, folder, mean, std)
        details["differences"].append("pictures are squeezed into the square, where OpenCLIP crops them")
    else:
        mean, std = MEAN, STD
        tokenizers = _read_texts(settings, tensors, folder, tokenizer_file, details)
    read_blocks(tensors, BLOCK, backbone.depth)
    own, projection = ("text", "text_projection") if tower == "text" else ("image", "proj")
    if f"{projection}.weight" in tensors:
        tensors.put(f"heads.retrieval.projection.{own}", f"{projection}.weight", make=torch.t, how="transposed")
    else:
        tensors.put(f"heads.retrieval.projection.{own}", projection)
    heads = retrieval_head(tensors, tokenizers, "last" if tower == "text" else "first", backbone.width)
    tensors.finish()
    made = make_model(backbone, tokenizers, tensors, heads)

    def reference() -> Callable[[Tensor], Tensor]:
        return _original(model, everything, tower, mean, std)

    return Imported(made, tensors, "open_clip", f"CLIP, {tower} tower", reference=reference, **details)


def _check(settings: dict[str, Any], kind: str, folder: Path) -> None:
    """Raises UserError for a setting that changes what is computed in a way that is not ours."""
    known = VISION if kind == "vision" else TEXT
    for name, value in settings.items():
        if name in known and value != known[name] and not (name == "block_type" and value == "default"):
            raise UserError(
                f"{folder}: {kind}_cfg.{name} is {str(value)[:60]!r}, which cannot be expressed: only {known[name]!r}"
            )
        ours = name in known or name in OPEN[kind] or name in WITHOUT_EFFECT or name.startswith(("timm_", "hf_"))
        if not ours:
            raise UserError(f"{folder}: {kind}_cfg.{name[:60]} is not known here")


def _backbone(settings: dict[str, Any], kind: str, activation: str, folder: Path) -> BackboneConfig:
    where = f"{folder / 'open_clip_config.json'}: {kind}_cfg"
    settings = {"head_width": 64, "layers": 12, "mlp_ratio": 4.0, "width": 768 if kind == "vision" else 512} | settings
    width, depth = (whole_number(settings, name, where) for name in ("width", "layers"))
    own: dict[str, Any] = {"num_heads": whole_number({"heads": 8, **settings}, "heads", where)}
    if kind == "vision":
        side = _side(settings, where)
        own = {"num_heads": width // min(whole_number(settings, "head_width", where), width), "grid": [side, side]}
        own |= {"norm_in": settings.get("no_ln_pre") is not True}
    else:
        own["max_positions"] = whole_number({"context_length": 77, **settings}, "context_length", where)
    ratio = {"mlp_ratio": settings["mlp_ratio"], "activation": activation, "norm_eps": 1e-5, "block": "classic"}
    return build(BackboneConfig, {"width": width, "depth": depth} | ratio | own, where)


def _side(settings: dict[str, Any], where: str) -> int:
    settings = {"image_size": 224, "patch_size": 16} | settings
    return whole_number(settings, "image_size", where) // whole_number(settings, "patch_size", where)


def _normalization(preprocess: dict[str, Any], folder: Path) -> tuple[list[float], list[float]]:
    mean, std = preprocess.get("mean", MEAN), preprocess.get("std", STD)
    lists = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3
    if not lists or not all(isinstance(one, float) and abs(one) < 1e3 for one in (*mean, *std)) or 0 in std:
        raise UserError(f"{folder / 'open_clip_config.json'}: preprocess_cfg.mean and std are three numbers each")
    return mean, std


def _read_pictures(
    settings: dict[str, Any], tensors: Tensors, folder: Path, mean: list[float], std: list[float]
) -> dict[str, Tokenizer]:
    where = f"{folder / 'open_clip_config.json'}: vision_cfg"
    if settings.get("no_ln_pre") is not True:
        tensors.norm("backbone.norm_in", "ln_pre")
    tensors.norm("backbone.norm_out", "ln_post")
    read_patches(tensors, "conv1", mean, std)
    positions = "positional_embedding"
    tensors.put("backbone.positions.cell.weight", positions, make=lambda table: table[1:], how="rows from 1 on")
    how = "with its position added"
    tensors.put(
        "embedders.prompt.weight", "class_embedding", positions, make=lambda one, table: (one + table[0])[None], how=how
    )
    patch = whole_number({"patch_size": 16, **settings}, "patch_size", where)
    return picture_tokenizers(patch, _side(settings, where), 1)


def _read_texts(
    settings: dict[str, Any], tensors: Tensors, folder: Path, file: str, details: dict[str, Any]
) -> dict[str, Tokenizer]:
    tensors.norm("backbone.norm_out", "ln_final")
    times = tensors.put("backbone.positions.time.weight", "positional_embedding")
    size = len(tensors.take("token_embedding.weight"))
    form, saved, make, how = "bytes", "", None, "as it is"
    try:
        strings = _strings(folder, size) if file else None
        details["tokenizer"] = {"taken": False, "why": "no file was asked for"}
    except UserError as error:
        strings, details["tokenizer"] = None, {"taken": False, "why": str(error)}
    if strings:
        write_atomic(file, strings.saved.encode())
        form, saved, ids = strings.format, file, strings.ids
        make, how = (lambda table: table[ids]), "rows in the order of our ids"
        details["ids"] = ids
        details["tokenizer"] = {"taken": True, "ids": strings.how, "original_ids_of_0_and_1": ids[:2]}
        details["differences"] += [
            "a special token that stands in a text is read as plain text",
            "a longer text is read in windows whose vectors are averaged, not cut off",
            "broken encodings (ftfy) and HTML entities of a text are not mended",
        ]
    table = tensors.put("embedders.text.weight", "token_embedding.weight", make=make, how=how)
    config = {"vocab_size": len(table), "max_tokens": len(times), "file": saved, "format": form, "causal": True}
    return {"text": text.Tokenizer(build(text.Config, config, str(folder)))}


def _strings(folder: Path, size: int) -> Strings:
    """The tokenizer of the folder, else the one of OpenCLIP's package. Raises UserError."""
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return import_strings(folder, "clip_text_model", (None, None), size)
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.origin or size != 49_408:
        raise UserError(f"{folder}: has no tokenizer.json, and OpenCLIP's own needs open_clip_torch and 49408 ids")
    lines = gzip.decompress((Path(spec.origin).parent / VOCABULARY).read_bytes()).decode().split("\n")
    merges = lines[1 : 49_152 - 256 - 2 + 1]
    printable = sorted(text.letters(), key=lambda letter: (ord(letter) >= 256, ord(letter)))
    names = [*printable, *(f"{letter}</w>" for letter in printable), *(one.replace(" ", "") for one in merges)]
    vocab = {name: number for number, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    saved = clip_bpe(vocab, merges)
    begin, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    how = "ours are the original's and 2; 0 is <|startoftext|> and 1 is <|endoftext|>, which no text can spell"
    return Strings("hugging_face", saved, [begin, end, *range(size)], how)


def _original(
    model: dict[str, Any], tensors: dict[str, Tensor], tower: str, mean: list[float], std: list[float]
) -> Callable[[Tensor], Tensor]:
    """OpenCLIP's own model of the checked settings and the same tensors."""
    from open_clip.model import CLIP, CustomTextCLIP

    parts = {kind: _understood(model[f"{kind}_cfg"], kind) for kind in ("vision", "text")}
    whole: Any = CustomTextCLIP if any(name.startswith("text.") for name in tensors) else CLIP
    bias = {"init_logit_bias": 0.0} if "logit_bias" in tensors else {}
    original = whole(
        embed_dim=whole_number(model, "embed_dim", "model_cfg"),
        vision_cfg=parts["vision"],
        text_cfg=parts["text"],
        quick_gelu=model.get("quick_gelu") is True,
        **bias,
    )
    original.load_state_dict({name: value for name, value in tensors.items() if name != "attn_mask"}, strict=False)
    original.eval()
    if tower == "text":
        side: Any = original.text if whole is CustomTextCLIP else original

        def texts(ids: Tensor) -> Tensor:
            length = len(side.positional_embedding)
            padded = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
            hidden = side.transformer(
                side.token_embedding(padded) + side.positional_embedding, attn_mask=side.attn_mask
            )
            return side.ln_final(hidden)[0, : ids.shape[1]]

        return texts

    def pictures(pixels: Tensor) -> Tensor:
        values = (pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
        found = original.visual.forward_intermediates(
            values.permute(0, 3, 1, 2).float(),
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix, cells = found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]
        return torch.cat([prefix, cells], 1)[0]

    return pictures


def _understood(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that were looked at, and of the other tower those that size it."""
    return {name: value for name, value in settings.items() if name in OPEN[kind] and json.dumps(value) != "null"}
