"""The model: an embedder a kind, the shared backbone, the head for search, and the objectives that train them.

N tokens, S sequences, D width, E dimension of the search vectors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .batch import Arranged, Batch, gather
from .config import Config, Plugin, build
from .errors import BadInput, Lost
from .heads.retrieval import Head
from .run_dir import checkpoint
from .tokens import FILLER, Tokens


class Output:
    """What the backbone made of a batch, for the objectives to score."""

    def __init__(self, tokens: Tokens, sequences: int, head: Head):
        self.tokens, self.sequences, self.head = tokens, sequences, head

    def zero(self) -> Tensor:
        """A loss of nothing that still reaches every parameter below."""
        return self.tokens.content.sum() * 0.0

    def means(self) -> Tensor:
        """The mean over each sequence's tokens (S, D)."""
        rows = self.tokens.sequence
        rows = torch.where(rows == FILLER, self.sequences, rows)
        content = self.tokens.content.float()
        sums = content.new_zeros(self.sequences + 1, content.shape[1]).index_add(0, rows, content)
        counts = content.new_zeros(self.sequences + 1).index_add(0, rows, content.new_ones(len(rows)))
        return (sums / counts.clamp(min=1.0)[:, None]).narrow(0, 0, self.sequences)

    def embedding(self, sequence: Tensor, kind: Tensor) -> Tensor:
        """Unit vectors (M, E) of the named sequences (M,)."""
        return self.head(self.means().index_select(0, sequence), kind)


class Model(nn.Module):
    """`forward` reads a batch; `embed` reads what a user has."""

    def __init__(self, config: Config):
        super().__init__()
        self.tokenizers: dict[str, Plugin] = config.tokenizers
        self.kinds = list(config.tokenizers)
        self.config = config.model
        self.evaluations = config.evaluate
        width = config.model.width
        self.embedders = nn.ModuleDict({k: t.module.Embed(t.settings, width) for k, t in self.tokenizers.items()})
        self.kind_vectors = nn.Parameter(torch.randn(len(self.kinds), width) * 0.02)
        self.hidden_vectors = nn.Parameter(torch.randn(len(self.kinds), width) * 0.02)
        self.backbone = Backbone(config.model, len(self.kinds))
        self.head = Head(len(self.kinds), width, config.embedding)
        self.objectives = nn.ModuleDict()
        self.parts: dict[str, list[str]] = {}  # the kinds that each objective reads
        for name, section in config.sections.items():
            self.parts[name] = section.parts
            self.objectives[name] = section.objective.module.Objective(section.objective.settings, self)
            for other, also in section.also.items():
                self.parts[f"{name}+{other}"] = section.parts
                self.objectives[f"{name}+{other}"] = also.objective.module.Objective(also.objective.settings, self)

    def predictor(self, kind: str, width: int) -> nn.Module:
        """A new module that scores vectors (M, width) against raw content of that kind."""
        tokenizer = self.tokenizers[kind]
        return tokenizer.module.Predict(tokenizer.settings, width)

    @property
    def device(self) -> torch.device:
        return self.kind_vectors.device

    def forward(self, batch: Batch) -> Output:
        """Embed by kind, lay out, and read all sequences in one call of the backbone."""
        vectors = []
        for kind, content in batch.content.items():
            place, hide = self.kinds.index(kind), batch.hidden[kind][:, None]
            shown = self.embedders[kind](content)
            shown = shown * (1 - hide) + self.hidden_vectors[place] * hide
            vectors.append(shown + self.kind_vectors[place])
        content = torch.cat(vectors).index_select(0, batch.tokens.content)
        return Output(self.backbone(batch.tokens.replace(content=content)), batch.sequences, self.head)

    @torch.no_grad()
    def vectors(self, kind: str, things: list[list[Tokens]], tokens: int = 16_384) -> tuple[Tensor, Tensor]:
        """Search vectors (B, E) and mean features (B, D) of things of one kind, each one or several sequences.

        About `tokens` tokens go through the backbone at a time; a thing's sequences count by their lengths.
        """
        place = self.kinds.index(kind)
        flat = [(i, s.replace(kind=torch.full_like(s.kind, place))) for i, thing in enumerate(things) for s in thing]
        found, means, start = [], [], 0
        training, _ = self.training, self.eval()
        while start < len(flat):
            stop, room = start, tokens
            while stop < len(flat) and (stop == start or len(flat[stop][1]) <= room):
                room -= len(flat[stop][1])
                stop += 1
            items = [(i, Arranged([s], [None])) for i, (_, s) in enumerate(flat[start:stop])]
            batch = gather({"embed": items}, self.kinds, {"embed": {}}).to(self.device)
            output = self(batch)
            means.append(output.means())
            asked = batch.sections["embed"]
            found.append(self.head(means[-1].index_select(0, asked.sequence), asked.kind))
            start = stop
        self.train(training)
        owner = torch.tensor([i for i, _ in flat], device=self.device)
        length = torch.tensor([float(len(s)) for _, s in flat], device=self.device)[:, None]
        whole = torch.zeros(len(things), 1, device=self.device).index_add(0, owner, length)

        def average(rows: list[Tensor]) -> Tensor:
            rows = torch.cat(rows)
            return (
                torch.zeros(len(things), rows.shape[1], device=self.device).index_add(0, owner, rows * length) / whole
            )

        return nn.functional.normalize(average(found), dim=-1), average(means)

    def embed(self, **inputs) -> dict[str, Tensor]:
        """Unit vectors (B, E) for each kind given, comparable across kinds by their dot product.

        text: strings. image: paths, PIL pictures or tensors (3, H, W), uint8 or floats in [0, 1]. audio: paths or
        (waveform (T,) or (C, T), rate). Long sound and text is covered by windows whose vectors are averaged, so that
        a file's vector is always the same. Raises BadInput that names what cannot be read.
        """
        unknown = inputs.keys() - set(self.kinds)
        if unknown:
            raise BadInput(f"this model reads {', '.join(self.kinds)}, not {', '.join(sorted(unknown))}")
        return {k: self.vectors(k, self._read(k, given))[0] for k, given in inputs.items() if given is not None}

    def _read(self, kind: str, given) -> list[list[Tokens]]:
        if isinstance(given, (str, bytes, Path)):
            raise BadInput(f"{kind}: give a list of inputs, not one {type(given).__name__}")
        tokenizer, things = self.tokenizers[kind], []
        for place, raw in enumerate(given):
            try:
                things.append(tokenizer.module.read(tokenizer.settings, str(raw) if isinstance(raw, Path) else raw))
            except (Lost, OSError) as error:
                name = f" ({raw})" if isinstance(raw, (str, Path)) and kind != "text" else ""
                raise BadInput(f"{kind}[{place}]{name}: {error}") from None
        if not things:
            raise BadInput(f"{kind}: the list is empty")
        return things


def load(run: str | Path, ema: bool = True, device: str = "auto") -> Model:
    """The model of a run's newest whole checkpoint (or of one checkpoint's folder), with its averaged weights.

    Raises BadInput where there is none. Nothing is unpickled.
    """
    folder = checkpoint.newest(run)
    config = read_config(folder)
    model = Model(config)
    model.load_state_dict(checkpoint.read_tensors(folder, "ema" if ema else "model"))
    return model.to(pick_device(device)).eval()


def read_config(folder: Path) -> Config:
    """A checkpoint's configuration, with its tokenizers' files where they now lie."""
    data = checkpoint.read_data(folder, "config")
    for kind, settings in data["tokenizers"].items():
        if settings.get("file"):
            settings["file"] = str(checkpoint.tokenizer_file(folder, kind, settings["file"]))
    return build(data, str(folder / "config.json"))


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name}: {str(error).splitlines()[0]}") from None
