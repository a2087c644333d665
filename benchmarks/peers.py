"""The peers of contests.py: other libraries' models with random weights, and a training step of each.

Every function takes the samples of some steps and returns the model, and for each step a function that gives the loss.
Dropout is off on both sides. SDPA computes attention wherever the library offers it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from contests import BERT_WORDS, FRAMES, GPT_WORDS, SMALL, SOUNDS, Raw
from torch import Tensor, nn

Peer = tuple[str, nn.Module, list[Callable[[], Tensor]], float]  # name, model, a loss a step, places a real token


def pad(rows: list[Tensor], value: float = 0, most: int = 0) -> Tensor:
    """(B, L, ...): the rows with `value` up to the longest, or up to `most`."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    missing = most - padded.shape[1]
    return F.pad(padded, (*[0] * (2 * (padded.ndim - 2)), 0, missing), value=value) if missing > 0 else padded


def bert(steps: list[list[Raw]], device: torch.device) -> Peer:
    """BertForMaskedLM (base): padded to the longest of the batch, as DataCollatorForLanguageModeling does."""
    from transformers import BertConfig, BertForMaskedLM

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=BERT_WORDS, attn_implementation="sdpa", **off))
    model = model.to(device).train()
    losses, places, real = [], 0, 0
    for samples in steps:
        lengths = torch.tensor([len(one.text) for one in samples])
        ids = pad([one.text for one in samples])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~(mask & (torch.rand(ids.shape) < 0.15)), -100)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        inputs = {name: one.to(device) for name, one in inputs.items()}
        losses.append(lambda inputs=inputs: model(**inputs).loss)
        places, real = places + ids.numel(), real + int(lengths.sum())
    return f"transformers {version('transformers')} BERT-base", model, losses, places / real


def gpt2(steps: list[list[Raw]], device: torch.device) -> Peer:
    """GPT2LMHeadModel (small): whole windows, as its training script packs them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=GPT_WORDS, attn_implementation="sdpa", use_cache=False, **off))
    model = model.to(device).train()
    losses = []
    for samples in steps:
        ids = torch.stack([one.text for one in samples]).to(device)
        losses.append(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    return f"transformers {version('transformers')} GPT-2 small", model, losses, 1.0


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        both = self.project_in(self.norm_1(x)).chunk(3, 2)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in both)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class NanoGPT(nn.Module):
    """GPT-2 small as nanoGPT (Karpathy 2022) writes it: flash attention, a tied head, 50,304 words for tensor cores."""

    def __init__(self, words: int = 50_304, most: int = 1024, width: int = 768, depth: int = 12, heads: int = 12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(most, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten(), ignore_index=-1)


def nano_gpt(steps: list[list[Raw]], device: torch.device) -> Peer:
    model, losses = NanoGPT().to(device).train(), []
    for samples in steps:
        ids = torch.stack([one.text for one in samples]).to(device)
        targets = F.pad(ids[:, 1:], (0, 1), value=-1)
        losses.append(lambda ids=ids, targets=targets: model(ids, targets))
    return "GPT-2 small in nanoGPT's manner", model, losses, 1.0


def clip_b32(steps: list[list[Raw]], device: torch.device) -> Peer:
    """OpenCLIP's ViT-B-32 as it stands: pictures at width 768, texts at width 512, both 12 layers deep."""
    import open_clip

    return _clip("ViT-B/32", open_clip.create_model("ViT-B-32"), steps, device)


def clip_b16(steps: list[list[Raw]], device: torch.device) -> Peer:
    import open_clip

    return _clip("ViT-B/16", open_clip.create_model("ViT-B-16"), steps, device)


def clip_384(steps: list[list[Raw]], device: torch.device) -> Peer:
    """OpenCLIP's own classes at width 384, depth 12, six heads for both towers, patches of 16."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    width, depth, heads = SMALL.values()
    vision = CLIPVisionCfg(layers=depth, width=width, head_width=width // heads, patch_size=16, image_size=224)
    text = CLIPTextCfg(layers=depth, width=width, heads=heads)
    return _clip("width 384, depth 12, /16", CLIP(512, vision, text), steps, device)


def _clip(name: str, model: nn.Module, steps: list[list[Raw]], device: torch.device) -> Peer:
    """Texts padded to 77 tokens, as OpenCLIP's tokenizer does; its own loss; the scale bound as its training does."""
    from open_clip.loss import ClipLoss

    model, score = model.to(device).train(), ClipLoss()
    mean, deviation = (torch.tensor(one, device=device)[:, None, None] for one in (MEAN, DEVIATION))
    losses, places, real = [], 0, 0
    for samples in steps:
        texts = pad([one.text for one in samples], most=77).to(device)
        pictures = torch.stack([one.picture for one in samples]).to(device)
        pictures = (pictures.float() / 255 - mean) / deviation  # in the loader's transforms

        def loss(pictures: Tensor = pictures, texts: Tensor = texts) -> Tensor:
            return score(*model(pictures, texts))

        losses.append(loss)
        patches = (224 // int(model.visual.patch_size[0])) ** 2 * len(samples)
        places, real = places + texts.numel() + patches, real + sum(len(one.text) for one in samples) + patches
    return f"open_clip {version('open_clip_torch')} {name}", model, losses, places / real


MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def ast(steps: list[list[Raw]], device: torch.device) -> Peer:
    """ASTForAudioClassification (base) on patches that do not overlap, padded to 1,024 frames by its extractor."""
    from transformers import ASTConfig, ASTForAudioClassification

    settings = {"frequency_stride": 16, "time_stride": 16, "num_labels": SOUNDS, "attn_implementation": "sdpa"}
    model = ASTForAudioClassification(ASTConfig(**settings)).to(device).train()
    losses, real = [], 0
    for samples in steps:
        sounds = pad([one.sound for one in samples], most=FRAMES).to(device)
        labels = torch.arange(len(samples), device=device) % SOUNDS
        losses.append(lambda sounds=sounds, labels=labels: model(input_values=sounds, labels=labels).loss)
        real += sum(len(one.sound) for one in samples)
    places = sum(map(len, steps)) * FRAMES
    return f"transformers {version('transformers')} AST-base", model, losses, places / real


def mae(steps: list[list[Raw]], device: torch.device) -> Peer:
    """ViTMAEForPreTraining (base), the decoder of width 512 and depth 8, patches normalized as in the paper."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(attn_implementation="sdpa", norm_pix_loss=True)).to(device).train()
    losses = []
    for samples in steps:
        pictures = torch.stack([one.picture for one in samples]).to(device).float() / 127.5 - 1
        losses.append(lambda pictures=pictures: model(pixel_values=pictures).loss)
    return f"transformers {version('transformers')} ViT-MAE base", model, losses, 1.0


def make_step(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, autocast: bool = False):
    """A training step as ours is one: gradients, clipped, fused AdamW; under autocast to bfloat16 on a GPU."""
    device = next(model.parameters()).device
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scale = getattr(model, "logit_scale", None)
        if scale is not None:
            with torch.no_grad():
                scale.clamp_(0, 4.6052)  # CLIP's bound, ln 100

    return step


BUILDERS = {one.__name__: one for one in (bert, gpt2, nano_gpt, clip_b32, clip_b16, clip_384, ast, mae)}
