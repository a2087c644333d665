"""Monitors that act: each on a planted failure, which ends badly without it, and exactly the same after a resume."""

import functools
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import losses, records

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.tokenizers.text import Config as TextConfig
from multimodal_fm.tokenizers.text import Tokenizer
from multimodal_fm.train import grad_cache, loop
from multimodal_fm.train.config import build
from multimodal_fm.train.guards import Config, Guards, matches

PULL = '''
"""Pull the modalities of a sample together with nothing that keeps samples apart: what collapses."""
from multimodal_fm.batch import Example
from multimodal_fm.objectives import base
from multimodal_fm.tokens import constant

class Objective(base.Objective):
    whole_step = True

    @staticmethod
    def arrange(config, sample, generator=None):
        inputs = [t.replace(sequence=constant(n, len(t))) for n, t in enumerate(sample.tokens.values())]
        return Example(inputs, [None] * len(inputs), group=sample.group)

    def features(self, output, targets):
        return output.embedding(targets.sequence, targets.modality)

    def compare(self, features, pairs):
        (pair,) = pairs.values()
        left, right = (features.index_select(0, rows) for rows in pair.rows)
        return (left - right).square().sum(1).mean(), base.measure_spread(features)
'''
CODES = '''
"""Quantize numbers to the nearest of 16 learned codes, of which all but those that begin near stay dead."""
import torch
from torch import nn
from multimodal_fm.batch import Example
from multimodal_fm.objectives import base

class Objective(base.Objective):
    def __init__(self, config, model, modalities):
        super().__init__(config, model, modalities)
        self.codes = nn.Parameter(torch.cat([torch.randn(2, 1), 50 + torch.randn(14, 1)]))

    @staticmethod
    def arrange(config, sample, generator=None):
        (tokens,) = sample.tokens.values()
        return Example([tokens], [None], [tokens], [torch.arange(len(tokens))], sample.group)

    def loss(self, output, targets):
        content = targets.tokens["numbers"].content
        nearest = torch.cdist(content, self.codes).argmin(1)
        loss = (content - self.codes[nearest]).square().mean() + output.zero()
        return loss, {"codebook_use": torch.tensor(len(nearest.unique()) / len(self.codes))}
'''


def npy(values) -> bytes:
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


def series(count: int, seed: int = 0) -> list[dict]:
    """Waves of two modalities: numbers, and the same numbers in another member for a second tokenizer."""
    made, draw = [], np.random.default_rng(seed)
    for number in range(count):
        wave = npy(np.sin(np.arange(12) * draw.uniform(0.2, 1.5) + draw.uniform(0, 6))[:, None])
        made.append({"__key__": f"{seed}-{number:04d}", "npy": wave, "txt": f"wave {number % 7}"})
    return made


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves")
    made = series(160)
    shards.write(folder / "train-0.tar", made)
    Tokenizer(TextConfig(vocab_size=258, max_tokens=12)).fit(
        [{"txt": s["txt"].encode()} for s in made], folder / "text"
    )
    return folder


def settings(waves, run_dir, **changes) -> dict:
    """A run of a tenth of a second a dozen steps: the next number of a wave."""
    task = {"objectives": {"causal": {}}, "modalities": ["numbers"], "batch_size": 4, "sources": {"waves": 1}}
    data = {
        "sources": {"waves": {"shards": f"{waves}/train-*.tar"}},
        "tasks": {"next": task},
        "model": {
            "tokenizers": {
                "numbers": {"max_tokens": 12},
                "text": {"vocab_size": 258, "max_tokens": 12, "file": f"{waves}/text.json"},
            },
            "backbone": {"width": 16, "depth": 1, "num_heads": 2},
            "heads": {"retrieval": {"embed_dim": 8}},
        },
        "optim": {"lr": 3e-3, "warmup_steps": 1, "schedule": "constant", "grad_clip": 0.0, "betas": [0.9, 0.999]},
        "steps": 24, "save_every": 4, "num_workers": 0, "threads": 1, "track": [], "run_dir": str(run_dir),
    }  # fmt: skip
    return {**data, **changes}


def tail(run, name: str = "loss", count: int = 4) -> float:
    rows = list(losses(run).values())[-count:]
    return sum(row[name] for row in rows) / len(rows)


def guards(**monitor) -> Guards:
    return Guards({"one": Config(**monitor)}, {"a/x": 1.0, "b/y": 2.0}, {"a": ["text"], "b": ["image", "text"]})


def looks(own: Guards, values, figure: str = "loss") -> list[int]:
    """The steps at which a monitor acts."""
    return [act["step"] for step, value in enumerate(values, 1) for act in own.look({"step": step, figure: value})]


# The rules


def test_bounds_medians_and_deviations():
    assert looks(guards(figure="loss", above=2), [1, 3, 3, 1, 3]) == [2, 5], "a warning is given once a stretch"
    assert looks(guards(figure="loss", below=2, patience=2, action="stop"), [1, 1, 1, 3, 1]) == [2, 3]
    assert looks(guards(figure="l*", above=2), [math.nan, 1, math.inf]) == [1, 3]
    assert looks(guards(figure="loss", above=2, after=2, every=2), [3, 3, 3, 1, 3, 3]) == [6]
    steady = [2.0, 2.1, 1.9, 2.0, 2.2]
    assert looks(guards(figure="loss", factor=1.5, window=5), [9, *steady, 3.5, 2.0]) == [7]
    assert looks(guards(figure="loss", factor=1.5, window=6), [*steady, 3.5]) == [], "no median yet"
    # median 2, MAD 0.1: six standard deviations are 6 * 1.4826 * 0.1
    assert looks(guards(figure="loss", deviations=6, window=5), [*steady, 2.88]) == []
    assert looks(guards(figure="loss", deviations=6, window=5), [*steady, 2.90]) == [6]
    assert looks(guards(figure="loss", deviations=6, window=5), [2.0] * 9 + [2.0001]) == [], "rounding is no spike"


def test_a_star_stands_for_a_part_of_a_name():
    assert matches("loss/words/masked", "loss/*/*") and not matches("loss/words/masked/text", "loss/*/*")
    assert matches("loss/a/latent/target_std", "loss/*/latent/t*") and not matches(
        "loss/a/codes/target_std", "loss/*/l*/*"
    )


def test_a_monitor_that_finds_no_figure_is_named():
    said, own = [], guards(figure="lss/*/*", above=1, after=1)
    for step in (1, 2, 3):
        own.look({"step": step, "loss": 1.0}, said.append)
    assert len(said) == 1 and "no figure is called 'lss/*/*'" in said[0]


def test_what_is_out_of_bounds_is_remembered():
    """Interrupted anywhere, the rules say the same."""
    values = list(np.random.default_rng(0).lognormal(size=60))
    whole, own = guards(figure="loss", factor=2, window=8, patience=2, action="roll_back"), None
    expected, found = looks(whole, values), []
    for step, value in enumerate(values, 1):
        state = json.loads(json.dumps(own.state())) if own else None
        own = Guards(whole.monitors, whole.weights, whole.modalities, state)
        found += [act["step"] for act in own.look({"step": step, "loss": value})]
    assert found == expected and expected


def test_steps_of_the_stream_that_are_left_out():
    own, wanted = guards(figure="loss", above=1), list(range(100))
    for first, last in ((5, 7), (3, 3), (3, 6), (20, 20)):  # numbers of steps, from 1 on, as they are at that time
        left_out = wanted[first - 1 : last]
        own.skip(first, last)
        wanted = [step for step in wanted if step not in left_out]
        assert [own.data_step(step) for step in range(60)] == wanted[:60]


def test_weights_move_to_equal_shares_within_bounds():
    own = guards(figure="grad_share/*/*", below=0.2, action="reweigh", rate=0.5, max_factor=4)
    row = {"step": 1, "grad_share/a/x": 0.1, "grad_share/b/y": 0.9}
    (act,) = own.look(row)
    assert act["factors"] == pytest.approx({"a/x": (0.5 / 0.1) ** 0.5, "b/y": (0.5 / 0.9) ** 0.5})
    for _ in range(3):
        own.factors = own.look(row)[0]["factors"]
    assert own.weigh()["a/x"] == pytest.approx(4) and own.weigh()["b/y"] == pytest.approx(2 * 0.5556**1.5, rel=1e-3)
    own = guards(figure="modality_grad_share/image", below=0.2, action="reweigh", rate=1.0)
    (act,) = own.look({"step": 1, "modality_grad_share/image": 0.1, "modality_grad_share/text": 0.9})
    both = math.sqrt((0.5 / 0.1) * (0.5 / 0.9))  # task b reads both, a text alone
    assert act["factors"] == pytest.approx({"a/x": 0.5 / 0.9, "b/y": both})


@pytest.mark.parametrize("wrong, said", [
    ({"figure": "loss"}, "needs a bound"), ({"figure": "loss", "above": 1, "patience": 0}, "at least 1"),
    ({"figure": "loss", "above": 1, "action": "reweigh"}, "is a share"),
    ({"figure": "loss", "above": 1, "rate": 2}, "rate"),
])  # fmt: skip
def test_settings_that_cannot_be(waves, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        build(settings(waves, tmp_path, monitors={"one": wrong}))


# The actions, on planted failures


@pytest.fixture
def bad_batch(monkeypatch):
    """Step 11 of the stream, from 0, holds numbers a thousand times as large."""
    from multimodal_fm.stream.dataset import StepDataset

    real = StepDataset.read

    def read(self, step, *more):
        data = real(self, step, *more)
        if step == 11:
            for batch in data.batches:
                batch.content["numbers"].mul_(1000)
                batch.tasks["next"].tokens["numbers"].content.mul_(1000)
        return data

    monkeypatch.setattr(StepDataset, "read", read)


SPIKE = {"figure": "loss/*/*", "factor": 5.0, "window": 4, "action": "roll_back"}


def test_a_loss_spike_is_rolled_back_and_its_data_left_out(waves, tmp_path, bad_batch):
    loop.pretrain(build(settings(waves, tmp_path / "plain", steps=40)))
    run = tmp_path / "run"
    data = settings(waves, run, monitors={"spikes": SPIKE}, steps=40, log_samples=True)
    loop.pretrain(build(data))
    assert losses(tmp_path / "plain")[12]["loss"] > 1000
    assert tail(run) < 0.7 * tail(tmp_path / "plain"), (
        "without the monitor the optimizer's moments are spoiled for long"
    )
    (event,) = records(run, "monitors")
    assert (event["step"], event["to"], event["skipped"]) == (12, 8, [11, 12]) and "running median" in event["why"]
    rows = records(run)
    assert [row["step"] for row in rows] == list(range(1, 41)) and max(row["loss"] for row in rows) < 100
    assert [row["step"] for row in rows if "monitor/spikes" in row] == [9], "the first row after the roll back says so"
    read = [name for row in records(run, "samples") for name in row["samples"]]
    loop.pretrain(build(settings(waves, tmp_path / "clean", steps=42, log_samples=True)))
    clean = [row["samples"] for row in records(tmp_path / "clean", "samples")]
    assert read == [name for step, names in enumerate(clean) if step not in (10, 11) for name in names]
    assert checkpoint.read_data(checkpoint.newest(run), "state")["stream_step"] == 42


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_roll_back_is_the_same_whether_interrupted_or_not(waves, tmp_path, bad_batch, workers):
    """Killed before the spike, while it goes back, and after; what is written down is the same, too."""
    data = {"monitors": {"spikes": SPIKE}, "save_every": 5, "keep": 9, "num_workers": workers, "steps": 17}
    whole, run = tmp_path / "whole", tmp_path / "run"
    loop.pretrain(build(settings(waves, whole, **data)))
    loop.pretrain(build(settings(waves, run, **data)))
    kept = checkpoint.steps(run)
    for folder in kept[::-1][1:]:
        for later in checkpoint.steps(run):
            if later > folder:
                shutil.rmtree(later)
        loop.pretrain(build(settings(waves, run, **data)), resume=True)
        assert losses(run) == losses(whole), folder.name
        assert records(run, "monitors") == records(whole, "monitors")
    a, b = (checkpoint.newest(one) for one in (run, whole))
    for name in ("model", "ema", "optimizer"):
        a_, b_ = checkpoint.read_tensors(a, name), checkpoint.read_tensors(b, name)
        assert all(torch.equal(a_[key], b_[key]) for key in a_)


@pytest.mark.slow
def test_two_ranks_do_the_same_as_one(waves, tmp_path):
    """A roll back and moved weights under torchrun: the first rank decides, both obey."""
    import yaml
    from test_stream import torchrun

    big = [s if number != 77 else {**s, "npy": npy(1000.0 * np.ones((12, 1)))} for number, s in enumerate(series(160))]
    shards.write(tmp_path / "train-0.tar", big)
    (tmp_path / "text.json").write_bytes((waves / "text.json").read_bytes())
    monitors = {"spikes": {**SPIKE, "figure": "loss/next/causal", "margin": 0}, "starved": {**STARVED, "every": 3}}
    found = []
    for name in ("one", "two"):
        data = starving(tmp_path, tmp_path / name, monitors=monitors, microbatches=2, steps=40, save_every=5)
        data["tasks"]["next"]["weight"] = 0.01
        if name == "one":
            loop.pretrain(build(data))
        else:
            (tmp_path / "two.yaml").write_text(yaml.safe_dump(data))
            done = torchrun(2, "pretrain", tmp_path / "two.yaml")
            assert done.returncode == 0, done.stderr
        acts = [(act["step"], act["monitor"], act.get("to")) for act in records(tmp_path / name, "monitors")]
        found.append((acts, {step: row["loss"] for step, row in losses(tmp_path / name).items()}))
    (acts, one), (others, two) = found
    assert acts == others and {name for _, name, _ in acts} == {"spikes", "starved"}
    assert two == pytest.approx(one, rel=1e-3)


def test_a_spike_that_comes_again_and_again_ends_the_run(waves, tmp_path, monkeypatch):
    data = settings(waves, tmp_path / "run", monitors={"spikes": {**SPIKE, "factor": None, "above": -1.0, "after": 6}})
    data["monitors"]["spikes"]["max_roll_backs"] = 2
    with pytest.raises(UserError, match="after 2 roll backs; checkpoint: "):
        loop.pretrain(build(data))
    assert [event["to"] for event in records(tmp_path / "run", "monitors")] == [4, 4]


def test_a_collapse_stops_the_run_while_it_can_be_seen(waves, tmp_path, monkeypatch):
    (tmp_path / "monitored").mkdir()
    (tmp_path / "monitored/pull.py").write_text(PULL)
    monkeypatch.syspath_prepend(tmp_path)
    objective = {"pull": {"objective": "monitored.pull"}}
    tasks = {
        "pull": {"objectives": objective, "modalities": ["numbers", "text"], "batch_size": 8, "sources": ["waves"]}
    }
    name, steps = "loss/pull/pull/feature_std", 40
    changes = {"tasks": tasks, "steps": steps, "optim": {"lr": 2e-3, "warmup_steps": 1, "schedule": "constant"}}
    loop.pretrain(build(settings(waves, tmp_path / "plain", **changes)))
    assert tail(tmp_path / "plain", name) < 0.2 and tail(
        tmp_path / "plain", name.replace("feature_std", "effective_rank")
    )
    monitor = {"figure": "loss/*/*/feature_std", "below": 0.5, "patience": 2, "action": "stop"}
    run = tmp_path / "run"
    with pytest.raises(UserError, match="monitor collapse: .*feature_std.* is below 0.5.*checkpoint: "):
        loop.pretrain(build(settings(waves, run, monitors={"collapse": monitor}, **changes)))
    assert checkpoint.newest(run).name < "step-00000030" and losses(run)[len(losses(run))][name] > 0.25
    with pytest.raises(UserError, match="monitor collapse"):  # nothing has changed
        loop.pretrain(build(settings(waves, run, monitors={"collapse": monitor}, **changes)), resume=True)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_dead_codes_are_named(waves, tmp_path, monkeypatch, action, capsys):
    (tmp_path / "quantizing").mkdir()
    (tmp_path / "quantizing/codes.py").write_text(CODES)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = {"codes": {"objectives": {"codes": {"objective": "quantizing.codes"}}, "modalities": ["numbers"]}}
    tasks["codes"] |= {"batch_size": 4, "sources": ["waves"]}
    monitor = {"figure": "loss/codes/*/codebook_use", "below": 0.5, "patience": 3, "action": action}
    config = build(settings(waves, tmp_path / "run", tasks=tasks, monitors={"dead": monitor}))
    if action == "stop":
        with pytest.raises(UserError, match=r"monitor dead: step 3: loss/codes/codes/codebook_use 0.125 is below 0.5"):
            loop.pretrain(config)
        return
    loop.pretrain(config)
    rows = records(tmp_path / "run")
    assert rows[-1]["loss/codes/codes/codebook_use"] < 0.2, "without an action they stay dead"
    assert [row["step"] for row in rows if "monitor/dead" in row] == [3]
    assert "monitor dead: step 3" in capsys.readouterr().err
    assert records(tmp_path / "run", "monitors")[0]["action"] == "warn"


STARVED = {"figure": "grad_share/*/*", "below": 0.25, "action": "reweigh", "every": 4, "rate": 1.0, "max_factor": 1e8}


def starving(waves, run, **changes) -> dict:
    """Two tasks, of which one's losses are weighed so little that Adam's epsilon swallows its gradients."""
    task = {"objectives": {"causal": {}}, "batch_size": 4, "sources": ["waves"]}
    tasks = {
        "next": {**task, "modalities": ["numbers"], "weight": 1e-8},
        "words": {**task, "modalities": ["text"]},
    }
    optim = {"lr": 1e-2, "warmup_steps": 1, "schedule": "constant"}
    return settings(waves, run, tasks=tasks, **{"steps": 24, "optim": optim, **changes})


def test_a_starved_task_gets_its_share(waves, tmp_path):
    loop.pretrain(build(starving(waves, tmp_path / "plain")))
    loop.pretrain(build(starving(waves, tmp_path / "run", monitors={"starved": STARVED})))
    before, after = (tail(tmp_path / name, "loss/next/causal") for name in ("plain", "run"))
    assert before > 0.95 * losses(tmp_path / "plain")[1]["loss/next/causal"], "without the monitor it learns nothing"
    assert after < 0.8 * before
    shares = [row["grad_share/next/causal"] for row in records(tmp_path / "run") if "grad_share/next/causal" in row]
    assert len(shares) == 6 and shares[0] < 1e-4 and 0.2 < shares[-1] < 0.8
    rows = records(tmp_path / "run")
    assert "weight/next/causal" not in rows[3] and rows[-1]["weight/next/causal"] > 1e-3
    assert {"modality_grad_share/text", "loss_share/words/causal", "modality_loss_share/numbers"} <= rows[3].keys()


def test_weights_that_moved_are_the_same_after_a_resume(waves, tmp_path):
    """Figures are read early where the run is saved; what they ask for is done when it would have been done."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    data = {"monitors": {"starved": {**STARVED, "every": 1, "rate": 0.2}}, "keep": 99, "steps": 16}
    loop.pretrain(build(starving(waves, whole, **data, save_every=1000)))
    loop.pretrain(build(starving(waves, run, **data, save_every=1)))
    assert losses(run) == losses(whole)
    for step in (11, 3):
        for folder in checkpoint.steps(run):
            if folder.name > f"step-{step:08d}":
                shutil.rmtree(folder)
        loop.pretrain(build(starving(waves, run, **data, save_every=7)), resume=True)
        assert losses(run) == losses(whole), step


def test_a_modality_is_lifted_by_the_tasks_that_read_it(waves, tmp_path):
    monitor = {**STARVED, "figure": "modality_grad_share/numbers"}
    loop.pretrain(build(starving(waves, tmp_path / "run", monitors={"starved": monitor})))
    assert records(tmp_path / "run")[-1]["weight/next/causal"] > 1e-4


def test_shares_are_those_of_a_plain_computation(waves, tmp_path):
    """And measuring them changes neither losses nor gradients."""
    from test_train import fit, make_stream

    from multimodal_fm.batch import with_counts
    from multimodal_fm.train.train_step import TrainStep

    data = starving(waves, tmp_path / "run", microbatches=2)
    data["tasks"]["next"]["weight"] = 0.5
    data["tasks"]["both"] = {"objectives": {"contrastive": {}}, "modalities": ["numbers", "text"], "batch_size": 4,
                             "sources": ["waves"]}  # fmt: skip
    config, corpora = fit(data, tmp_path / "fitted")
    step = make_stream(config, corpora)[0]
    batches = [with_counts(batch, step.counts) for batch in step.batches]
    plain, measured = (TrainStep(config, torch.device("cpu")) for _ in range(2))
    without, report = plain(0, batches), measured(0, batches, measure=True)
    assert all(torch.equal(report[name], without[name]) for name in without)
    for a, b in zip(plain.parameters, measured.parameters, strict=True):
        assert torch.equal(a, b)

    trained, squares = TrainStep(config, torch.device("cpu")), {}
    for name in trained.weights:  # each objective alone, and its gradient at the backbone's output
        kept = []
        hook = trained.model.register_forward_hook(functools.partial(keep_gradient, kept))
        alone = {key: weight if key == name else 0.0 for key, weight in trained.weights.items()}
        torch.manual_seed(0)
        grad_cache.forward_backward(trained.model, trained.objectives, alone, batches)
        squares[name] = sum(float(one.grad.square().sum()) for one in kept if one.grad is not None)
        hook.remove()
    total = sum(math.sqrt(square) for square in squares.values())
    for name, square in squares.items():
        assert float(report[f"grad_share/{name}"]) == pytest.approx(math.sqrt(square) / total, rel=1e-4)
    weighted = {name: weight * float(report[f"loss/{name}"]) for name, weight in trained.weights.items()}
    for name, loss in weighted.items():
        assert float(report[f"loss_share/{name}"]) == pytest.approx(loss / sum(weighted.values()))
    for family in ("modality_grad_share", "modality_loss_share"):
        assert sum(float(report[f"{family}/{m}"]) for m in ("numbers", "text")) == pytest.approx(1)


def keep_gradient(kept: list, _, __, output) -> None:
    if output.tokens.content.requires_grad:
        output.tokens.content.retain_grad()
        kept.append(output.tokens.content)


def test_the_spread_of_features():
    from multimodal_fm.objectives.base import measure_spread

    draw = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 6, generator=draw) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0])
    figures = measure_spread(features)
    values = np.linalg.eigvalsh(np.cov(features.double().numpy().T, bias=True))
    assert float(figures["feature_std"]) == pytest.approx(math.sqrt(values.sum()), rel=1e-5)
    assert float(figures["effective_rank"]) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)
    assert float(measure_spread(torch.ones(5, 3))["feature_std"]) == 0
