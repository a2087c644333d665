"""The model: an embedder for each modality, the shared backbone, and the heads that adapt it.

N tokens, S sequences, D width, E length of the retrieval vectors.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from . import backbone
from .backbone import Backbone
from .batch import MAX_TOKENS, Batch, Example, batch_by_tokens, collate
from .config import Folder, Plugin, build
from .errors import SampleError, UserError
from .run_dir import checkpoint
from .tokenizers.base import Tokenizer
from .tokens import FILLER, Tokens, constant

TOKENIZERS, HEADS = Folder("tokenizers", "Tokenizer", instantiate=True), Folder("heads", "Head")


def default_heads() -> dict[str, Plugin]:
    from .heads import retrieval

    return {"retrieval": Plugin(HEADS, "retrieval", retrieval.Head, retrieval.Config())}


@dataclass
class ModelConfig:
    """All that a model is built from: `Model(ModelConfig(...))`."""

    tokenizers: dict[str, Annotated[Tokenizer, TOKENIZERS]] = field(default_factory=dict)
    """By modality. A run without them takes text, image and audio, those of them that its tasks read."""
    backbone: backbone.Config = field(default_factory=backbone.Config)  # the shared Transformer
    heads: dict[str, Annotated[Plugin, HEADS]] = field(default_factory=default_heads)
    """By name: what adapts the backbone's output to a use."""

    def problems(self):
        for key, names in (("tokenizers", self.tokenizers), ("heads", self.heads)):
            for name in names:
                if not name.isidentifier() or name in vars(nn.ModuleDict):
                    yield f"{key}.{name or repr('')}", "cannot be a name: letters, digits and _, not a word of Python's"


class Output:
    """What the backbone made of a batch, for objectives and heads to look at."""

    def __init__(self, tokens: Tokens, num_sequences: int, heads: nn.ModuleDict):
        self.tokens, self.num_sequences, self.heads = tokens, num_sequences, heads

    def zero(self) -> Tensor:
        """A loss of nothing that still reaches every parameter below."""
        return self.tokens.content.sum() * 0.0

    def mean_pool(self) -> Tensor:
        """The mean over each sequence's tokens (S, D)."""
        rows = self.tokens.sequence
        rows = torch.where(rows == FILLER, self.num_sequences, rows)
        content = self.tokens.content.float()
        sums = content.new_zeros(self.num_sequences + 1, content.shape[1]).index_add(0, rows, content)
        counts = content.new_zeros(self.num_sequences + 1).index_add(0, rows, content.new_ones(len(rows)))
        return (sums / counts.clamp(min=1.0)[:, None]).narrow(0, 0, self.num_sequences)

    def embedding(self, sequence: Tensor, modality: Tensor, head: str = "retrieval") -> Tensor:
        """What a head makes of the named sequences (M,), whose modalities are (M,)."""
        return self.heads[head](self.mean_pool().index_select(0, sequence), modality)


class Model(nn.Module):
    """`model(batch)` reads a batch; `embed` and `features` read what a user has."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokenizers: dict[str, Tokenizer] = config.tokenizers
        self.modalities, self.width = list(config.tokenizers), config.backbone.width
        self.embedders = nn.ModuleDict({m: t.embedder(self.width) for m, t in self.tokenizers.items()})
        self.modality_vectors = self._vectors()
        self.mask_tokens = self._vectors()
        self.backbone = Backbone(config.backbone, self.modalities)
        self.heads = nn.ModuleDict({n: p.cls(p.config, self.width, self.modalities) for n, p in config.heads.items()})

    def _vectors(self) -> nn.ParameterDict:
        return nn.ParameterDict({m: nn.Parameter(torch.randn(self.width) * 0.02) for m in self.modalities})

    def predictor(self, modality: str, width: int) -> nn.Module:
        """A new module that scores vectors (M, width) against raw content of a modality."""
        return self.tokenizers[modality].predictor(width)

    @property
    def device(self) -> torch.device:
        return self.backbone.norm_out.weight.device

    def forward(self, batch: Batch) -> Output:
        """Embed by modality and read all sequences of all tasks in one call of the backbone."""
        vectors = []
        for modality, content in batch.content.items():
            hidden = batch.hidden[modality][:, None]
            embedded = self.embedders[modality](content)
            embedded = embedded * (1 - hidden) + self.mask_tokens[modality] * hidden
            vectors.append(embedded + self.modality_vectors[modality])
        content = torch.cat(vectors).index_select(0, batch.tokens.content)
        tokens = self.backbone(batch.tokens.replace(content=content), batch.attention, batch.by_modality)
        return Output(tokens, batch.num_sequences, self.heads)

    def features(self, **inputs) -> dict[str, Tensor]:
        """Mean-pooled outputs of the backbone (B, D) for each modality given, with gradients; inputs as for `embed`."""
        read = {modality: self._read(modality, given) for modality, given in self._known(inputs).items()}
        return {modality: self._pool(modality, sequences)[0] for modality, sequences in read.items()}

    def embed(self, **inputs) -> dict[str, Tensor]:
        """Unit vectors (B, E) for each modality given, comparable across modalities by their dot product.

        text: strings. image: paths, PIL pictures, arrays (H, W, 3) or tensors (3, H, W), uint8 or floats in [0, 1].
        audio: paths or (waveform (T,) or (C, T), sample rate). Long sound and text is covered by windows whose vectors
        are averaged, so that a file's vector is always the same. Raises UserError that names what cannot be read.
        """
        known = self._known(inputs)
        return {m: self.embed_sequences(m, self._read(m, given))[0] for m, given in known.items()}

    @torch.no_grad()
    def embed_sequences(
        self, modality: str, inputs: list[list[Tokens]], max_tokens: int = MAX_TOKENS, head: str = "retrieval"
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of a head and pooled features (B, D) of inputs of one modality, each of one or several
        sequences, whose means count by their lengths.

        About `max_tokens` tokens go through the backbone at a time; on a GPU in bfloat16.
        """
        if head not in self.heads:
            raise UserError(f"this model has no head {head!r} (there are: {', '.join(self.heads) or 'none'})")
        training = self.training
        self.eval()
        try:
            return self._pool(modality, inputs, max_tokens, head)
        finally:
            self.train(training)

    def _pool(self, modality: str, inputs: list[list[Tokens]], max_tokens: int = MAX_TOKENS, head: str = "") -> tuple:
        """Features (B, D), or a head's unit vectors (B, E) and features (B, D)."""
        flat = [(i, sequence) for i, sequences in enumerate(inputs) for sequence in sequences]
        number = self.modalities.index(modality)
        outputs = []
        cast = autocast(self.device, self.device.type == "cuda")
        for pairs in batch_by_tokens(flat, max_tokens):
            sequences = [s.replace(modality=constant(number, len(s))) for _, s in pairs]
            examples = [(i, Example([sequence], [None])) for i, sequence in enumerate(sequences)]
            batch = collate({"embed": examples}, self.modalities, {"embed": {}}).to(self.device)
            with cast:
                pooled = self(batch).mean_pool()
            targets = batch.tasks["embed"]
            pooled = pooled.index_select(0, targets.sequence)
            outputs.append((self.heads[head](pooled, targets.modality), pooled) if head else (pooled,))
        owner = torch.tensor([i for i, _ in flat], device=self.device)
        length = torch.tensor([float(len(s)) for _, s in flat], device=self.device)[:, None]
        total = torch.zeros(len(inputs), 1, device=self.device).index_add(0, owner, length)

        def average(rows: tuple[Tensor, ...]) -> Tensor:
            stacked = torch.cat(rows)
            return stacked.new_zeros(len(inputs), stacked.shape[1]).index_add(0, owner, stacked * length) / total

        *vectors, features = (average(rows) for rows in zip(*outputs, strict=True))
        return (*(nn.functional.normalize(one, dim=-1) for one in vectors), features)

    def _known(self, inputs: dict) -> dict:
        if unknown := inputs.keys() - set(self.modalities):
            raise UserError(f"this model reads {', '.join(self.modalities)}, not {', '.join(sorted(unknown))}")
        return {modality: given for modality, given in inputs.items() if given is not None}

    def _read(self, modality: str, given) -> list[list[Tokens]]:
        if isinstance(given, (str, bytes, Path)):
            raise UserError(f"{modality}: give a list of inputs, not one {type(given).__name__}")
        tokenizer, inputs = self.tokenizers[modality], []
        for number, raw in enumerate(given):
            try:
                inputs.append(tokenizer.read(str(raw) if isinstance(raw, Path) else raw))
            except (SampleError, OSError) as error:
                name = f" ({raw})" if isinstance(raw, (str, Path)) and modality != "text" else ""
                raise UserError(f"{modality}[{number}]{name}: {error}") from None
        if not inputs:
            raise UserError(f"{modality}: the list is empty")
        return inputs


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Products in bfloat16 where `enabled`, else in the type of what is multiplied. The meta device knows neither."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def load(run: str | Path, ema: bool = True, device: str = "auto", plugins: bool = False) -> Model:
    """The model of a run's newest whole checkpoint (or of one checkpoint's folder), with its averaged weights.

    Needs neither the run's data nor its objectives. Nothing is unpickled; `plugins=True` allows the checkpoint to name
    tokenizers and heads from outside this package, whose code then runs. Raises UserError.
    """
    folder = checkpoint.newest(run)
    model = Model(read_config(folder, plugins))
    load_weights(model, checkpoint.read_tensors(folder, "ema" if ema else "model"), folder)
    return model.to(pick_device(device)).eval()


def load_weights(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load a checkpoint's tensors by name. Raises UserError that names what is missing, unknown or of another shape."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{name} is not of this model" for name in tensors.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: its weights do not fit: {'; '.join(sorted(wrong)[:3])}{more}")
    module.load_state_dict(tensors)


def read_config(folder: Path, plugins: bool = False) -> ModelConfig:
    """A checkpoint's model configuration, with its tokenizers' files where they now lie. Raises UserError."""
    data = checkpoint.read_data(folder, "model")
    tokenizers = data.get("tokenizers")
    for modality, settings in tokenizers.items() if isinstance(tokenizers, dict) else ():
        if isinstance(settings, dict) and settings.get("file"):
            settings["file"] = str(checkpoint.tokenizer_file(folder, modality, str(settings["file"])))
    return build(ModelConfig, data, str(folder / "model.json"), plugins)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; under torchrun each process takes its own. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
