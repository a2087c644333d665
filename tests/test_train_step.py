"""One update: on any device without waiting for it, without growing, and undone where it is not finite."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import text_only
from test_train import fit, make_stream

from multimodal_fm.batch import Sample, collate, count_targets, with_counts
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train.config import load
from multimodal_fm.train.train_step import TrainStep

BASE = Path(__file__).parent.parent / "configs" / "base.yaml"
CPU = torch.device("cpu")


def make_tokens(config, modality: str):
    """A short sequence of random tokens."""
    settings, number = config.model.tokenizers[modality].config, list(config.model.tokenizers).index(modality)
    content = {
        "text": lambda: torch.randint(2, settings.vocab_size, (9,)),
        "image": lambda: torch.randint(0, 256, (9, 3 * settings.patch**2), dtype=torch.uint8),
        "audio": lambda: torch.randn(9, settings.patch_frames * settings.patch_mels),
    }[modality]()
    position = torch.zeros(9, 3)
    position[:, 0] = torch.arange(9)
    return make_sequence(content, position, number)


def make_microbatches(config):
    """A step of random samples that have all modalities of their task."""
    modalities, generator = list(config.model.tokenizers), torch.Generator().manual_seed(0)
    microbatches, counts, planners = [{} for _ in range(config.microbatches)], {}, {}
    for name, task in config.tasks.items():
        plugin = next(iter(task.objectives.values()))
        samples = [Sample({m: make_tokens(config, m) for m in task.modalities}, i) for i in range(task.batch_size)]
        examples = [plugin.cls.arrange(plugin.config, sample, generator) for sample in samples]
        counts[name] = count_targets(examples, modalities)
        planners[name] = lambda batch, targets, plugin=plugin: plugin.cls.plan(plugin.config, batch, targets)
        for number, own in enumerate(microbatches):
            own[name] = list(enumerate(examples))[number :: config.microbatches]
    return [collate(own, modalities, counts, planners, config.round_to) for own in microbatches]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_whole_step_runs_on_the_meta_device(microbatches):
    """The meta device holds no values: whatever reads one back, or mixes devices, raises."""
    config = load(BASE, ["compile=false", f"microbatches={microbatches}"])
    tasks = {name: dataclasses.replace(task, batch_size=4) for name, task in config.tasks.items()}
    config = dataclasses.replace(config, tasks=tasks)
    step = TrainStep(config, torch.device("meta"))
    assert sum(p.numel() for p in step.parameters) > 80e6
    for number in range(2):
        report = step(number, make_microbatches(config))
    assert {"loss", "grad_norm", "skipped", *(f"loss/{name}" for name in step.weights)} <= report.keys()
    assert all(value.is_meta for value in report.values())
    state = {f"{file}/{name}": t for file, tensors in step.tensors().items() for name, t in tensors.items()}
    assert all(tensor.is_meta for name, tensor in state.items() if not name.endswith("/step"))  # AdamW's counters


@pytest.fixture
def text_step(tmp_path, corpus):
    """Makes train steps of the text-only configuration, and a step's microbatches."""

    def make(**changes):
        config, corpora = fit(text_only(corpus, tmp_path, **changes), tmp_path)
        stream = make_stream(config, corpora)

        def read(number):
            data = stream[number]
            return [with_counts(batch, data.counts) for batch in data.batches]

        return TrainStep(config, CPU), read

    return make


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_never_happened(text_step, name, value):
    """Weights, moments, step counters and the averages are those of a run that never saw the batch."""
    results = []
    for bad in (False, True):
        step, read = text_step(optim={"name": name, "lr": 3e-3, "warmup_steps": 3})
        step(0, read(0))
        if bad:
            weights, step.weights = step.weights, dict.fromkeys(step.weights, value)
            assert step(1, read(1))["skipped"] == 1
            step.weights = weights
        assert step(2, read(2))["skipped"] == 0
        results.append(step.tensors())
    for file in results[0]:
        for tensor, own in results[0][file].items():
            assert torch.equal(own, results[1][file][tensor]), (file, tensor)


def test_memory_stays_flat_over_hundreds_of_steps(text_step):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    step, read = text_step(optim={"name": "muon"}, backbone={"width": 16, "depth": 2, "num_heads": 2})
    batches = read(0)
    for number in range(400):
        report = step(number, batches)
        if number == 100:
            before = resident()
    assert resident() - before < 2_000_000
    kept = [*step.ema.parameters(), *(t for o in step.optimizers for s in o.state.values() for t in s.values())]
    assert not any(tensor.requires_grad for tensor in (*kept, *report.values()))


def test_the_averages_follow_the_weights(text_step):
    step, read = text_step(ema_decay=0.5)
    before = {name: tensor.clone() for name, tensor in step.ema.state_dict().items()}
    step(100, read(0))
    for name, now in step.ema.state_dict().items():
        torch.testing.assert_close(now, (before[name] + step.trained.state_dict()[name]) / 2)


def test_without_a_decay_the_averages_are_the_weights(text_step):
    """Whenever they are read, and a step does nothing for them."""
    step, read = text_step(ema_decay=0.0)
    copies, copy = [], step._copy_to_averages
    step._copy_to_averages = lambda: copies.append(copy())
    for number in range(2):
        step(number, read(number))
        assert len(copies) == number
        for name, now in step.ema.state_dict().items():
            assert torch.equal(now, step.trained.state_dict()[name]), name
    tensors = step.tensors()
    for name, now in tensors["ema"].items():
        assert torch.equal(now, tensors["model"][name]), name


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_where_their_norm_is_above_the_limit(text_step, limit):
    step, read = text_step(optim={"name": "adamw", "grad_clip": limit})
    report = step(0, read(0))
    left = torch.nn.utils.get_total_norm([weight.grad for weight in step.parameters])
    expected = min(float(report["grad_norm"]), limit)
    assert float(left) == pytest.approx(expected, rel=1e-3)
