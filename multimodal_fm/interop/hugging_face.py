"""Weights of Hugging Face's BERT, RoBERTa, GPT-2, ViT, AST, CLIP and the like as a model with `block: classic`.

    from multimodal_fm.interop.base import save
    from multimodal_fm.interop.hugging_face import from_hugging_face

    model = from_hugging_face("folders/bert-base-uncased", tokenizer_file="runs/bert/tokenizer.json")
    model.features(text=["a red bus"])
    save(model, "runs/bert")  # a run as any other: mmfm tune runs/bert ...

A folder is what `save_pretrained` writes or the Hub holds: config.json and model.safetensors (for pictures and sounds
also preprocessor_config.json), which are read as data, by the names on disk. Nothing is unpickled or executed, and
`transformers` is needed for the certificate alone. The hidden states are those of the original (Devlin et al. 2019, Liu
et al. 2019, Radford et al. 2019, Dosovitskiy et al. 2021, He et al. 2022, Gong et al. 2021, Radford et al. 2021).

What is not imported: poolers, decoders of masked words and of pixels, classifiers (but `causal_objective` has GPT-2's
decoder); BERT's token type 1. What has attention of another kind is refused: `REFUSED` says why.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from ..backbone import Config as BackboneConfig
from ..config import build
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..model import Model
from ..objectives import causal
from ..objectives.base import Objective
from ..tokenizers import audio, text
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
    with_prompt,
)
from .strings import find_mask, import_strings

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
REFUSED = {
    **dict.fromkeys(("t5", "mt5", "umt5"), f"T5 cannot be expressed; missing: {'; '.join(MISSING_FOR_T5)}"),
    "mpnet": "MPNet cannot be expressed; missing: attention with a bias by relative position",
    "deberta-v2": "DeBERTa cannot be expressed; missing: attention that reads content and relative position apart",
}
HEADS = (r"pooler\..*", r"cls\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*", r"decoder\..*", r"score\..*")
HEADS += (r"vocab_\w+\..*", r"pre_classifier\..*", r"distillation_classifier\..*", r"cls_classifier\..*")
BUFFERS = (r".*\.position_ids", r"h\.\d+\.attn\.(?:masked_)?bias", r"embeddings\.token_type_ids")
PREFIXES = "bert|roberta|distilbert|transformer|vit|deit|audio_spectrogram_transformer|text_model|vision_model"
POOLING = {"cls": "first", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' names and ours


@dataclass(frozen=True)
class Architecture:
    """What the tensors and the settings of a model_type are called, and what is special about it."""

    cls: str  # in transformers
    block: Names
    embedding: str  # the vectors of ids, or the convolution over patches
    positions: str
    norms: dict[str, str]  # ours -> theirs
    modality: Literal["text", "image", "audio"] = "text"
    post: bool = False  # LayerNorm after the sum of each branch
    causal: bool = False
    padding_first: bool = False  # the table of positions begins behind the padding's id, as RoBERTa's
    tokens: tuple[str, ...] = ()  # learned tokens before the patches, which have the first positions
    token_type: str = ""  # the vectors of token types
    mask_token: str = ""
    projection: str = ""  # of the vector that is compared, as our head `retrieval` has it
    pool: str = "mean"  # the token that it projects
    settings: dict[str, str] = field(default_factory=dict)  # ours -> theirs, where they differ
    defaults: dict[str, Any] = field(default_factory=dict)  # of what a configuration may leave out
    expected: dict[str, Any] = field(default_factory=dict)  # settings that change what is computed -> what they must be


BERT_BLOCK = Names(
    "encoder.layer.{}.",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
DISTILBERT_BLOCK = Names(
    "layer.{}.",  # behind `transformer.`, a prefix of GPT-2's too
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
GPT2_BLOCK = Names("h.{}.", ("attn.c_attn",), "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2", transposed=True)
VIT_BLOCK = Names(
    "encoder.layer.{}.",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "layernorm_before",
    "intermediate.dense",
    "output.dense",
    "layernorm_after",
)
CLIP_BLOCK = Names(
    "encoder.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.out_proj",
    "layer_norm1",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm2",
)
NORM_IN = {"backbone.norm_in": "embeddings.LayerNorm"}
SIZES = ("width", "hidden_size"), ("depth", "num_hidden_layers"), ("num_heads", "num_attention_heads")
SIZES += (("hidden", "intermediate_size"),)
ENCODER = {"is_decoder": False, "position_embedding_type": "absolute"}
CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
BERT = Architecture(
    "BertModel",
    BERT_BLOCK,
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    NORM_IN,
    post=True,
    token_type="embeddings.token_type_embeddings.weight",
    expected=ENCODER,
)
ROBERTA = Architecture(
    "RobertaModel",
    BERT_BLOCK,
    BERT.embedding,
    BERT.positions,
    NORM_IN,
    post=True,
    padding_first=True,
    token_type=BERT.token_type,
    expected=ENCODER,
)
VIT = Architecture(
    "ViTModel",
    VIT_BLOCK,
    "embeddings.patch_embeddings.projection",
    "embeddings.position_embeddings",
    {"backbone.norm_out": "layernorm"},
    "image",
    tokens=("embeddings.cls_token",),
    mask_token="embeddings.mask_token",
)
DISTILLED = ("embeddings.cls_token", "embeddings.distillation_token")
ARCHITECTURES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": Architecture(
        "DistilBertModel",
        DISTILBERT_BLOCK,
        BERT.embedding,
        BERT.positions,
        NORM_IN,
        post=True,
        settings={"width": "dim", "depth": "n_layers", "num_heads": "n_heads", "hidden": "hidden_dim"}
        | {"activation": "activation"},
        defaults={"layer_norm_eps": 1e-12},
    ),
    "gpt2": Architecture(
        "GPT2Model",
        GPT2_BLOCK,
        "wte.weight",
        "wpe.weight",
        {"backbone.norm_out": "ln_f"},
        causal=True,
        settings={"width": "n_embd", "depth": "n_layer", "num_heads": "n_head", "hidden": "n_inner"}
        | {"activation": "activation_function", "norm_eps": "layer_norm_epsilon", "max_positions": "n_positions"},
        expected={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    "vit": VIT,
    "vit_mae": Architecture(
        "ViTMAEModel", VIT_BLOCK, VIT.embedding, VIT.positions, VIT.norms, "image", tokens=VIT.tokens
    ),
    "deit": Architecture(
        "DeiTModel", VIT_BLOCK, VIT.embedding, VIT.positions, VIT.norms, "image", tokens=DISTILLED,
        mask_token=VIT.mask_token,
    ),
    "audio-spectrogram-transformer": Architecture(
        "ASTModel", VIT_BLOCK, VIT.embedding, VIT.positions, VIT.norms, "audio", tokens=DISTILLED
    ),
    "clip_text_model": Architecture(
        "CLIPTextModel",
        CLIP_BLOCK,
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        {"backbone.norm_out": "final_layer_norm"},
        causal=True,
        projection="text_projection.weight",
        pool="last",
        defaults=CLIP_DEFAULTS | {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
    ),
    "clip_vision_model": Architecture(
        "CLIPVisionModel",
        CLIP_BLOCK,
        "embeddings.patch_embedding",
        "embeddings.position_embedding.weight",
        {"backbone.norm_in": "pre_layrnorm", "backbone.norm_out": "post_layernorm"},
        "image",
        tokens=("embeddings.class_embedding",),
        projection="visual_projection.weight",
        pool="first",
        defaults=CLIP_DEFAULTS
        | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
        | {"image_size": 224, "patch_size": 32},
    ),
}  # fmt: skip


def from_hugging_face(
    folder: str | Path, tower: Literal["", "text", "image"] = "", tokenizer_file: str | Path = ""
) -> Model:
    """The model of a folder, in float32, to be evaluated or tuned; see above for what is imported.

    tower: which one of a CLIP checkpoint that has both. tokenizer_file: where to write the tokenizer of texts as a file
    of our text tokenizer. With it the model reads strings, as BEGIN ids END, and ids are numbered anew. Without it the
    ids of `Tokens` are those of the original, and strings cannot be read. A mask token that the folder names becomes
    `mask_tokens.text`. GPT-2 and CLIP's reader of texts are causal: `Tokens` for them have the orders 0, 1, 2, ...,
    which the text tokenizer gives them (`causal: true`).

    Raises UserError for what cannot be expressed or read.
    """
    return import_folder(Path(folder), tower, str(tokenizer_file)).model


def import_folder(folder: Path, tower: str = "", tokenizer_file: str = "", optional: bool = False) -> Imported:
    """As `from_hugging_face`, with where each tensor comes from. optional: a model without a tokenizer that can be
    taken over reads ids; otherwise that is an error."""
    inner = _transformer_folder(folder)
    settings = read_json(inner / "config.json")
    kind = str(settings.get("model_type"))
    if kind == "clip":
        if tower not in ("text", "image"):
            raise UserError(
                f"{folder}: holds two towers, which do not share a trunk; take one: tower 'text' or 'image'"
            )
        name = "text" if tower == "text" else "vision"
        settings, kind = settings.get(f"{name}_config") or {}, f"clip_{name}_model"
    elif tower:
        raise UserError(f"{folder}: model_type {kind!r} is one model; only CLIP has towers")
    if kind in REFUSED:
        raise UserError(f"{folder}: {REFUSED[kind]}")
    if kind not in ARCHITECTURES or not isinstance(settings, dict):
        raise UserError(f"{folder}: model_type {kind[:60]!r} is none of {', '.join(ARCHITECTURES)}, clip")
    tensors = Tensors(read_tensors(weight_files(inner)), str(folder))
    if tower:
        tensors.drop("of the other tower", r"vision_model\..*" if tower == "text" else r"text_model\..*")
        other = "visual" if tower == "text" else "text"
        tensors.drop("of the other tower", rf"{other}_projection\.weight")
    for _ in range(2 if kind == "distilbert" else 1):
        tensors.rename(rf"^(?:{PREFIXES})\.", "")
    tensors.rename(r"\.gamma$", ".weight")  # as the oldest checkpoints have it
    tensors.rename(r"\.beta$", ".bias")
    tensors.drop("a buffer", *BUFFERS)
    source = _Source(inner, folder, kind, ARCHITECTURES[kind], settings, tensors)
    return source.read(tokenizer_file, optional)


def causal_objective(model: Model) -> dict[str, Objective]:
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


def _transformer_folder(folder: Path) -> Path:
    """Where config.json is: in old folders of sentence-transformers one folder deeper."""
    deeper = folder / "0_Transformer"
    return deeper if not (folder / "config.json").exists() and (deeper / "config.json").exists() else folder


@dataclass
class _Source:
    """A folder that is read."""

    folder: Path
    outer: Path  # the same, but for old folders of sentence-transformers
    kind: str
    architecture: Architecture
    settings: dict[str, Any]
    tensors: Tensors

    def __post_init__(self):
        own = self.architecture
        self.settings = own.defaults | self.settings
        for name, value in own.expected.items():
            if self.settings.get(name, value) != value:
                raise UserError(
                    f"{self.folder}: {name} is {self.settings[name]!r}, which cannot be expressed: only {value!r}"
                )

    def read(self, tokenizer_file: str, optional: bool) -> Imported:
        own, tensors = self.architecture, self.tensors
        result: dict[str, Any] = {"tokenizer": {}, "ids": None, "differences": []}
        if own.modality == "text":
            backbone, tokenizers = self._read_texts(tokenizer_file, optional, result)
        else:
            backbone, tokenizers = self._read_patches(result["differences"])
        for ours, theirs in own.norms.items():
            tensors.norm(ours, theirs)
        read_blocks(tensors, own.block, backbone.depth)
        heads = self._read_head(tokenizers, backbone.width, result["differences"])
        tensors.drop("a head or decoder, not needed for the hidden states", *HEADS)
        tensors.drop("the temperature, which training alone needs", "logit_scale")
        tensors.finish()
        model = make_model(backbone, tokenizers, tensors, heads)
        objectives = causal_objective(model) if self.kind == "gpt2" and tokenizers["text"].file else {}
        library = "transformers"
        return Imported(model, tensors, library, self.kind, objectives=objectives, reference=self._reference, **result)

    def _backbone(self, **more: Any) -> BackboneConfig:
        """Width, depth and the like, and what is special about a model. Raises UserError."""
        own, where = self.architecture, self.folder / "config.json"
        if self.kind == "gpt2" and self.settings.get("n_inner") is None:
            self.settings["n_inner"] = 4 * whole_number(self.settings, "n_embd", where)
        width, depth, num_heads, hidden = (
            whole_number(self.settings, own.settings.get(ours, theirs), where) for ours, theirs in SIZES
        )
        activation = str(self.settings.get(own.settings.get("activation", "hidden_act")))
        if activation not in ACTIVATIONS:
            raise UserError(f"{self.folder}: its activation {activation[:60]!r} is none of {', '.join(ACTIVATIONS)}")
        settings = {
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": hidden / width,
            "block": "classic",
            "norm": "post" if own.post else "pre",
            "norm_in": "backbone.norm_in" in own.norms,
            "norm_eps": self.settings.get(own.settings.get("norm_eps", "layer_norm_eps")),
            "activation": ACTIVATIONS[activation],
        }
        return build(BackboneConfig, settings | more, str(where))

    def _read_texts(
        self, file: str, optional: bool, result: dict[str, Any]
    ) -> tuple[BackboneConfig, dict[str, Tokenizer]]:
        own, tensors, where = self.architecture, self.tensors, self.folder / "config.json"
        first = 0
        if own.padding_first:
            padding = self.settings.get("pad_token_id", 1)
            first = 1 + padding if type(padding) is int and 0 <= padding < 100 else 1
        times = tensors.put(
            "backbone.positions.time.weight",
            own.positions,
            make=lambda table: table[first:],
            how=f"rows from {first} on",
        )
        backbone = self._backbone(max_positions=len(times))
        if own.token_type:
            row = "row 0, the token type that all tokens of one text have"
            tensors.put("modality_vectors.text", own.token_type, make=lambda table: table[0], how=row)
            if len(tensors.take(own.token_type)) > 1:
                tensors.leave(own.token_type, "rows from 1 on: the token types of a second text")
        size = len(tensors.take(own.embedding))
        rows = {"vocab_size": size, own.settings.get("max_positions", "max_position_embeddings"): len(times) + first}
        rows |= {"type_vocab_size": len(tensors.take(own.token_type))} if own.token_type else {}
        for name, found in rows.items():
            if self.settings.get(name, found) != found:
                raise UserError(f"{where}: {name} is {str(self.settings[name])[:40]}, its table has {found} rows")
        if (mask := find_mask(self.folder)) is not None and 0 <= mask < size:
            tensors.put("mask_tokens.text", own.embedding, make=lambda table: table[mask], how=f"row {mask}, [MASK]")
        form, saved = "bytes", ""
        if file:
            try:
                ends = self.settings.get("bos_token_id"), self.settings.get("eos_token_id")
                strings = import_strings(self.folder, self.kind, ends, size)
                write_atomic(file, strings.saved.encode())
                form, saved, result["ids"] = strings.format, file, strings.ids
                result["tokenizer"] = {"taken": True, "ids": strings.how, "original_ids_of_0_and_1": strings.ids[:2]}
            except UserError as error:
                if not optional:
                    raise
                result["tokenizer"] = {"taken": False, "why": str(error)}
        ids = result["ids"]
        how = "as it is" if ids is None else "rows in the order of our ids"
        make = None if ids is None else lambda table: table[ids]
        table = tensors.put("embedders.text.weight", own.embedding, make=make, how=how)
        config = {"vocab_size": len(table), "max_tokens": self._max_tokens(backbone), "file": saved, "format": form}
        if saved:
            result["differences"].append("a special token that stands in a text is read as plain text")
        result["differences"].append("a longer text is read in windows whose vectors are averaged, not cut off")
        return backbone, {"text": text.Tokenizer(build(text.Config, config | {"causal": own.causal}, str(where)))}

    def _max_tokens(self, backbone: BackboneConfig) -> int:
        """Tokens that a text is cut to, as sentence-transformers' own setting or the tokenizer's has it."""
        most = backbone.max_positions
        for name, key in (
            ("sentence_bert_config.json", "max_seq_length"),
            ("tokenizer_config.json", "model_max_length"),
        ):
            file = self.folder / name
            given = read_json(file).get(key) if file.exists() else None
            if type(given) is int and given >= 3:
                return min(given, most)
        return most

    def _read_patches(self, differences: list[str]) -> tuple[BackboneConfig, dict[str, Tokenizer]]:
        own, tensors, where = self.architecture, self.tensors, self.folder / "config.json"
        patch, count = whole_number(self.settings, "patch_size", where), len(own.tokens)
        if own.modality == "image":
            side = whole_number(self.settings, "image_size", where) // patch
            grid = [side, side]
            read_patches(tensors, own.embedding, *_normalization(self.folder))
            differences.append(
                "pictures are squeezed into the square, whatever crop the original's own processor makes"
            )
        else:
            grid, config = self._sounds(patch)
            tokenizers: dict[str, Tokenizer] = {"audio": audio.Tokenizer(config)}
        tensors.put(
            "backbone.positions.cell.weight",
            own.positions,
            make=lambda table: _rows(table)[count:],
            how=f"rows from {count} on",
        )
        tensors.put(
            "embedders.prompt.weight", *own.tokens, own.positions, make=_prefix, how="each with its position added"
        )
        if own.mask_token and own.mask_token in tensors:
            tensors.put(f"mask_tokens.{own.modality}", own.mask_token, make=torch.flatten, how="flat")
        backbone = self._backbone(grid=grid)
        if own.modality == "image":
            return backbone, picture_tokenizers(patch, grid[0], count)
        return backbone, with_prompt(tokenizers, count)

    def _sounds(self, patch: int) -> tuple[list[int], audio.Config]:
        """The grid of bands and times, and the tokenizer that reads sounds as the original's feature extractor."""
        where = self.folder / "config.json"
        mels, frames, mel_stride, stride = (
            whole_number(self.settings, name, where)
            for name in ("num_mel_bins", "max_length", "frequency_stride", "time_stride")
        )
        file = self.folder / "preprocessor_config.json"
        if not file.exists():
            raise UserError(f"{self.folder}: has no preprocessor_config.json, which says how sounds are normalized")
        of = read_json(file)
        mean, std = (of.get("mean"), of.get("std")) if of.get("do_normalize", True) else (0.0, 0.5)
        if not _is_number(mean) or not _is_number(std) or not std:
            raise UserError(f"{file}: mean and std are numbers, std not 0")
        grid = [(mels - patch) // mel_stride + 1, (frames - patch) // stride + 1]
        if min(grid) < 1:
            raise UserError(f"{where}: a patch of {patch} is larger than the spectrogram")
        config = {
            "features": "fbank",
            "sample_rate": of.get("sampling_rate", 16_000),
            "n_mels": mels,
            "patch_mels": patch,
            "patch_frames": patch,
            "stride_mels": mel_stride,
            "stride_frames": stride,
            "max_tokens": grid[0] * grid[1],
        }
        how = f"flat, with the normalization (mean {mean}, std {std}) worked in"
        name = self.architecture.embedding
        self.tensors.put(
            "embedders.audio.project.weight", f"{name}.weight", make=lambda w: w.flatten(1) / (2 * std), how=how
        )
        self.tensors.put(
            "embedders.audio.project.bias",
            *(f"{name}.{own}" for own in ("weight", "bias")),
            make=lambda w, b: (b.double() - w.double().flatten(1).sum(1) * (mean / (2 * std))).float(),
            how=how,
        )
        return grid, build(audio.Config, config, str(file))

    def _read_head(self, tokenizers: dict[str, Tokenizer], width: int, differences: list[str]) -> dict[str, Any]:
        """CLIP's projection, or what sentence-transformers does with the hidden states, as the head `retrieval`."""
        own, tensors = self.architecture, self.tensors
        name = f"heads.retrieval.projection.{own.modality}"
        if own.projection and own.projection in tensors:
            tensors.put(name, own.projection, make=torch.t, how="transposed")
            return retrieval_head(tensors, tokenizers, own.pool, width)
        pool = self._sentence_pooling(differences) if (self.outer / "modules.json").exists() else ""
        if not pool:
            return {}
        tensors.found[name] = torch.eye(width)
        tensors.mapping.append(
            {"ours": name, "shape": [width, width], "theirs": {}, "how": f"identity: {pool} pooling"}
        )
        return retrieval_head(tensors, tokenizers, pool, width)

    def _sentence_pooling(self, differences: list[str]) -> str:
        """How a folder of sentence-transformers pools, in our words; empty, and said, where it does more than that."""
        try:
            modules = json.loads((self.outer / "modules.json").read_text(encoding="utf-8"))
            steps = [(str(one["type"]).rpartition(".")[2], Path(str(one["path"])).name) for one in modules]
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(f"{self.outer / 'modules.json'} cannot be read: {error}") from None
        names = [name for name, _ in steps]
        if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            differences.append(f"no retrieval head: modules.json does more than pool: {', '.join(names)[:200]}")
            return ""
        of = read_json(self.outer / steps[1][1] / "config.json")
        modes = [
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name in of
            if name.startswith("pooling_mode_") and of[name] is True
        ]
        modes = modes or [str(of.get("pooling_mode"))]
        if len(modes) != 1 or modes[0] not in POOLING:
            differences.append(
                f"no retrieval head: its pooling ({', '.join(modes)[:80]}) is none of {', '.join(POOLING)}"
            )
            return ""
        return POOLING[modes[0]]

    def _reference(self) -> Callable[[Tensor], Tensor]:
        """The original, loaded from its weights and from no more settings than were understood here."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        cls = getattr(transformers, self.architecture.cls)
        with tempfile.TemporaryDirectory() as folder:
            for file in weight_files(self.folder):
                (Path(folder) / file.name).symlink_to(file.resolve())
            index = self.folder / "model.safetensors.index.json"
            if index.exists():
                files = {name: Path(str(file)).name for name, file in read_json(index).get("weight_map", {}).items()}
                (Path(folder) / index.name).write_text(json.dumps({"metadata": {}, "weight_map": files}))
            known = {name: self.settings[name] for name in UNDERSTOOD if name in self.settings}
            config = cls.config_class(**{k: v for k, v in known.items() if isinstance(v, (int, float, str))})
            original = cls.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, attn_implementation="eager"
            ).eval()
        if self.architecture.modality == "image":
            mean, std, scale = _normalization(self.folder)
            own: dict[str, Tensor] = {}
            if self.kind == "vit_mae":  # which shuffles its patches by noise and drops a share of them
                original.config.mask_ratio = 0.0
                own["noise"] = torch.arange(original.embeddings.position_embeddings.shape[1] - 1.0)[None]

            def picture(pixels: Tensor) -> Tensor:
                values = (pixels.double() * scale - torch.tensor(mean)) / torch.tensor(std)
                hidden = original(values.permute(0, 3, 1, 2).float(), **own).last_hidden_state[0]
                return original.post_layernorm(hidden) if self.kind == "clip_vision_model" else hidden

            return picture
        if self.architecture.modality == "audio":
            extractor = transformers.ASTFeatureExtractor(
                **{k: v for k, v in read_json(self.folder / "preprocessor_config.json").items() if k in EXTRACTOR}
            )

            def sound(wave: Tensor) -> Tensor:
                values = extractor(wave[0].numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
                return original(**values).last_hidden_state[0]

            return sound
        return lambda ids: original(ids).last_hidden_state[0]


UNDERSTOOD = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "n_embd", "n_layer", "n_head"),
    *(
        "n_inner",
        "n_positions",
        "activation_function",
        "layer_norm_epsilon",
        "dim",
        "hidden_dim",
        "n_heads",
        "n_layers",
    ),
    *("activation", "image_size", "patch_size", "qkv_bias", "num_mel_bins", "max_length", "frequency_stride"),
    "time_stride",
)
EXTRACTOR = ("sampling_rate", "num_mel_bins", "max_length", "do_normalize", "mean", "std")


def _rows(table: Tensor) -> Tensor:
    """(N, D) of (1, N, D) or (N, D)."""
    return table[0] if table.ndim == 3 else table


def _prefix(*parts: Tensor) -> Tensor:
    """Learned tokens with their positions (C, D); the last of the parts is the table of positions."""
    *tokens, table = parts
    return torch.stack([token.flatten() for token in tokens]) + _rows(table)[: len(tokens)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _normalization(folder: Path) -> tuple[list[float], list[float], float]:
    """Mean and standard deviation of each color, and what pixels are multiplied by before. Raises UserError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            of = read_json(folder / name)
            of = of.get("image_processor", of)
            of = of if isinstance(of, dict) else {}
            scale = of.get("rescale_factor", 1 / 255) if of.get("do_rescale", True) else 1.0
            if not of.get("do_normalize", True):
                return [0.0] * 3, [1.0] * 3, scale
            mean, std = (_list(of.get(key)) for key in ("image_mean", "image_std"))
            if len(mean) != 3 or len(std) != 3 or not all(map(_is_number, (*mean, *std, scale))) or 0 in std:
                raise UserError(f"{folder / name}: image_mean and image_std are three numbers each, image_std not 0")
            return mean, std, scale
    raise UserError(f"{folder}: has no preprocessor_config.json, which says how pixels are normalized")
