"""`compile: true`: few sizes, the same results, and nothing compiled after the first steps."""

import pytest
import torch
from conftest import text_only
from test_objectives import make, make_batch, make_sample, score, seeded
from test_train import fit, make_stream

from multimodal_fm.backbone import few_sizes
from multimodal_fm.batch import with_counts
from multimodal_fm.train.compiled import Compiled, Rows
from multimodal_fm.train.train_step import TrainStep

CPU = torch.device("cpu")
BACKBONES = [{}, {"experts": True}, {"block": "classic", "grid": [196, 196], "max_positions": 256}]


@pytest.fixture
def not_compiled(monkeypatch):
    """torch.compile gives what it was given; the shapes that it would be called with are noted."""
    shapes = []

    def compile_nothing(function, **options):
        assert options["dynamic"] is False

        def call(*inputs):
            shapes.append((function.__qualname__, len(inputs[0])))
            return function(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return shapes


def test_sizes_are_few_and_little_larger():
    sizes = {count: few_sizes(count) for count in range(1, 40_000)}
    assert all(count <= size for count, size in sizes.items())
    assert all(size <= count * 33 / 32 + 1 for count, size in sizes.items() if count > 2048)
    assert len({size for count, size in sizes.items() if 16_384 < count <= 32_768}) == 32


@pytest.mark.parametrize("backbone", BACKBONES)
def test_filled_up_rows_change_nothing(backbone, not_compiled):
    """Loss, gradients and states of the blocks are those of the plain model; every part sees few sizes."""
    found = []
    for is_compiled in (False, True):
        model, objective = make("masked", backbone, hide="drop")
        samples = [make_sample(i, text=9 + i % 3, image=6, audio=4) for i in range(4)]
        batch = make_batch([objective.arrange(objective.config, one, seeded()) for one in samples], objective)
        compiled = Compiled()
        if is_compiled:
            compiled.add(model, torch.nn.ModuleDict({"task/masked": objective}))
        torch.manual_seed(3)
        loss, _ = score(model, objective, batch)
        loss.backward()
        weights = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
        found.append((loss, {name: weight.grad for name, weight in weights.items()}))
        states = model(batch, 2).states
        assert [len(state) for state in states] == [len(batch.tokens)] * 2
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(loss, other)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6)
    assert all(rows % 64 == 0 for _, rows in not_compiled) and compiled.count_sizes() > 0
    assert {"Embed.forward", "EmbedIds.forward", "Predict.forward"} <= {name for name, _ in not_compiled}


def test_evaluation_runs_as_it_is_written(not_compiled):
    model, objective = make("causal")
    compiled = Compiled()
    compiled.add(model, torch.nn.ModuleDict({"task/causal": objective}))
    batch = make_batch([objective.arrange(objective.config, make_sample(text=9), seeded())])
    model.eval()
    with torch.no_grad():
        model(batch)
    assert not not_compiled and not compiled.count_sizes()


def test_no_rows_are_not_compiled(not_compiled):
    rows = Rows(torch.nn.Linear(3, 2).forward)
    assert rows(torch.zeros(0, 3)).shape == (0, 2) and not not_compiled and rows(torch.ones(5, 3)).shape == (5, 2)


@pytest.mark.slow
def test_after_the_first_steps_nothing_is_compiled(tmp_path, corpus):
    """With torch's own compiler: the losses to rounding, and an error where anything is compiled again."""
    reports = {}
    for is_compiled in (False, True):
        data = text_only(corpus, tmp_path, compile=is_compiled, backbone={"width": 48, "depth": 2, "num_heads": 2})
        config, corpora = fit(data, tmp_path)
        step, stream = TrainStep(config, CPU), make_stream(config, corpora)
        steps = [[with_counts(batch, stream[n].counts) for batch in stream[n].batches] for n in range(6)]
        known = {few_sizes(len(batch.tokens)) for batches in steps[:3] for batch in batches}
        after = [b for b in steps[3:] if {few_sizes(len(batch.tokens)) for batch in b} <= known]
        reports[is_compiled] = [float(step(n, batches)["loss"]) for n, batches in enumerate(steps[:3])]
        seconds = step.compiled.seconds
        with torch.compiler.set_stance("fail_on_recompile" if is_compiled else "default"):
            reports[is_compiled] += [float(step(n, batches)["loss"]) for n, batches in enumerate(after, 3)]
        assert len(after) >= 1 and step.compiled.seconds == seconds and (seconds > 0) == is_compiled
    assert reports[True] == pytest.approx(reports[False], rel=1e-4)
