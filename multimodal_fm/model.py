"""The model: an embedder a modality, the shared backbone, the head for search, and the objectives that train them.

N tokens, S sequences, D width, E dimension of the search vectors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .batch import Batch, Example, collate
from .config import Config, build
from .errors import SampleError, UserError
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

    def embedding(self, sequence: Tensor, modality: Tensor) -> Tensor:
        """Unit vectors (M, E) of the named sequences (M,)."""
        return self.head(self.means().index_select(0, sequence), modality)


class Model(nn.Module):
    """`forward` reads a batch; `embed` reads what a user has."""

    def __init__(self, config: Config):
        super().__init__()
        self.tokenizers = config.tokenizers
        self.modalities = list(config.tokenizers)
        self.config = config.model
        self.evaluations = config.evaluate
        width = config.model.width
        self.embedders = nn.ModuleDict({k: t.embedder(width) for k, t in self.tokenizers.items()})
        self.modality_vectors = nn.Parameter(torch.randn(len(self.modalities), width) * 0.02)
        self.hidden_vectors = nn.Parameter(torch.randn(len(self.modalities), width) * 0.02)
        self.backbone = Backbone(config.model, len(self.modalities))
        self.head = Head(len(self.modalities), width, config.embedding)
        self.objectives = nn.ModuleDict()
        self.parts: dict[str, list[str]] = {}  # the modalities that each objective reads
        for name, task in config.tasks.items():
            self.parts[name] = task.modalities
            self.objectives[name] = task.objective.module.Objective(task.objective.settings, self)
            for other, also in task.also.items():
                self.parts[f"{name}+{other}"] = task.modalities
                self.objectives[f"{name}+{other}"] = also.objective.module.Objective(also.objective.settings, self)

    def predictor(self, modality: str, width: int) -> nn.Module:
        """A new module that scores vectors (M, width) against raw content of that modality."""
        tokenizer = self.tokenizers[modality]
        return tokenizer.predictor(width)

    @property
    def device(self) -> torch.device:
        return self.modality_vectors.device

    def forward(self, batch: Batch) -> Output:
        """Embed by modality, lay out, and read all sequences in one call of the backbone."""
        vectors = []
        for modality, content in batch.content.items():
            place, hide = self.modalities.index(modality), batch.hidden[modality][:, None]
            shown = self.embedders[modality](content)
            shown = shown * (1 - hide) + self.hidden_vectors[place] * hide
            vectors.append(shown + self.modality_vectors[place])
        content = torch.cat(vectors).index_select(0, batch.tokens.content)
        return Output(self.backbone(batch.tokens.replace(content=content)), batch.sequences, self.head)

    @torch.no_grad()
    def vectors(self, modality: str, things: list[list[Tokens]], tokens: int = 16_384) -> tuple[Tensor, Tensor]:
        """Search vectors (B, E) and mean features (B, D) of things of one modality, each one or several sequences.

        About `tokens` tokens go through the backbone at a time; a thing's sequences count by their lengths.
        """
        place = self.modalities.index(modality)
        flat = [
            (i, s.replace(modality=torch.full_like(s.modality, place))) for i, thing in enumerate(things) for s in thing
        ]
        found, means, start = [], [], 0
        training, _ = self.training, self.eval()
        while start < len(flat):
            stop, room = start, tokens
            while stop < len(flat) and (stop == start or len(flat[stop][1]) <= room):
                room -= len(flat[stop][1])
                stop += 1
            samples = [(i, Example([s], [None])) for i, (_, s) in enumerate(flat[start:stop])]
            batch = collate({"embed": samples}, self.modalities, {"embed": {}}).to(self.device)
            output = self(batch)
            means.append(output.means())
            targets = batch.tasks["embed"]
            found.append(self.head(means[-1].index_select(0, targets.sequence), targets.modality))
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
        """Unit vectors (B, E) for each modality given, comparable across modalities by their dot product.

        text: strings. image: paths, PIL pictures or tensors (3, H, W), uint8 or floats in [0, 1]. audio: paths or
        (waveform (T,) or (C, T), rate). Long sound and text is covered by windows whose vectors are averaged, so that
        a file's vector is always the same. Raises UserError that names what cannot be read.
        """
        unknown = inputs.keys() - set(self.modalities)
        if unknown:
            raise UserError(f"this model reads {', '.join(self.modalities)}, not {', '.join(sorted(unknown))}")
        return {k: self.vectors(k, self._read(k, given))[0] for k, given in inputs.items() if given is not None}

    def _read(self, modality: str, given) -> list[list[Tokens]]:
        if isinstance(given, (str, bytes, Path)):
            raise UserError(f"{modality}: give a list of inputs, not one {type(given).__name__}")
        tokenizer, things = self.tokenizers[modality], []
        for place, raw in enumerate(given):
            try:
                things.append(tokenizer.read(str(raw) if isinstance(raw, Path) else raw))
            except (SampleError, OSError) as error:
                name = f" ({raw})" if isinstance(raw, (str, Path)) and modality != "text" else ""
                raise UserError(f"{modality}[{place}]{name}: {error}") from None
        if not things:
            raise UserError(f"{modality}: the list is empty")
        return things


def load(run: str | Path, ema: bool = True, device: str = "auto") -> Model:
    """The model of a run's newest whole checkpoint (or of one checkpoint's folder), with its averaged weights.

    Raises UserError where there is none. Nothing is unpickled.
    """
    folder = checkpoint.newest(run)
    config = read_config(folder)
    model = Model(config)
    model.load_state_dict(checkpoint.read_tensors(folder, "ema" if ema else "model"))
    return model.to(pick_device(device)).eval()


def read_config(folder: Path) -> Config:
    """A checkpoint's configuration, with its tokenizers' files where they now lie."""
    data = checkpoint.read_data(folder, "config")
    for modality, settings in data["tokenizers"].items():
        if settings.get("file"):
            settings["file"] = str(checkpoint.tokenizer_file(folder, modality, settings["file"]))
    return build(data, str(folder / "config.json"))


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
