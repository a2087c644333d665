"""Weights of Hugging Face's BERT, RoBERTa, GPT-2, ViT, ViT-MAE and CLIP as a model with `block: classic`.

    from multimodal_fm.interop.base import save
    from multimodal_fm.interop.hugging_face import from_hugging_face

    model = from_hugging_face("folders/roberta-base", tokenizer_file="runs/roberta/tokenizer.json")
    model.features(text=["a red bus"])
    save(model, "runs/roberta")  # a run as any other: mmfm tune runs/roberta ...

A folder is what `save_pretrained` writes or the Hub holds: config.json and model.safetensors (for pictures also
preprocessor_config.json), which are read as data. Nothing is downloaded, unpickled or executed, and `transformers` is
not needed. The hidden states are those of the original (Devlin et al. 2019, Liu et al. 2019, Radford et al. 2019,
Dosovitskiy et al. 2021, He et al. 2022, Radford et al. 2021).

What is not imported: heads (poolers, decoders of masked words and of pixels, CLIP's projections and temperature; but
`causal_objective` has GPT-2's); BERT's token type 1; tokenizers other than byte-level BPE. T5 is refused:
`MISSING_FOR_T5` says what it would need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..backbone import Config as BackboneConfig
from ..config import build
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..model import Model
from ..objectives import causal
from ..tokenizers import text
from .base import Linear, Names, Tensors, make_model, named, patch_embedding, picture_tokenizers, read_blocks

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
MISSING_FOR_T5 = (
    "attention with a bias by relative position",
    "RMSNorm in a block without rotary embedding",
    "a decoder that reads the encoder by cross attention (here a prefix language model has the weights of both sides)",
)
NO_BYTE_LEVEL = "its tokenizer is not the byte-level BPE of GPT-2, so that it reads ids only: leave out tokenizer_file"
HEADS = (r"pooler\..*", r"cls\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*", r"decoder\..*", r"score\..*")
BUFFERS = (r".*\.position_ids", r"h\.\d+\.attn\.(?:masked_)?bias", r"embeddings\.token_type_ids")
UNUSED = (r"logit_scale", r"(?:text|visual)_projection\.weight", *HEADS, *BUFFERS)


def from_hugging_face(
    folder: str | Path, tower: Literal["", "text", "image"] = "", tokenizer_file: str | Path = ""
) -> Model:
    """The model of a folder, in float32, to be evaluated or tuned; see above for what is imported.

    tower: which one of a CLIP checkpoint that has both. tokenizer_file: where to write the byte-level BPE of a RoBERTa
    or GPT-2 as a file of our text tokenizer. With it the model reads strings, as BEGIN ids END: RoBERTa's `<s>` and
    `</s>`, GPT-2's `<|endoftext|>` on both sides (which the original puts between documents alone); ids are numbered
    anew, in the order of the merges. Without it the ids of `Tokens` are those of the original, and strings cannot be
    read. A mask token that the folder names becomes `mask_tokens.text`. GPT-2 and CLIP's reader of texts are causal:
    `Tokens` for them have the orders 0, 1, 2, ..., which the text tokenizer gives them (`causal: true`).

    Raises UserError for what cannot be expressed or read.
    """
    folder = Path(folder)
    settings = _read_json(folder / "config.json")
    kind = str(settings.get("model_type"))
    if kind == "clip":
        if tower not in ("text", "image"):
            raise UserError(f"{folder}: holds two towers; say tower='text' or tower='image'")
        name = "text" if tower == "text" else "vision"
        settings, kind = settings.get(f"{name}_config") or {}, f"clip_{name}_model"
    if kind in ("t5", "mt5", "umt5"):
        raise UserError(f"{folder}: T5 cannot be expressed; missing: {'; '.join(MISSING_FOR_T5)}")
    if kind not in READERS:
        raise UserError(f"{folder}: model_type {kind!r} is none of {', '.join(READERS)}, clip")
    tensors = Tensors(_read_tensors(folder), str(folder))
    if tower:
        tensors.drop(r"vision_model\..*" if tower == "text" else r"text_model\..*")
    for name in ("bert.", "roberta.", "transformer.", "vit.", "text_model.", "vision_model."):
        tensors.strip(name)
    tensors.drop(*UNUSED)
    model = READERS[kind](_Source(folder, settings, tensors, str(tokenizer_file)))
    tensors.finish()
    return model


def causal_objective(model: Model) -> dict[str, causal.Objective]:
    """What GPT-2 was trained by, to score and continue texts: its decoder is the table of its ids' vectors, of which
    this is a copy. The name is that of `objectives.load`: {"text/causal": ...}."""
    objective = causal.Objective(causal.Config(), model, ["text"])
    logits: Any = objective.predictors["text"]
    logits = logits.logits
    with torch.no_grad():
        logits.weight.copy_(model.get_parameter("embedders.text.weight"))
        if torch.equal(logits.weight[text.BEGIN], logits.weight[text.END]):  # one id of the original, which ends a text
            logits.bias[text.BEGIN] = -1e4
    return {"text/causal": objective.to(model.device).eval()}


@dataclass
class _Source:
    """What is read, and what the user asked for."""

    folder: Path
    settings: dict[str, Any]
    tensors: Tensors
    tokenizer_file: str

    def backbone(self, **own: Any) -> BackboneConfig:
        """Width, depth and the like, and what is special about a model. Raises UserError."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        width, depth, num_heads, hidden = map(self.whole_number, names)
        activation = self.settings.get("hidden_act")
        if activation not in ACTIVATIONS:
            raise UserError(f"{self.folder}: its activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        settings = {
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": hidden / width,
            "block": "classic",
            "norm_eps": self.settings.get("layer_norm_eps"),
            "activation": ACTIVATIONS[activation],
        }
        return build(BackboneConfig, settings | own, f"{self.folder / 'config.json'}")

    def whole_number(self, name: str) -> int:
        value = self.settings.get(name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.folder / 'config.json'}: {name} is a whole number from 1 up, not {value!r}")
        return value


BERT = Names(
    "encoder.layer.{}.",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
GPT2 = Names("h.{}.", ("attn.c_attn",), "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
VIT = Names(
    "encoder.layer.{}.",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "layernorm_before",
    "intermediate.dense",
    "output.dense",
    "layernorm_after",
)
CLIP = Names(
    "encoder.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.out_proj",
    "layer_norm1",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm2",
)
CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
CLIP_TEXT = {**CLIP_DEFAULTS, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
CLIP_VISION = {**CLIP_DEFAULTS, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
CLIP_VISION |= {"image_size": 224, "patch_size": 32}
"""What a configuration of CLIP may leave out."""


def _bert(source: _Source) -> Model:
    """BERT and RoBERTa. The vector of token type 0, which all tokens get, is that of the modality."""
    tensors, settings = source.tensors, source.settings
    # as the oldest checkpoints have it
    tensors.left = {n.replace(".gamma", ".weight").replace(".beta", ".bias"): v for n, v in tensors.left.items()}
    roberta = settings["model_type"] == "roberta"
    first = int(settings.get("pad_token_id") or 0) + 1 if roberta else 0  # RoBERTa counts from behind its padding
    times = tensors.take("embeddings.position_embeddings.weight")[first:]
    backbone = source.backbone(norm="post", norm_in=True, max_positions=len(times))
    found = {
        "modality_vectors.text": tensors.take("embeddings.token_type_embeddings.weight")[0],
        "backbone.positions.time.weight": times,
        **named("backbone.norm_in", tensors.norm("embeddings.LayerNorm")),
        **read_blocks(tensors, BERT, backbone.depth),
    }
    return _text_model(source, backbone, found, tensors.take("embeddings.word_embeddings.weight"))


def _gpt2(source: _Source) -> Model:
    tensors, of = source.tensors, source.settings
    if not of.get("scale_attn_weights", True) or of.get("scale_attn_by_inverse_layer_idx", False):
        raise UserError(f"{source.folder}: scales attention otherwise than by the root of a head's width")
    tensors.left = {n: v.T if re.fullmatch(r"h\.\d+\.\w+\.c_\w+\.weight", n) else v for n, v in tensors.left.items()}
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    names |= {"activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps"}
    of |= {name: of[theirs] for theirs, name in names.items() if theirs in of}
    of["intermediate_size"] = of.get("n_inner") or 4 * source.whole_number("hidden_size")
    times = tensors.take("wpe.weight")
    backbone = source.backbone(max_positions=len(times))
    found = {
        "backbone.positions.time.weight": times,
        **read_blocks(tensors, GPT2, backbone.depth),
        **named("backbone.norm_out", tensors.norm("ln_f")),
    }
    return _text_model(source, backbone, found, tensors.take("wte.weight"), causal=True)


def _clip_text(source: _Source) -> Model:
    tensors, source.settings = source.tensors, CLIP_TEXT | source.settings
    times = tensors.take("embeddings.position_embedding.weight")
    backbone = source.backbone(max_positions=len(times))
    found = {
        "backbone.positions.time.weight": times,
        **read_blocks(tensors, CLIP, backbone.depth),
        **named("backbone.norm_out", tensors.norm("final_layer_norm")),
    }
    return _text_model(source, backbone, found, tensors.take("embeddings.token_embedding.weight"), causal=True)


def _clip_vision(source: _Source) -> Model:
    """Its output is what `post_layernorm` makes of each token: of the class token that is the original's pooled one."""
    tensors, source.settings = source.tensors, CLIP_VISION | source.settings
    found = {
        **named("backbone.norm_in", tensors.norm("pre_layrnorm")),
        **named("backbone.norm_out", tensors.norm("post_layernorm")),
    }
    return _picture_model(
        source,
        CLIP,
        found,
        tensors.take("embeddings.class_embedding"),
        tensors.take("embeddings.position_embedding.weight"),
        tensors.linear("embeddings.patch_embedding"),
        norm_in=True,
    )


def _vit(source: _Source) -> Model:
    """ViT and the encoder of ViT-MAE."""
    tensors = source.tensors
    found = named("backbone.norm_out", tensors.norm("layernorm"))
    if "embeddings.mask_token" in tensors:
        found["mask_tokens.image"] = tensors.take("embeddings.mask_token").flatten()
    return _picture_model(
        source,
        VIT,
        found,
        tensors.take("embeddings.cls_token").flatten(),
        tensors.take("embeddings.position_embeddings")[0],
        tensors.linear("embeddings.patch_embeddings.projection"),
    )


READERS: dict[str, Callable[[_Source], Model]] = {
    "bert": _bert,
    "roberta": _bert,
    "gpt2": _gpt2,
    "vit": _vit,
    "vit_mae": _vit,
    "clip_text_model": _clip_text,
    "clip_vision_model": _clip_vision,
}


def _picture_model(
    source: _Source,
    names: Names,
    found: dict[str, Tensor],
    class_token: Tensor,
    positions: Tensor,
    convolution: Linear,
    **own: Any,
) -> Model:
    """class_token (D,), positions (1 + rows * columns, D), of which the first is the class token's."""
    patch = source.whole_number("patch_size")
    side = source.whole_number("image_size") // patch
    backbone = source.backbone(grid=[side, side], **own)
    found |= {
        "embedders.prompt.weight": (class_token + positions[0])[None],
        "backbone.positions.cell.weight": positions[1:],
        **named("embedders.image.project", patch_embedding(convolution, *_normalization(source.folder))),
        **read_blocks(source.tensors, names, backbone.depth),
    }
    return make_model(backbone, picture_tokenizers(patch, side, 1), found, str(source.folder))


def _normalization(folder: Path) -> tuple[list[float], list[float], float]:
    """Mean and standard deviation of each color, and what pixels are multiplied by before. Raises UserError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            of = _read_json(folder / name)
            of = of.get("image_processor", of)
            scale = float(of.get("rescale_factor", 1 / 255)) if of.get("do_rescale", True) else 1.0
            if not of.get("do_normalize", True):
                return [0.0] * 3, [1.0] * 3, scale
            mean, std = of.get("image_mean"), of.get("image_std")
            if not all(isinstance(one, list) and len(one) == 3 for one in (mean, std)):
                raise UserError(f"{folder / name}: image_mean and image_std are three numbers each")
            return mean, std, scale
    raise UserError(f"{folder}: has no preprocessor_config.json, which says how pixels are normalized")


def _text_model(
    source: _Source, backbone: BackboneConfig, found: dict[str, Tensor], table: Tensor, causal: bool = False
) -> Model:
    """table (V, D): the vectors of the original's ids."""
    folder, file = source.folder, source.tokenizer_file
    mask = _mask_id(folder)
    if mask is not None and mask < len(table):
        found["mask_tokens.text"] = table[mask]
    if file:
        if source.settings.get("model_type") not in ("roberta", "gpt2"):
            raise UserError(f"{folder}: {NO_BYTE_LEVEL}")
        saved, ids = _byte_level(folder)
        ends = [source.settings.get(f"{end}_token_id") for end in ("bos", "eos")]
        if not all(isinstance(end, int) and 0 <= end < len(table) for end in ends) or max(ids) >= len(table):
            raise UserError(f"{folder}: the ids of its tokenizer do not fit its {len(table)} vectors")
        write_atomic(file, json.dumps(saved, ensure_ascii=False).encode())
        table = table[[*ends, *ids]]
    try:
        config = text.Config(vocab_size=len(table), max_tokens=backbone.max_positions, file=file, causal=causal)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    found["embedders.text.weight"] = table
    return make_model(backbone, {"text": text.Tokenizer(config)}, found, str(folder))


def _byte_level(folder: Path) -> tuple[dict, list[int]]:
    """A file of `tokenizers` with the bytes in the order of their values and then the merges in theirs, and the
    original's id of each of its tokens. Raises UserError where the original is no byte-level BPE as GPT-2 has it."""
    wrong = f"{folder}: {NO_BYTE_LEVEL}"
    if (folder / "tokenizer.json").exists():
        saved = _read_json(folder / "tokenizer.json")
        model, step = saved.get("model", {}), saved.get("pre_tokenizer") or {}
        plain = step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space")
        if model.get("type", "BPE") != "BPE" or not plain or saved.get("normalizer"):
            raise UserError(wrong)
        vocab, merges = model.get("vocab", {}), model.get("merges", [])
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab = _read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise UserError(wrong)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    tokens = [*text.letters(), *("".join(pair) for pair in pairs)]
    if len(set(tokens)) < len(tokens) or not all(isinstance(vocab.get(token), int) for token in tokens):
        raise UserError(wrong)
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [" ".join(p) for p in pairs]}
    saved = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": step, "decoder": step}
    return {**saved, "model": model}, [vocab[token] for token in tokens]


def _mask_id(folder: Path) -> int | None:
    """The id of [MASK] or <mask>, where a file of the tokenizer names it."""
    found: dict[str, Any] = {}
    if (folder / "tokenizer.json").exists():
        added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
        found = {str(token.get("content")): token.get("id") for token in added}
    elif (folder / "vocab.json").exists():
        found = _read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").exists():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        found = {line: number for number, line in enumerate(lines)}
    return next((found[name] for name in ("[MASK]", "<mask>") if isinstance(found.get(name), int)), None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds no map of keys")
    return data


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that its index names. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted({Path(str(name)).name for name in _read_json(index).get("weight_map", {}).values()})
    tensors = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from None
    return tensors
