"""The model: an embedder for each modality, the shared backbone, and the heads that adapt it.

N tokens, S sequences, D width, E length of the retrieval vectors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from . import backbone, lora
from .attention import Cache
from .backbone import Backbone
from .batch import MAX_TOKENS, Batch, Example, batch_by_tokens, collate
from .config import Folder, Plugin, build, to_data
from .errors import SampleError, UserError
from .run_dir import checkpoint
from .tokenizers.base import Tokenizer, find_prompt
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
    lora: lora.Config = field(default_factory=lora.Config)  # low-rank adapters in the backbone

    def problems(self):
        for key, names in (("tokenizers", self.tokenizers), ("heads", self.heads)):
            for name in names:
                if not name.isidentifier() or name in vars(nn.ModuleDict):
                    yield f"{key}.{name or repr('')}", "cannot be a name: letters, digits and _, not a word of Python's"
        for name, tokenizer in self.tokenizers.items():
            extent, most = tokenizer.extent(), self.backbone.extent()
            if extent and any(own > limit for own, limit in zip(extent, most, strict=True)):
                times, rows, columns = extent
                yield (
                    f"tokenizers.{name}",
                    f"has up to {times} times, {rows} rows and {columns} columns, the backbone learns "
                    f"{' x '.join(map(str, most))}: lower max_tokens (a picture's grid is bounded by square: true), or "
                    "set backbone.max_positions or grid higher",
                )


class Output:
    """What the backbone made of a batch, for objectives and heads to look at."""

    def __init__(self, tokens: Tokens, num_sequences: int, heads: nn.ModuleDict):
        self.tokens, self.num_sequences, self.heads = tokens, num_sequences, heads
        self.states: list[Tensor] = []  # the outputs (N, D) of the backbone's last blocks, where they were asked for
        self.teacher: Output | None = None  # what the averaged model made of `Batch.teacher`

    def zero(self) -> Tensor:
        """A loss of nothing that still reaches every parameter below."""
        return self.tokens.content.sum() * 0.0

    def pool(self, kind: str) -> Tensor:
        """One vector (S, D) for each sequence: its tokens' mean, or that of its first or last token."""
        if kind == "mean":
            return self.mean_pool()
        rows = self.first_rows() if kind == "first" else self.last_rows()
        padded = nn.functional.pad(full(self.tokens.content), (0, 0, 0, 1))  # a sequence of none is zeros
        return padded.index_select(0, rows)

    def mean_pool(self) -> Tensor:
        """The mean over each sequence's tokens (S, D)."""
        content = full(self.tokens.content)
        counts = self.sum_pool(content.new_ones(len(content), 1))
        return self.sum_pool(content) / counts.clamp(min=1.0)

    def sum_pool(self, values: Tensor) -> Tensor:
        """The sum over each sequence's tokens (S, D) of values (N, D)."""
        sums = values.new_zeros(self.num_sequences + 1, values.shape[1]).index_add(0, self._owner(), values)
        return sums.narrow(0, 0, self.num_sequences)

    def log_softmax(self, scores: Tensor) -> Tensor:
        """Of scores (N,), over the tokens of each sequence (N,)."""
        owner = self._owner()
        most = scores.new_full((self.num_sequences + 1,), -torch.inf)
        most = most.scatter_reduce(0, owner, scores.detach(), "amax").index_select(0, owner)
        sums = scores.new_zeros(self.num_sequences + 1).index_add(0, owner, (scores - most).exp())
        return scores - most - sums.log().index_select(0, owner)

    def softmax(self, scores: Tensor) -> Tensor:
        """Of scores (N,), over the tokens of each sequence (N,)."""
        return self.log_softmax(scores).exp()

    def first_rows(self) -> Tensor:
        """The row of each sequence's first token (S,); a sequence's tokens lie side by side, in order."""
        owner = self._owner()
        rows = torch.arange(len(owner), device=owner.device)
        first = torch.full((self.num_sequences + 1,), len(owner), device=owner.device, dtype=torch.long)
        return first.scatter_reduce(0, owner, rows, "amin").narrow(0, 0, self.num_sequences)

    def last_rows(self) -> Tensor:
        """The row of each sequence's last token (S,)."""
        owner = self._owner()
        rows = torch.arange(len(owner), device=owner.device)
        last = torch.full((self.num_sequences + 1,), -1, device=owner.device, dtype=torch.long)
        last = last.scatter_reduce(0, owner, rows, "amax").narrow(0, 0, self.num_sequences)
        return torch.where(last < 0, len(owner), last)

    def instance_norm(self, values: Tensor, eps: float = 1e-5) -> Tensor:
        """Values (N, D) with zero mean and unit variance, in each of the D, over the tokens of each sequence."""
        owner = self._owner()
        count = self.sum_pool(values.new_ones(len(values), 1)).clamp(min=1.0)

        def mean(x: Tensor) -> Tensor:
            return nn.functional.pad(self.sum_pool(x) / count, (0, 0, 0, 1)).index_select(0, owner)

        centered = values - mean(values)
        return centered * (mean(centered.square()) + eps).rsqrt()

    def _owner(self) -> Tensor:
        """Each token's sequence (N,); filler belongs to one more."""
        return torch.where(self.tokens.sequence == FILLER, self.num_sequences, self.tokens.sequence)

    def embedding(self, sequence: Tensor, modality: Tensor, head: str = "retrieval") -> Tensor:
        """What a head makes of the named sequences (M,), whose modalities are (M,)."""
        adapter: Any = self.heads[head]
        return adapter(self.pool(adapter.pooling).index_select(0, sequence), modality)


class Model(nn.Module):
    """`model(batch)` reads a batch; `embed` and `features` read what a user has."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.origin: tuple[Path, bool, bool] | None = None  # the checkpoint it was loaded from, `ema`, `plugins`
        self.trained: dict | None = None  # that checkpoint's objectives, once `generate` has asked for them
        self.tokenizers: dict[str, Tokenizer] = config.tokenizers
        self.modalities, self.width = list(config.tokenizers), config.backbone.width
        self.embedders = nn.ModuleDict({m: t.embedder(self.width) for m, t in self.tokenizers.items()})
        self.modality_vectors = self._vectors()
        self.mask_tokens = self._vectors()
        self.backbone = Backbone(config.backbone, self.modalities)
        lora.inject(self.backbone, config.lora)
        self.heads = nn.ModuleDict({n: p.cls(p.config, self.width, self.modalities) for n, p in config.heads.items()})
        head: Any
        for head in self.heads.values():
            head.bind(self.tokenizers)

    def _vectors(self) -> nn.ParameterDict:
        return nn.ParameterDict({m: nn.Parameter(torch.randn(self.width) * 0.02) for m in self.modalities})

    def predictor(self, modality: str, width: int) -> nn.Module:
        """A new module that scores vectors (M, width) against raw content of a modality."""
        return self.tokenizers[modality].predictor(width)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def forward(self, batch: Batch, layers: int = 0, cache: Cache | None = None) -> Output:
        """Embed by modality and read all sequences of all tasks in one call of the backbone.

        layers: how many of the last blocks' outputs are kept, as `Output.states`. cache: what was read before, to which
        the batch's tokens are appended; `batch.attention` is its plan.
        """
        vectors = []
        for modality, content in batch.content.items():
            hidden = batch.hidden[modality][:, None]
            embedded = self.embedders[modality](content)
            embedded = embedded * (1 - hidden) + self.mask_tokens[modality] * hidden
            vectors.append(embedded + self.modality_vectors[modality])
        content = torch.cat(vectors).index_select(0, batch.tokens.content)
        states: list[Tensor] | None = [] if layers else None
        content = batch.tokens.replace(content=content)
        tokens = self.backbone(content, batch.attention, batch.by_modality, states=states, cache=cache)
        output = Output(tokens, batch.num_sequences, self.heads)
        output.states = (states or [])[-layers:]
        return output

    def collate(self, tasks: dict[str, list[tuple[int, Example]]], counts: dict[str, dict[str, int]]) -> Batch:
        """A microbatch on the model's device; see `batch.collate`."""
        return collate(tasks, self.modalities, counts, prompt=find_prompt(self.tokenizers)).to(self.device)

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

    def classify(self, things, labels=None, head: str = "classify", templates=None, modality: str = "") -> list[dict]:
        """The class of each thing: {"label": the likeliest, "probabilities": {class: p}}.

        things: paths, PIL pictures, arrays, (waveform, sample rate), texts, or maps of them by modality, which are read
        as one sequence in the order of the map. Types and files' endings tell the modality unless it is named. labels:
        names of classes; each thing is compared with sentences about them by the retrieval head, without training
        (Radford et al. 2021). `templates` are these sentences, with {} for the name. Without labels: what `head` says,
        which was trained on its classes (`mmfm tune`); with `multi_label` "label" is a list. Raises UserError.
        """
        from .search.classify import classify

        return classify(self, things, labels, head, templates, modality)

    def generate(self, to: str = "text", objectives: dict | None = None, progress=None, **given) -> list:
        """Write texts, or the codes of pictures and sounds: one `multimodal_fm.generate.Generated` for each prompt.

        to: the modality to be written. Keywords are inputs by modality, as for `embed`, equally many of each, which
        are read before (`image=[...]`; without any one sequence is written after nothing), and the fields of
        `generate.Request` (fill, candidates, rerank, objective) and `decoding.settings.Settings` (temperature, top_k,
        top_p, num_beams, seed, ...). A text that is given where a text is to be written goes on, or is the source that
        the objective was trained to read.
        objectives: what the model was trained by, `objectives.load(run, model)`; a model that `load` read knows where
        they are. progress: called with how much is done, and of how much. Raises UserError.
        """
        from . import generate

        inputs, request, settings = generate.parse({"to": to, **given}, self.modalities)
        read = {modality: self._read(modality, one) for modality, one in inputs.items()}
        return generate.generate(self, self._objectives(objectives), read, request, settings, progress)

    def stream_text(self, to: str = "text", objectives: dict | None = None, **given) -> Iterator[str]:
        """The text that `generate` writes, piece by piece; no piece ends inside a character.

        One prompt; the first piece is its own beginning, where it has one. Beams and text that is written all at once
        come in one piece.
        """
        from . import generate

        inputs, request, settings = generate.parse({"to": to, **given}, self.modalities)
        read = {modality: self._read(modality, one) for modality, one in inputs.items()}
        return generate.stream(self, self._objectives(objectives), read, request, settings)

    def _objectives(self, objectives: dict | None) -> dict:
        """Those given, else those of the run that the model was loaded from, which are read once."""
        from . import objectives as folder

        if objectives is not None:
            return objectives
        if self.origin is None:
            raise UserError("generate: this model was not loaded from a run: pass objectives=, what it was trained by")
        if self.trained is None:
            run, ema, plugins = self.origin
            self.trained = folder.load(run, self, ema, plugins)
        return self.trained

    @torch.no_grad()
    def embed_sequences(
        self, modality: str, inputs: list[list[Tokens]], max_tokens: int = MAX_TOKENS, head: str = "retrieval"
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of a head and pooled features (B, D) of inputs of one modality, each of one or several
        sequences, whose means count by their lengths.

        About `max_tokens` tokens go through the backbone at a time; on a GPU in bfloat16. Without a head, `""`, E is 0.
        """
        if head and head not in self.heads:
            raise UserError(f"this model has no head {head!r} (there are: {', '.join(self.heads) or 'none'})")
        training = self.training
        self.eval()
        try:
            *vectors, features = self._pool(modality, inputs, max_tokens, head)
            return (vectors[0] if vectors else features[:, :0]), features
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
            batch = self.collate({"embed": examples}, {"embed": {}})
            with cast:
                output = self(batch)
                pooled = output.mean_pool()
            targets = batch.tasks["embed"]
            pooled = pooled.index_select(0, targets.sequence)
            vectors = (output.embedding(targets.sequence, targets.modality, head),) if head else ()
            outputs.append((*vectors, pooled))
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
                if not inputs[-1]:
                    raise SampleError("empty", f"there is no {modality} in it")
            except (SampleError, OSError) as error:
                name = f" ({raw})" if isinstance(raw, (str, Path)) and modality != "text" else ""
                raise UserError(f"{modality}[{number}]{name}: {error}") from None
        if not inputs:
            raise UserError(f"{modality}: the list is empty")
        return inputs


def full(x: Tensor) -> Tensor:
    """At least float32, in which means and losses are computed whatever autocast says."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Products in bfloat16 where `enabled`, else in the type of what is multiplied. The meta device knows neither."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def load(
    run: str | Path, ema: bool = True, device: str = "auto", plugins: bool = False, adapter: str | Path = ""
) -> Model:
    """The model of a run's newest whole checkpoint (or of one checkpoint's folder), with its averaged weights.

    adapter: the folder of an adapter (RUN/adapter) that was tuned on this base. Needs neither the run's data nor its
    objectives. Nothing is unpickled; `plugins=True` allows the checkpoint to name tokenizers and heads from outside
    this package, whose code then runs. Raises UserError.
    """
    folder = checkpoint.newest(run)
    config, tensors = read_config(folder, plugins), checkpoint.read_tensors(folder, "ema" if ema else "model")
    check_sizes(config, tensors, folder)
    model = Model(config)
    load_weights(model, tensors, folder)
    model = with_adapter(model, adapter, plugins) if adapter else model
    model.origin = (folder, ema, plugins)
    return model.to(pick_device(device)).eval()


def check_sizes(config: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError where a model of this configuration is another than the tensors, before it takes any memory."""
    try:
        with torch.device("meta"):
            skeleton = Model(config)
    except UserError:
        raise
    except Exception:  # a part reads numbers back while it is built, as a codec's quantizer does
        return
    check_weights(skeleton, {name: tensor.shape for name, tensor in tensors.items()}, folder)


def with_adapter(model: Model, folder: str | Path, plugins: bool = False) -> Model:
    """A new model: `model` with an adapter of this folder, its heads and its learned tokens. `model` stays as it is.

    Raises UserError where the adapter was made for another base.
    """
    about, tensors = lora.read_adapter(folder)
    base = model.state_dict()
    if about["base"] != lora.base_hash(base):
        raise UserError(
            f"{folder}: was tuned on another base: its weights have the hash {about['base'][:12]}, "
            f"these {lora.base_hash(base)[:12]}; load it with the run that it was tuned from"
        )
    data = to_data(model.config)
    data |= {"lora": about.get("lora", {}), "heads": about.get("heads", {})}
    for modality, settings in about["tokenizers"].items():
        # what is opened is what the base names
        own = {key: value for key, value in settings.items() if key not in ("file", "codec")}
        data["tokenizers"][modality] = data["tokenizers"].get(modality, {}) | own
    adapted = Model(build(ModelConfig, data, str(Path(folder) / "adapter.json"), plugins))
    known = {name: base[lora.plain_name(name)] for name in adapted.state_dict() if lora.plain_name(name) in base}
    load_weights(adapted, known | tensors, Path(folder))
    return adapted.to(model.device).train(model.training)


def merge_adapter(model: Model) -> Model:
    """A new model without adapters that computes the same; `model` stays as it is."""
    merged = Model(dataclasses.replace(model.config, lora=lora.Config()))
    merged.load_state_dict(lora.merged_tensors(model))
    return merged.to(model.device).train(model.training)


def without_adapter(model: Model) -> Model:
    """A new model of the base's own weights, with the heads of `model`."""
    plain = Model(dataclasses.replace(model.config, lora=lora.Config()))
    plain.load_state_dict({lora.plain_name(n): v for n, v in model.state_dict().items() if ".lora_" not in n})
    return plain.to(model.device).train(model.training)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], folder: Path, assign: bool = False) -> None:
    """Load a checkpoint's tensors by name. Raises UserError that names what is missing, unknown or of another shape.

    assign: take the tensors themselves, as a module on the meta device must."""
    check_weights(module, {name: tensor.shape for name, tensor in tensors.items()}, folder)
    module.load_state_dict(tensors, assign=assign)


def check_weights(module: nn.Module, shapes: dict[str, torch.Size], folder: Path) -> None:
    """Raises UserError that names what a checkpoint's tensors, of these shapes, lack of a module, or do not fit."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - shapes.keys()]
    wrong += [f"{name} is not of this model" for name in shapes.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(shapes[name])}, not {tuple(own[name].shape)}"
        for name in own.keys() & shapes.keys()
        if shapes[name] != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: its weights do not fit: {'; '.join(sorted(wrong)[:3])}{more}")


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
