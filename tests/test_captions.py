"""Captions: what is expected of the right text, and what is written, against brute force."""

import math

import pytest
import torch
from conftest import samples, tiny

from multimodal_fm import objectives
from multimodal_fm.batch import Sample, count_targets
from multimodal_fm.corpus import shards
from multimodal_fm.evals import captions
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.run import evaluate
from multimodal_fm.model import load
from multimodal_fm.tokens import constant, make_sequence
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    made = samples(16)
    for i, sample in enumerate(made):
        sample["txt"] = f"{sample['json']['color']} square" + " and more" * (i % 3)
    shards.write(folder / "train-0.tar", made)
    data = tiny(folder, run_dir=str(folder / "run"), steps=12)
    data["tasks"] = {
        "caption": {
            "objectives": {"causal": {"fuse": True, "prefix": ["image"]}},
            "modalities": ["image", "text"],
            "batch_size": 8,
            "sources": {"all": 1},
        }
    }
    data["model"]["tokenizers"].pop("audio")
    data["model"]["tokenizers"]["text"]["fields"] = ["txt"]
    loop.pretrain(build(data))
    return folder


def test_captions(run):
    model = load(run / "run")
    trained = objectives.load(run / "run", model)
    figures, _ = evaluate(model, trained, Evaluation(f"{run}/train-0.tar", measure=["captions"]))
    assert set(figures) == {"captions/bits_per_token", "captions/bleu", "captions/chrf"}
    objective, total, count = trained["caption/causal"], 0.0, 0
    prefixes, written = [], []
    for sample in samples(16):
        image = model.tokenizers["image"].read({"jpg": sample["jpg"]})[0].replace()
        prefixes.append({"image": image.replace(modality=constant(model.modalities.index("image"), len(image)))})
    for i, prefix in enumerate(prefixes):  # one by one, and each token from all logits of a forward pass of its own
        color = samples(16)[i]["json"]["color"]
        right = model.tokenizers["text"].read(f"{color} square" + " and more" * (i % 3))[0].content.tolist()

        def predict(ids, prefix=prefix):
            position = torch.zeros(len(ids), 3)
            position[:, 0] = torch.arange(len(ids))
            text = make_sequence(torch.tensor(ids), position, model.modalities.index("text"))
            example = objective.arrange(objective.config, Sample({**prefix, "text": text}))
            counts = {"c": count_targets([example], model.modalities)}
            with torch.no_grad():
                content = model(model.collate({"c": [(0, example)]}, counts)).tokens.content
            return objective.predictors["text"].logits(content[len(prefix["image"]) + len(ids) - 1]).log_softmax(-1)

        for n in range(1, len(right)):
            total -= predict(right[:n])[right[n]].item()
            count += 1
        total -= _first(model, objective, prefix, right[0])
        count += 1
        ids = [right[0]]
        longest = min(captions.MAX_LENGTH + 1, model.tokenizers["text"].config.max_tokens)
        while len(ids) < longest and ids[-1] != right[-1]:
            ids.append(int(predict(ids).argmax()))
        written.append(model.tokenizers["text"].decode(ids).strip())
    assert figures["captions/bits_per_token"]["value"] == pytest.approx(total / count / math.log(2), rel=1e-4)
    assert captions.write(model, objective, prefixes) == written


def _first(model, objective, prefix, begin):
    """The log-likelihood of the begin token, which the last row of the prefix answers."""
    position = torch.zeros(1, 3)
    text = make_sequence(torch.tensor([begin]), position, model.modalities.index("text"))
    example = objective.arrange(objective.config, Sample({**prefix, "text": text}))
    counts = {"c": count_targets([example], model.modalities)}
    with torch.no_grad():
        content = model(model.collate({"c": [(0, example)]}, counts)).tokens.content
    logits = objective.predictors["text"].logits(content[len(prefix["image"]) - 1])
    return logits.log_softmax(-1)[begin].item()
