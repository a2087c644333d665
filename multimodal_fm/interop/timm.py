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

from collections.abc import Sequence
from typing import Any

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
from ..model import HEADS, Model
from .base import Names, Tensors, make_model, named, patch_embedding, picture_tokenizers, read_blocks

BLOCK = Names("blocks.{}.", ("attn.qkv",), "attn.proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2")
UNUSED = (r"head\..*", r"attn_pool\..*", r"fc_norm\..*")


def from_timm(vit: VisionTransformer, classes: Sequence[str] = ()) -> Model:
    """The model, in float32, to be evaluated or tuned. classes: names of the classifier's classes, which becomes the
    head `classify`; empty: no head. Raises UserError for what cannot be expressed."""
    where = f"timm's {type(vit).__name__}"
    _check(vit, where)
    first: Any = vit.blocks[0]
    embed: Any = vit.patch_embed
    side, patch, prefix = embed.grid_size[0], embed.patch_size[0], vit.num_prefix_tokens
    tensors = Tensors(_fold_layer_scale(vit.state_dict()), where)
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
    heads, found = _classifier(vit, list(classes), tensors, where)
    found |= named("backbone.norm_out", tensors.norm("norm"))
    found |= named("backbone.norm_in", tensors.norm("norm_pre")) if pre_norm else {}
    convolution = tensors.linear("patch_embed.proj")
    mean, std = list(pixels["mean"]), list(pixels["std"])
    found |= named("embedders.image.project", patch_embedding(convolution, mean, std))
    found |= _positions(vit, tensors, prefix, side**2)
    found |= read_blocks(tensors, BLOCK, backbone.depth)
    tensors.drop(*UNUSED)
    tensors.finish()
    return make_model(backbone, picture_tokenizers(patch, side, prefix), found, where, **heads)


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


def _fold_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """gamma * (W x + b) as (gamma W) x + gamma b."""
    folded = dict(tensors)
    for name in tensors:
        block, dot, scale = name.removesuffix(".gamma").rpartition(".")
        if name.endswith(".gamma") and scale in ("ls1", "ls2"):
            gamma, layer = folded.pop(name), f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
            folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * gamma[:, None]
            if f"{layer}.bias" in folded:
                folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * gamma
    return folded


def _positions(vit: VisionTransformer, tensors: Tensors, prefix: int, cells: int) -> dict[str, Tensor]:
    """The table of positions, and class and register tokens with the positions that they have."""
    width = vit.embed_dim
    table = tensors.take("pos_embed")[0] if "pos_embed" in tensors else torch.zeros(cells, width)
    own = table[: len(table) - cells]  # of the tokens before the patches; none with no_embed_class
    found = {"backbone.positions.cell.weight": table[len(own) :]}
    if prefix:
        learned = [tensors.take(name)[0] for name in ("cls_token", "reg_token") if name in tensors]
        found["embedders.prompt.weight"] = torch.cat(learned) + (own if len(own) else 0.0)
    return found


def _classifier(
    vit: VisionTransformer, classes: list[str], tensors: Tensors, where: str
) -> tuple[dict[str, Plugin], dict[str, Tensor]]:
    """The linear classifier as a head; nothing where no classes are given."""
    if not classes:
        return {}, {}
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
    head = Plugin(HEADS, "classify", classify.Head, config)
    return {"classify": head}, named("heads.classify.logits", tensors.linear("head"))
