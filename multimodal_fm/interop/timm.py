"""A Vision Transformer of timm as a model with `block: classic` (Dosovitskiy et al. 2021; Touvron et al. 2021).

    import timm
    from multimodal_fm.interop.timm import from_timm

    model = from_timm(timm.create_model("vit_small_patch16_224.augreg_in21k_ft_in1k", pretrained=True))
    model.features(image=["bus.jpg"])

The features and, where `classes` names its classes, the linear classifier are those of the original. What is special
about pictures is taken over: the patches, the normalization of pixels, the grid of positions, class and register
tokens. A picture is squeezed into the original's square, where timm would crop it. Layer scale (CaiT, DeiT III) is
worked into the weights. Refused by name: QK-norm, norms after pooling, RMSNorm, rotary or relative positions, parallel
blocks, pooling by attention where a classifier is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config  # pyright: ignore[reportPrivateImportUsage]
from timm.layers import Attention, Mlp, PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..backbone import ACTIVATIONS
from ..backbone import Config as BackboneConfig
from ..config import Plugin
from ..errors import UserError
from ..heads import classify
from ..model import HEADS, Model, load_weights
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
    weight_files,
)

BLOCK = Names(
    "blocks.{}.", ("attn.qkv",), "attn.proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2", "ls1.gamma", "ls2.gamma"
)
UNUSED = (r"head\..*", r"attn_pool\..*", r"fc_norm\..*")
SHAPES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "reg_tokens")
SWITCHES = (
    "class_token",
    "no_embed_class",
    "pre_norm",
    "qkv_bias",
    "proj_bias",
    "fc_norm",
    "final_norm",
    "init_values",
)
SWITCHES += ("global_pool", "act_layer", "dynamic_img_size")
"""Arguments of `timm.create_model` that a folder may give; none of them opens a file or imports anything."""


def import_folder(folder: Path) -> Imported:
    """The model of a folder as timm pushes it to the Hub: config.json, which names one of timm's own architectures, and
    model.safetensors. Nothing is allocated before all shapes have been compared. Raises UserError."""
    settings = read_json(folder / "config.json")
    name, given = str(settings.get("architecture")), settings.get("model_args") or {}
    tensors = read_tensors(weight_files(folder))
    if not timm.is_model(name):
        raise UserError(f"{folder}: timm has no architecture {name[:60]!r}")
    if not isinstance(given, dict) or (unknown := [one for one in given if one not in (*SHAPES, *SWITCHES)]):
        raise UserError(
            f"{folder}: model_args may give {', '.join((*SHAPES, *SWITCHES))}, not {', '.join(unknown)[:80]}"
        )
    given = {"num_classes": settings.get("num_classes"), "global_pool": settings.get("global_pool")} | given
    given = {key: value for key, value in given.items() if value is not None}
    depth = len({one.split(".")[1] for one in tensors if one.startswith("blocks.")})
    largest = {"depth": depth, "img_size": 1 << 14}
    for key in SHAPES:
        value, most = given.get(key, 0), largest.get(key, 1 << 20)
        if not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise UserError(f"{folder}: model_args.{key} is a number up to {most}, not {str(value)[:40]!r}")
    try:
        with torch.device("meta"):
            vit: Any = timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # timm asserts and raises nearly anything
        raise UserError(f"{folder}: timm cannot make {name}: {type(error).__name__}: {error}"[:200]) from None
    load_weights(vit, {key: value.float() for key, value in tensors.items()}, folder, assign=True)
    own = settings.get("pretrained_cfg")
    vit.pretrained_cfg = {
        **vit.pretrained_cfg,
        **{k: v for k, v in (own or {}).items() if k in ("mean", "std", "input_size")},
    }
    names = settings.get("label_names")
    named = isinstance(names, list) and len(names) == vit.num_classes and all(isinstance(one, str) for one in names)
    return import_model(vit.eval(), names if named and names else [], str(folder))


def from_timm(vit: VisionTransformer, classes: Sequence[str] = ()) -> Model:
    """The model, in float32, to be evaluated or tuned. classes: names of the classifier's classes, which becomes the
    head `classify`; empty: no head. Raises UserError for what cannot be expressed."""
    return import_model(vit, classes).model


def import_model(vit: VisionTransformer, classes: Sequence[str] = (), where: str = "") -> Imported:
    """As `from_timm`, with where each tensor comes from."""
    where = where or f"timm's {type(vit).__name__}"
    _check(vit, where)
    first: Any = vit.blocks[0]
    embed: Any = vit.patch_embed
    side, patch, prefix = embed.grid_size[0], embed.patch_size[0], vit.num_prefix_tokens
    tensors = Tensors(vit.state_dict(), where)
    pre_norm = isinstance(vit.norm_pre, nn.LayerNorm)
    try:
        backbone = BackboneConfig(
            width=vit.embed_dim,
            depth=len(vit.blocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.fc1.out_features / vit.embed_dim,
            block="classic",
            norm_in=pre_norm,
            norm_eps=first.norm1.eps,
            activation=_activation(first.mlp.act, where),  # pyright: ignore[reportArgumentType]
            grid=[side, side],
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    pixels = resolve_model_data_config(vit)
    heads = _classifier(vit, list(classes), tensors, where)
    tensors.norm("backbone.norm_out", "norm")
    if pre_norm:
        tensors.norm("backbone.norm_in", "norm_pre")
    mean, std = list(pixels["mean"]), list(pixels["std"])
    read_patches(tensors, "patch_embed.proj", mean, std)
    _positions(vit, tensors, prefix, side**2)
    read_blocks(tensors, BLOCK, backbone.depth)
    tensors.drop(
        "a head, not needed for the hidden states; its classes have no names" if not classes else "a head", *UNUSED
    )
    tensors.finish()
    model = make_model(backbone, picture_tokenizers(patch, side, prefix), tensors, heads)
    squeezed = "pictures are squeezed into the square, where timm crops them"

    def reference() -> Callable[[Tensor], Tensor]:
        def hidden(values: Tensor) -> Tensor:
            values = (values.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
            return vit.forward_features(values.permute(0, 3, 1, 2).float())[0]

        return hidden

    return Imported(model, tensors, "timm", type(vit).__name__, [squeezed], reference=reference)


def _check(vit: VisionTransformer, where: str) -> None:
    """Raises UserError where a part computes something else than ours. Same names of tensors do not say that it does
    the same (blocks with norms behind the branches have them too), so that types are looked at."""
    first: Any = vit.blocks[0]
    parts: dict[str, tuple[nn.Module | None, type]] = {
        "model": (vit, VisionTransformer),
        "patch embedding": (vit.patch_embed, PatchEmbed),
        **{f"block {number}": (block, Block) for number, block in enumerate(vit.blocks)},
        "attention": (first.attn, Attention),
        "feed-forward layer": (first.mlp, Mlp),
    }
    wrong = [f"its {part} is a {type(it).__name__}" for part, (it, known) in parts.items() if type(it) is not known]
    norms = [m for name, m in vit.named_modules() if name.endswith(("norm", "norm1", "norm2", "norm_pre"))]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        wrong.append("its norms are not all LayerNorm")
    elif len({norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}) > 1:
        wrong.append("its norms differ in eps")
    if not isinstance(vit.norm, nn.LayerNorm):
        wrong.append("it normalizes after pooling, not before, or not at all")
    embed: Any = vit.patch_embed
    if not wrong and (embed.patch_size[0] != embed.patch_size[1] or embed.grid_size[0] != embed.grid_size[1]):
        wrong.append("its patches or its pictures are not square")
    if wrong:
        raise UserError(f"{where}: cannot be expressed: {'; '.join(wrong)}")


def _activation(layer: nn.Module, where: str) -> str:
    """Which of ours it is, by what it computes."""
    x = torch.linspace(-6, 6, 601)
    for name, ours in ACTIVATIONS.items():
        if torch.allclose(layer(x), ours(x), rtol=0, atol=1e-6):
            return name
    raise UserError(f"{where}: its activation {type(layer).__name__} is none of {', '.join(ACTIVATIONS)}")


def _positions(vit: VisionTransformer, tensors: Tensors, prefix: int, cells: int) -> None:
    """The table of positions, and class and register tokens with the positions that they have."""
    learned = [name for name in ("cls_token", "reg_token") if name in tensors]
    if "pos_embed" not in tensors:
        tensors.zeros("backbone.positions.cell.weight", cells, vit.embed_dim)
        own = 0
    else:
        own = tensors.take("pos_embed").shape[1] - cells  # of the tokens before the patches; none with no_embed_class
        how = f"rows from {own} on"
        tensors.put("backbone.positions.cell.weight", "pos_embed", make=lambda table: table[0, own:], how=how)

    def tokens(*parts: Tensor) -> Tensor:
        rows = torch.cat([one[0] for one in parts[: len(learned)]])
        return rows + parts[-1][0, :own] if own else rows

    if prefix:
        how = "each with its position added" if own else "as it is"
        tensors.put("embedders.prompt.weight", *learned, *["pos_embed"] * bool(own), make=tokens, how=how)


def _classifier(vit: VisionTransformer, classes: list[str], tensors: Tensors, where: str) -> dict[str, Plugin]:
    """The linear classifier as a head; nothing where no classes are given."""
    if not classes:
        return {}
    pools = {"token": "first"} if vit.num_prefix_tokens else {"avg": "mean"}
    if vit.global_pool not in pools or vit.num_classes != len(classes):
        raise UserError(
            f"{where}: has {vit.num_classes} classes and global_pool={vit.global_pool!r}; its classifier is taken over "
            f"for as many names as that, and with {next(iter(pools))!r}"
        )
    try:
        config = classify.Config(classes, pool=pools[vit.global_pool])  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    tensors.linear("heads.classify.logits", "head")
    return {"classify": Plugin(HEADS, "classify", classify.Head, config)}
