"""A modality, an objective, a head and an evaluation from outside the package, one file each, nothing edited."""

import pytest
import torch
from conftest import records, samples, tiny

import multimodal_fm
from multimodal_fm import objectives
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.run import evaluate
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

FILES = {
    "series": '''
"""A modality: a time series, a member `series` of text with one number a line."""
from dataclasses import dataclass
import torch
from torch import nn
from multimodal_fm.errors import SampleError
from multimodal_fm.tokenizers import base
from multimodal_fm.tokens import make_sequence

@dataclass
class Config:
    patch: int = 4
    max_tokens: int = 16

class Tokenizer(base.Tokenizer):
    Config, extensions = Config, ("series",)

    def read(self, raw, generator=None):
        raw = raw["series"] if isinstance(raw, dict) else raw
        try:
            values = torch.tensor([float(v) for v in raw.split()])
        except ValueError as error:
            raise SampleError("decode", str(error))
        patch = self.config.patch
        count = min(len(values) // patch, self.config.max_tokens)
        position = torch.zeros(count, 3)
        position[:, 0] = torch.arange(count)
        return [make_sequence(values[: count * patch].view(count, patch), position)]

    def embedder(self, width):
        return nn.Linear(self.config.patch, width)

    def predictor(self, width):
        return Predict(width, self.config.patch)

class Predict(nn.Linear):
    def forward(self, vectors, content):
        return (super().forward(vectors) - content).square().mean(-1)
''',
    "scalar": '''
"""A head: a number a sequence."""
from dataclasses import dataclass
from torch import nn
from multimodal_fm.heads import base

@dataclass
class Config:
    bias: bool = True

class Head(base.Head):
    Config = Config

    def __init__(self, config, width, modalities):
        super().__init__(config, width, modalities)
        self.project = nn.Linear(width, 1, bias=config.bias)

    def forward(self, pooled, modality):
        return self.project(pooled)[:, 0]
''',
    "energy": '''
"""An objective: say how large a sequence's numbers are, from all of them."""
from dataclasses import dataclass
import torch
from multimodal_fm.batch import Example
from multimodal_fm.objectives import base

@dataclass
class Config(base.Config):
    head: str = "scalar"

class Objective(base.Objective):
    Config = Config

    @staticmethod
    def arrange(config, sample, generator=None):
        inputs = [t.replace(sequence=t.sequence + n) for n, t in enumerate(sample.tokens.values())]
        rows = [torch.full((len(tokens),), -1) for tokens in inputs]
        return Example(inputs, [None] * len(inputs), inputs, rows, sample.group)

    def loss(self, output, targets):
        said = output.embedding(targets.sequence, targets.modality, self.config.head)
        loss = output.zero()
        for modality, tokens in targets.tokens.items():
            own = said[torch.searchsorted(targets.sequence, tokens.sequence)]
            loss = loss + (own - tokens.content.square().mean(-1)).square().sum() / targets.counts[modality]
        return loss, {"error": loss.detach()}
''',
    "error": '''
"""An evaluation: how far the head is from the truth."""
from dataclasses import dataclass
import numpy as np
from multimodal_fm.evals import base
from multimodal_fm.evals.metrics import estimate

@dataclass
class Config:
    pass

class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded, config, model, objectives):
        series = embedded.inputs["series"]
        said = model.heads["scalar"](series.features, None).detach().numpy()
        truth = np.array([np.square([float(v) for v in embedded.corpus.raw(own[0])["series"].split()]).mean()
                          for own in series.samples])
        assert "shapes/energy" in objectives
        return {"series/error": estimate(np.abs(said - truth), np.arange(len(truth)), None)}
''',
}


def test_plugins_of_all_four_folders_come_from_outside(tmp_path, monkeypatch):
    """They train, are saved, load and evaluate; a checkpoint that names them loads only with `plugins=True`."""
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in FILES.items():
        (package / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    written = samples(24)
    for i, sample in enumerate(written):
        wave = torch.sin(torch.arange(40.0) * (0.2 + 0.2 * (i % 4))) * (0.5 + 0.5 * (i % 3))
        sample["series"] = "\n".join(f"{v:.3f}" for v in wave)
    shards.write(tmp_path / "series.tar", written)
    evaluation = {"on": f"{tmp_path}/series.tar", "evaluators": ["outside_package.error"], "modalities": ["series"]}
    data = tiny(
        tmp_path,
        run_dir=str(tmp_path / "run"),
        sources={"all": {"shards": f"{tmp_path}/series.tar", "group": "color"}},
        tokenizers={
            "text": {"vocab_size": 300, "max_tokens": 24},
            "series": {"tokenizer": "outside_package.series", "patch": 4},
        },
        heads={"retrieval": {"embed_dim": 32}, "scalar": {"head": "outside_package.scalar"}},
        optim={"lr": 3e-3, "warmup_steps": 2},
        steps=30,
        ema_decay=0.5,
        evaluate={"own": evaluation},
        evaluate_every=30,
    )
    task = {"modalities": ["series"], "batch_size": 8, "sources": {"all": 1}}
    decoder = {"width": 32, "depth": 1, "num_heads": 2}
    data["tasks"] = {
        "shapes": {**task, "objectives": {"energy": {"objective": "outside_package.energy"}}},
        "patches": {**task, "objectives": {"masked": {"hide": "drop", "mask_ratio": 0.5, "decoder": decoder}}},
        "next": {**task, "objectives": {"causal": {}}},
        "pairs": {**task, "modalities": ["text", "series"], "objectives": {"contrastive": {}}},
    }
    run = loop.pretrain(build(data)).parents[1]

    *rows, evaluated = records(run)
    for name in ("shapes/energy", "patches/masked", "next/causal", "pairs/contrastive"):
        first, last = (sum(row[f"loss/{name}"] for row in part) for part in (rows[:5], rows[-5:]))
        assert last < 0.9 * first, name
    with pytest.raises(UserError, match="outside_package.series"):
        multimodal_fm.load(run)
    model = multimodal_fm.load(run, plugins=True)
    vectors = model.embed(series=["\n".join(["0.5"] * 40)], text=["a red square"])
    assert vectors["series"].shape == vectors["text"].shape == (1, 32)
    with pytest.raises(UserError, match="outside_package.energy"):
        objectives.load(run, model)
    figures, _ = evaluate(model, objectives.load(run, model, plugins=True), Evaluation(**evaluation))
    assert figures["series/error"]["value"] == pytest.approx(evaluated["evaluate/own/series/error"], rel=1e-4)
    assert figures["series/error"]["value"] < 0.5
