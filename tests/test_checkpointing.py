"""Activation checkpointing: the same bits in less memory."""

import pytest
import torch
from conftest import text_only
from test_objectives import make, make_batch, make_sample, score, seeded
from test_train import fit, make_stream
from torch.profiler import ProfilerActivity, profile

from multimodal_fm.backbone import Backbone
from multimodal_fm.batch import with_counts
from multimodal_fm.train.train_step import TrainStep

BACKBONES = {
    "modern": {"drop_path": 0.5, "depth": 3},
    "experts": {"experts": True},
    "classic": {"block": "classic", "grid": [196, 196], "max_positions": 256, "norm": "post"},
}
MODES = ("none", "selective", "full")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def loss_and_gradients(backbone: dict, mode: str, name: str = "masked"):
    """Those of one batch, and how often attention ran (it asks for memory then) and products."""
    model, objective = make(name, backbone, hide="drop")
    for module in (*model.modules(), *objective.modules()):
        if isinstance(module, Backbone):
            module.checkpointing = mode
    samples = [make_sample(i, text=9 + i % 3, image=6, audio=4) for i in range(4)]
    batch = make_batch([objective.arrange(objective.config, one, seeded()) for one in samples], objective)
    torch.manual_seed(1)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loss, _ = score(model, objective, batch)
        loss.backward()
    events, name = recorded.events(), f"aten::{ATTENTION}"
    calls = {
        "attention": sum(e.name == name and any("empty" in c.name for c in e.cpu_children) for e in events),
        "products": sum(e.name == "aten::mm" for e in events),
    }
    parameters = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    return loss.detach(), {n: p.grad for n, p in parameters.items() if p.grad is not None}, calls


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_results_are_the_same_bits(backbone):
    """With branches left out at random, too, which are left out again in the second reading."""
    (loss, gradients, calls), *others = (loss_and_gradients(BACKBONES[backbone], mode) for mode in MODES)
    for other_loss, other_gradients, other_calls in others:
        assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
        assert other_calls["products"] > calls["products"]


def test_selective_keeps_what_attention_returned():
    none, selective, full = (loss_and_gradients({}, mode)[2]["attention"] for mode in MODES)
    assert 0 < none == selective < full


def test_a_run_may_change_it_and_learns_the_same(tmp_path, corpus):
    reports = []
    for mode in MODES:
        config, corpora = fit(text_only(corpus, tmp_path, activation_checkpointing=mode), tmp_path)
        step, stream = TrainStep(config, torch.device("cpu")), make_stream(config, corpora)
        assert {m.checkpointing for m in step.trained.modules() if isinstance(m, Backbone)} == {mode}
        for number in range(2):
            data = stream[number]
            report = step(number, [with_counts(batch, data.counts) for batch in data.batches])
        reports.append((report["loss"], step.tensors()["model"]))
    for loss, tensors in reports[1:]:
        assert torch.equal(loss, reports[0][0])
        assert all(torch.equal(tensors[name], tensor) for name, tensor in reports[0][1].items())
