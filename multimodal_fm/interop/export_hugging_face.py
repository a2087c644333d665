"""A run as a folder of Hugging Face `transformers`, which sentence-transformers reads too.

A model of one modality with `block: classic` and at most a retrieval head is written as the library's own class (BERT,
RoBERTa, GPT-2, CLIP's readers, ViT), without any code. Every other model is written with the code of `exported/`, which
needs PyTorch and transformers alone:

    AutoModel.from_pretrained("out", trust_remote_code=True)
    SentenceTransformer("out", trust_remote_code=True).encode(["a red bus"])
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import to_data
from ..errors import UserError
from ..tokenizers import text
from ..tokens import Tokens
from .export_base import Source, Written, difference, examples, need, pad, padded_model, read

CODE = Path(__file__).with_name("exported")
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "quick_gelu": "quick_gelu", "relu": "relu"}
OUTPUT = "sentence_embedding"


def write(source: Source, work: Path) -> Written:
    """See the top of the file. Raises UserError without transformers."""
    need("transformers", extra="interop")
    shape = plain_shape(source)
    written = _write_plain(source, work, shape) if shape else _write_custom(source, work)
    (work / "README.md").write_text(_readme(source, shape), encoding="utf-8")
    return written


def _dump(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, file, {"format": "pt"})


# ------------------------------------------------------------------------------------------------------- our own class


def _write_custom(source: Source, work: Path) -> Written:
    """The model with its code."""
    model = padded_model(source)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    _save(tensors, work / "model.safetensors")
    where = "modeling_multimodal_fm.MultimodalFM"
    labels = model.config["heads"].get("classify", {}).get("classes", [])
    config = {
        "model_type": "multimodal_fm",
        "architectures": ["MultimodalFMModel"],
        "auto_map": {
            "AutoConfig": "configuration_multimodal_fm.MultimodalFMConfig",
            "AutoModel": f"{where}Model",
        },
        "dtype": "float32",
        "model": model.config,
        **({"id2label": {str(i): name for i, name in enumerate(labels)}} if labels else {}),
    }
    _dump(work / "config.json", config)
    for file in sorted(CODE.glob("*_multimodal_fm.py")):
        shutil.copyfile(file, work / file.name)
    strings = "text" in source.modalities and _write_strings(source, work)
    processor = {
        "processor_class": "MultimodalFMProcessor",
        "auto_map": {"AutoProcessor": "processing_multimodal_fm.MultimodalFMProcessor"},
        "modalities": model.config["modalities"],
        "reads_strings": bool(strings),
    }
    _dump(work / "processor_config.json", processor)
    _write_sentence_transformer(source, work, bool(strings))
    notes = ["code of its own: trust_remote_code=True", *([] if strings else ["texts are given as ids"])]
    differences = {modality: _check_custom(source, work, modality) for modality in source.modalities}
    return Written(differences, {name: f"model.{name}" for name in model.state_dict()}, notes)


def _check_custom(source: Source, work: Path, modality: str) -> dict[str, float]:
    """The model as read from the folder, by the class that was copied there, against the original."""
    from .exported.modeling_multimodal_fm import MultimodalFMModel

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model: Any = MultimodalFMModel.from_pretrained(work, local_files_only=True).eval()
    sequences = examples(source.model, modality, seed=1)
    content, mask, position = pad(sequences)
    with torch.no_grad():
        given = (content, mask) if modality == "text" else (content, position, mask)
        output = getattr(model, f"get_{modality}_features")(*given)
    found = {"hidden": output.last_hidden_state[output.hidden_mask], "features": output.features}
    found |= {"embeddings": output.pooler_output} if "retrieval" in model.model.heads else {}
    found |= {"logits": output.logits} if output.logits is not None else {}
    return difference(found, read(source.model, modality, sequences))


def _write_sentence_transformer(source: Source, work: Path, strings: bool) -> None:
    """One module, which gives the vectors of each modality (sentence-transformers 5.4 or newer)."""
    able = [name for name in source.modalities if name != "text" or strings]
    methods = {name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"} for name in able}
    if not methods:
        return
    _dump(work / "sentence_bert_config.json", {"modality_config": methods, "module_output_name": OUTPUT})
    _write_modules(work, [("", "sentence_transformers.models.Transformer")])


def _write_modules(work: Path, modules: list[tuple[str, str]]) -> None:
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    _dump(work / "modules.json", listed)
    _dump(work / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})


# -------------------------------------------------------------------------------------------------------------- strings


def _write_strings(source: Source, work: Path) -> bool:
    """tokenizer.json and tokenizer_config.json with the ids of our text tokenizer; whether they could be written."""
    tokenizer: Any = source.model.tokenizers["text"]
    if not tokenizer.file:
        return False
    saved = json.loads(Path(tokenizer.file).read_text(encoding="utf-8"))
    vocab = saved["model"].get("vocab")
    if not isinstance(vocab, dict):  # Unigram has a list of scores
        return False
    names = [_free_name(vocab, "<|begin|>"), _free_name(vocab, "<|end|>")]
    saved["model"]["vocab"] = {names[0]: 0, names[1]: 1, **{token: i + 2 for token, i in vocab.items()}}
    for token in saved.get("added_tokens") or []:
        token["id"] += 2
    saved |= {"truncation": None, "padding": None, "post_processor": _template(names, (0, 1))}
    _dump_strings(work, saved, names, tokenizer.config.max_tokens)
    return True


def _free_name(vocab: dict[str, int], name: str) -> str:
    while name in vocab:
        name = f"{name}_"
    return name


def _template(names: list[str], ids: tuple[int, int]) -> dict[str, Any]:
    """A text is BEGIN ids END."""
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in names)
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}, last]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, last]
    special = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in zip(names, ids, strict=True)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _dump_strings(work: Path, saved: dict, names: list[str], most: int, pad: str = "", mask: str = "") -> None:
    """split_special_tokens: no text can spell a special token."""
    _dump(work / "tokenizer.json", saved)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1]}
    config |= {"cls_token": names[0], "sep_token": names[1], "pad_token": pad or names[1], "model_max_length": most}
    config |= {"mask_token": mask} if mask else {}
    config |= {"split_special_tokens": True, "model_input_names": ["input_ids", "attention_mask"]}
    _dump(work / "tokenizer_config.json", config)


# --------------------------------------------------------------------------------------------------- the library's own


def plain_shape(source: Source) -> str:
    """Which of the library's own classes the model is: bert, roberta, gpt2, clip_text_model, vit or clip_vision_model;
    empty where it is none of them."""
    model, backbone = source.model, source.model.config.backbone
    if backbone.block != "classic" or backbone.experts or set(model.heads) - {"retrieval"}:
        return ""
    tokenizers = model.tokenizers
    if list(tokenizers) == ["text"] and backbone.max_positions and not backbone.grid:
        causal, encoder = tokenizers["text"].config.causal, (backbone.norm, backbone.norm_in) == ("post", True)
        if not causal:
            return ("roberta" if _file_format(source) == "bytes" else "bert") if encoder else ""
        if (backbone.norm, backbone.norm_in) != ("pre", False):
            return ""
        return "clip_text_model" if backbone.activation == "quick_gelu" else "gpt2"
    if set(tokenizers) == {"image", "prompt"} and backbone.grid and not backbone.max_positions:
        image, rows_columns = tokenizers["image"].config, backbone.grid
        fits = image.square and image.enlarge and tokenizers["prompt"].config.count == 1
        fits = fits and backbone.norm == "pre" and rows_columns == [int(image.max_tokens**0.5)] * 2
        if not fits or ("retrieval" in model.heads and not backbone.norm_in):
            return ""
        return "clip_vision_model" if backbone.norm_in else "vit"
    return ""


def _file_format(source: Source) -> str:
    """Of the text tokenizer's file: `bytes`, `hugging_face`; empty without one."""
    tokenizer = source.model.tokenizers["text"]
    return to_data(tokenizer).get("format", "bytes") if tokenizer.file else ""


def _write_plain(source: Source, work: Path, shape: str) -> Written:
    """The model as one of the library's classes."""
    if shape in ("vit", "clip_vision_model"):
        config, tensors, mapping, notes = _pictures(source, work, shape)
    else:
        config, tensors, mapping, notes = _texts(source, work, shape)
    _save(tensors, work / "model.safetensors")
    _dump(work / "config.json", config)
    modality = source.modalities[0]
    return Written({modality: _check_plain(source, work, shape)}, mapping, notes)


def _common(source: Source, shape: str) -> dict[str, Any]:
    of = source.model.config.backbone
    return {
        "model_type": shape,
        "architectures": [ARCHITECTURES[shape]],
        "dtype": "float32",
        "hidden_size": of.width,
        "num_hidden_layers": of.depth,
        "num_attention_heads": of.num_heads,
        "intermediate_size": max(1, round(of.width * of.mlp_ratio)),
        "hidden_act": ACTIVATIONS[of.activation],
        "layer_norm_eps": of.norm_eps,
    }


ARCHITECTURES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "gpt2": "GPT2Model",
    "clip_text_model": "CLIPTextModel",
    "vit": "ViTModel",
    "clip_vision_model": "CLIPVisionModel",
}
LAYERS = ("attention.project_in", "attention.project_out", "norm_1", "feed_forward.project_in", "norm_2")
LAYERS = (*LAYERS, "feed_forward.project_out")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"
_BERT = (*_BERT, "attention.output.LayerNorm", "intermediate.dense", "output.LayerNorm", "output.dense")
_CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
_CLIP = (*_CLIP, "layer_norm1", "mlp.fc1", "layer_norm2", "mlp.fc2")
_VIT = tuple(f"attention.attention.{name}" for name in ("query", "key", "value")), "attention.output.dense"
_VIT = (*_VIT, "layernorm_before", "intermediate.dense", "layernorm_after", "output.dense")
_GPT2 = ("attn.c_attn",), "attn.c_proj", "ln_1", "mlp.c_fc", "ln_2", "mlp.c_proj"
BLOCKS: dict[str, tuple[str, tuple]] = {
    "bert": ("encoder.layer.{}.", _BERT),
    "roberta": ("encoder.layer.{}.", _BERT),
    "gpt2": ("h.{}.", _GPT2),
    "clip_text_model": ("text_model.encoder.layers.{}.", _CLIP),
    "clip_vision_model": ("vision_model.encoder.layers.{}.", _CLIP),
    "vit": ("encoder.layer.{}.", _VIT),
}


def _blocks(source: Source, shape: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The blocks' tensors by the library's names, and which of ours became which."""
    state, tensors, mapping = source.model.state_dict(), {}, {}
    before, names = BLOCKS[shape]
    for block in range(source.model.config.backbone.depth):
        for layer, theirs in zip(LAYERS, names, strict=True):
            targets = theirs if isinstance(theirs, tuple) else (theirs,)
            for kind in ("weight", "bias"):
                ours = f"backbone.blocks.{block}.{layer}.{kind}"
                parts = state[ours].chunk(len(targets))
                for target, part in zip(targets, parts, strict=True):
                    part = part.T if shape == "gpt2" and part.ndim == 2 else part  # its Conv1D is (in, out)
                    tensors[f"{before.format(block)}{target}.{kind}"] = part
                mapping[ours] = ", ".join(f"{before.format(block)}{target}.{kind}" for target in targets)
    return tensors, mapping


def _texts(source: Source, work: Path, shape: str) -> tuple[dict, dict, dict, list[str]]:
    """Configuration, tensors, mapping and notes of BERT, RoBERTa, GPT-2 and CLIP's reader of texts."""
    model, state = source.model, source.model.state_dict()
    backbone, own = model.config.backbone, model.tokenizers["text"].config
    tensors, mapping = _blocks(source, shape)
    table, times = state["embedders.text.weight"], state["backbone.positions.time.weight"]
    vector, zero = state["modality_vectors.text"], not state["modality_vectors.text"].any()
    table, ends, notes = _write_vocabulary(source, work, shape, table)
    config = _common(source, shape) | {"vocab_size": len(table), "bos_token_id": ends[0], "eos_token_id": ends[1]}
    config["max_position_embeddings"] = len(times)
    if shape in ("bert", "roberta"):
        mapping["modality_vectors.text"] = "embeddings.token_type_embeddings.weight"
        tensors["embeddings.token_type_embeddings.weight"] = vector[None]
        names = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.LayerNorm", "")
        config |= {"type_vocab_size": 1, "pad_token_id": 1 if shape == "roberta" else None}
        if shape == "roberta":  # which counts positions from behind its padding
            times = torch.cat([times.new_zeros(2, backbone.width), times])
            config["max_position_embeddings"] = len(times)
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    else:
        if not zero:
            times = times + vector
            notes.append("the modality's vector was added to the positions")
        names = {
            "gpt2": ("wte", "wpe", "", "ln_f"),
            "clip_text_model": (
                "text_model.embeddings.token_embedding",
                "text_model.embeddings.position_embedding",
                "",
                "text_model.final_layer_norm",
            ),
        }[shape]
    words, positions, norm_in, norm_out = names
    tensors |= {f"{words}.weight": table, f"{positions}.weight": times}
    mapping |= {"embedders.text.weight": f"{words}.weight", "backbone.positions.time.weight": f"{positions}.weight"}
    for ours, theirs in (("norm_in", norm_in), ("norm_out", norm_out)):
        for kind in ("weight", "bias") if theirs else ():
            tensors[f"{theirs}.{kind}"] = state[f"backbone.{ours}.{kind}"]
            mapping[f"backbone.{ours}.{kind}"] = f"{theirs}.{kind}"
    if shape == "gpt2":
        theirs = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        theirs |= {"intermediate_size": "n_inner", "hidden_act": "activation_function"}
        theirs |= {"layer_norm_eps": "layer_norm_epsilon", "max_position_embeddings": "n_positions"}
        config = {theirs.get(name, name): value for name, value in config.items()}
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if (work / "tokenizer.json").exists() and model.heads:
        _write_pooling(source, work, own.max_tokens)
    return config, tensors, mapping, notes


def _write_vocabulary(
    source: Source, work: Path, shape: str, table: Tensor
) -> tuple[Tensor, tuple[int, int], list[str]]:
    """The vectors in the order of the ids that are written, the ids of BEGIN and END, and notes.

    RoBERTa's ids begin with <s>, <pad>, </s>, and end with <mask>. A tokenizer of another kind (`format: hugging_face`)
    is written as it came, with its own ids.
    """
    tokenizer: Any = source.model.tokenizers["text"]
    if not tokenizer.file:
        return table, (text.BEGIN, text.END), ["texts are given as ids: the model has no tokenizer of texts"]
    if _file_format(source) == "hugging_face":
        return _write_own_vocabulary(source, work, table)
    if shape != "roberta":
        _write_strings(source, work)
        return table, (text.BEGIN, text.END), []
    saved = json.loads(Path(tokenizer.file).read_text(encoding="utf-8"))
    vocab, mask = saved["model"]["vocab"], source.model.state_dict()["mask_tokens.text"]
    size = len(table) + 1  # with <pad>
    names = ["<s>", "</s>"]
    saved["model"]["vocab"] = {"<s>": 0, "<pad>": 1, "</s>": 2, **{token: i + 3 for token, i in vocab.items()}}
    saved["model"]["vocab"]["<mask>"] = size
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": size}
    added = [{"id": i, "content": name, **flags} for name, i in ids.items()]
    saved |= {"truncation": None, "padding": None, "added_tokens": added, "post_processor": _template(names, (0, 2))}
    _dump_strings(work, saved, names, tokenizer.config.max_tokens, pad="<pad>", mask="<mask>")
    table = torch.cat([table[:1], torch.zeros_like(table[:1]), table[1:], mask[None]])
    return table, (0, 2), ["ids are those of RoBERTa: <pad> is 1, </s> is 2, <mask> the last"]


def _write_own_vocabulary(source: Source, work: Path, table: Tensor) -> tuple[Tensor, tuple[int, int], list[str]]:
    """The tokenizer as it came: ours are its ids and 2, and BEGIN and END are tokens of its own."""
    from tokenizers import Tokenizer

    tokenizer: Any = source.model.tokenizers["text"]
    saved = Path(tokenizer.file).read_text(encoding="utf-8")
    theirs = Tokenizer.from_str(saved)
    theirs.no_truncation()
    theirs.no_padding()
    bare, whole = (theirs.encode("a", add_special_tokens=own).ids for own in (False, True))
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), -1)
    if first != 1 or len(whole) != len(bare) + 2:
        _write_strings(source, work)
        return table, (text.BEGIN, text.END), ["ids are ours: the tokenizer puts nothing around a text"]
    ends = whole[0], whole[-1]
    names = [str(theirs.id_to_token(one)) for one in ends]
    padding = next((name for name in ("[PAD]", "<pad>") if theirs.token_to_id(name) is not None), "")
    mask = next((name for name in ("[MASK]", "<mask>") if theirs.token_to_id(name) is not None), "")
    _dump_strings(work, json.loads(theirs.to_str()), names, tokenizer.config.max_tokens, padding, mask)
    own = table[2:].clone()
    own[list(ends)] = table[:2]
    if mask:
        own[theirs.token_to_id(mask)] = source.model.state_dict()["mask_tokens.text"]
    return own, ends, ["ids are those of the tokenizer's own file"]


def _write_pooling(source: Source, work: Path, most: int) -> None:
    """The modules of sentence-transformers that are a retrieval head: pooling, its projection and the unit length.

    Without them sentence-transformers takes the mean over the tokens, which is what `features` is.
    """
    width, head = source.model.config.backbone.width, source.model.config.heads["retrieval"]
    names = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    pool = to_data(head.config).get("pool", "mean")
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    _dump(work / "sentence_bert_config.json", {"max_seq_length": most, "do_lower_case": False})
    modes = {name: own == pool for own, name in names.items()}
    _dump(work / "1_Pooling/config.json", {"word_embedding_dimension": width, **modes})
    projection = source.model.state_dict()["heads.retrieval.projection.text"]
    if not torch.equal(projection, torch.eye(width)):
        modules.append(("2_Dense", "sentence_transformers.models.Dense"))
        sizes = {"in_features": width, "out_features": projection.shape[1], "bias": False}
        _dump(work / "2_Dense/config.json", {**sizes, "activation_function": "torch.nn.modules.linear.Identity"})
        _save({"linear.weight": projection.T}, work / "2_Dense/model.safetensors")
    modules.append((f"{len(modules)}_Normalize", "sentence_transformers.models.Normalize"))
    (work / modules[-1][0]).mkdir()
    _write_modules(work, modules)


def _pictures(source: Source, work: Path, shape: str) -> tuple[dict, dict, dict, list[str]]:
    """Configuration, tensors, mapping and notes of ViT and CLIP's reader of pictures."""
    model, state = source.model, source.model.state_dict()
    patch, rows = model.tokenizers["image"].config.patch, model.config.backbone.grid[0]
    tensors, mapping = _blocks(source, shape)
    config = _common(source, shape) | {"patch_size": patch, "image_size": patch * rows, "num_channels": 3}
    convolution = state["embedders.image.project.weight"].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    bias, token = state["embedders.image.project.bias"], state["embedders.prompt.weight"][0]
    vector, own = state["modality_vectors.image"], state["modality_vectors.prompt"]
    notes = []
    if own.any():
        token = token + own
        notes.append("the modality's vector of the class token was added to it")
    cells = state["backbone.positions.cell.weight"]
    if shape == "vit":
        if vector.any():
            bias = bias + vector
            notes.append("the modality's vector was added to the bias of the patches")
        at = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection", "")
        tensors[at[0]], norm_out = token[None, None], "layernorm"
        tensors[at[1]] = torch.cat([torch.zeros_like(cells[:1]), cells])[None]
        tensors[f"{at[2]}.bias"] = bias
        mapping["embedders.image.project.bias"] = f"{at[2]}.bias"
    else:  # whose convolution has no bias: it is a part of the positions
        inner = "vision_model.embeddings."
        at = (f"{inner}class_embedding", f"{inner}position_embedding.weight", f"{inner}patch_embedding", "pre_layrnorm")
        tensors[at[0]], norm_out = token, "vision_model.post_layernorm"
        shift = bias + vector
        tensors[at[1]] = torch.cat([torch.zeros_like(cells[:1]), cells + shift if shift.any() else cells])
        if shift.any():
            notes.append("the bias of the patches was added to the positions")
    tensors[f"{at[2]}.weight"] = convolution
    mapping |= {"embedders.image.project.weight": f"{at[2]}.weight", "embedders.prompt.weight": at[0]}
    mapping["backbone.positions.cell.weight"] = at[1]
    norms = {"norm_out": norm_out, **({"norm_in": f"vision_model.{at[3]}"} if at[3] else {})}
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            tensors[f"{theirs}.{kind}"] = state[f"backbone.{ours}.{kind}"]
            mapping[f"backbone.{ours}.{kind}"] = f"{theirs}.{kind}"
    if shape == "clip_vision_model" and "retrieval" in model.heads:
        config |= {"architectures": ["CLIPVisionModelWithProjection"]}
        tensors["visual_projection.weight"] = state["heads.retrieval.projection.image"].T
        config["projection_dim"] = len(tensors["visual_projection.weight"])
        mapping["heads.retrieval.projection.image"] = "visual_projection.weight"
    side = {"height": patch * rows, "width": patch * rows}
    pixels = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side, "resample": 2}
    pixels |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    _dump(work / "preprocessor_config.json", pixels | {"image_mean": [0.5] * 3, "image_std": [64 / 255] * 3})
    return config, tensors, mapping, notes


def _check_plain(source: Source, work: Path, shape: str) -> dict[str, float]:
    """The hidden states of the library's class, read from the folder, against the original."""
    import transformers

    more = {"add_pooling_layer": False} if shape in POOLED else {}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model, info = getattr(transformers, ARCHITECTURES[shape]).from_pretrained(
            work, local_files_only=True, output_loading_info=True, **more
        )
    if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(f"transformers {transformers.__version__} has other tensors than are known here: {lost[0]}")
    modality = source.modalities[0]
    sequences = examples(source.model, modality, seed=1, whole=True)
    if modality == "text" and (work / "tokenizer.json").exists():
        sequences = _spelled(source, sequences)
    content, mask, _ = pad(sequences)
    with torch.no_grad():
        if modality == "text":
            ids = _their_ids(source, work, content)
            hidden = model.eval()(ids, attention_mask=mask).last_hidden_state[mask != 0]
        else:
            patch, rows = source.model.tokenizers["image"].config.patch, source.model.config.backbone.grid[0]
            whole = content.unflatten(1, (rows, rows)).unflatten(3, (patch, patch, 3)).permute(0, 5, 1, 3, 2, 4)
            pixels = (whole.flatten(4).flatten(2, 3).double() / 255 - 0.5) / (64 / 255)
            hidden = model.eval()(pixels.float()).last_hidden_state
            hidden = model.post_layernorm(hidden) if shape == "clip_vision_model" else hidden
            hidden = hidden.flatten(0, 1)
    return difference({"hidden": hidden}, read(source.model, modality, sequences))


POOLED = ("bert", "roberta", "vit")


def _spelled(source: Source, sequences: list[Tokens]) -> list[Tokens]:
    """The sequences as those of texts: BEGIN, ids of the merges, END."""
    top = len(source.model.get_parameter("embedders.text.weight")) - source.model.tokenizers["text"].config.sentinels
    found = []
    for tokens in sequences:
        content = tokens.content.remainder(top - 2) + 2
        content[0], content[-1] = text.BEGIN, text.END
        found.append(tokens.replace(content=content))
    return found


def _their_ids(source: Source, work: Path, ids: Tensor) -> Tensor:
    """Our ids (B, L) as the folder's tokenizer counts them."""
    if not (work / "tokenizer.json").exists():
        return ids
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    ends = config["bos_token_id"], config["eos_token_id"]
    if ends == (text.BEGIN, text.END):
        return ids
    shift = 1 if config["model_type"] == "roberta" else -2
    moved = (ids + shift).clamp(min=0)
    return torch.where(ids == text.BEGIN, ends[0], torch.where(ids == text.END, ends[1], moved))


# ----------------------------------------------------------------------------------------------------------- the page


def _readme(source: Source, shape: str) -> str:
    """README.md: how the folder is read."""
    trust = "" if shape else ", trust_remote_code=True"
    embedding = "unit vectors" if "retrieval" in source.model.heads else "mean-pooled features"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        f"tags: [multimodal_fm, {', '.join(source.modalities)}]",
        "---",
        "",
        f"# {source.name}",
        "",
        f"A model of {', '.join(source.modalities)} that was trained with multimodal_fm. `export.json` says what was",
        "taken from which checkpoint, and how far the outputs differ from the original's.",
        "",
        "```python",
        "from transformers import AutoModel",
        "",
        f'model = AutoModel.from_pretrained("."{trust})',
    ]
    if not shape:
        lines += [
            "",
            "from transformers import AutoProcessor",
            "",
            f'processor = AutoProcessor.from_pretrained("."{trust})',
        ]
        calls = {"text": 'text=["a red bus"]', "image": "images=[picture]", "audio": "audio=[waveform]"}
        lines += [
            f"model.get_{name}_features(**processor({calls[name]})).pooler_output  # {embedding}"
            for name in source.modalities
        ]
    lines += ["```", ""]
    lines += [f"- left out: {one}" for one in source.left_out]
    return "\n".join([*lines, ""])
