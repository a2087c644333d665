"""Losses and evaluations during a run: on fixed samples, with the averaged weights, the best checkpoint kept."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from conftest import records, samples, text_only, tiny
from test_train import fit

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.tokenizers import image
from multimodal_fm.train import loop
from multimodal_fm.train.config import build
from multimodal_fm.train.parallel import Ranks
from multimodal_fm.train.train_step import TrainStep
from multimodal_fm.train.validate import Validation


def sources(corpus) -> dict:
    return {"all": {"shards": f"{corpus}/train-*.tar", "validation": f"{corpus}/validation-*.tar", "group": "color"}}


def test_the_same_is_measured_each_time(tmp_path, corpus):
    """With weights that do not move every validation gives the same figures, bit for bit."""
    run = tmp_path / "run"
    data = tiny(
        corpus, run_dir=str(run), sources=sources(corpus), steps=4, optim={"lr": 0.0}, validate_every=2,
        validation_steps=2, evaluate_every=4, evaluate={"held": {"on": f"{corpus}/validation-*.tar"}},
    )  # fmt: skip
    loop.pretrain(build(data))
    first, last = (row for row in records(run) if "validation/loss" in row)
    assert (first.pop("step"), last.pop("step")) == (2, 4)
    evaluated = {name: last.pop(name) for name in list(last) if name.startswith("evaluate/")}
    names = ("words/masked", "next/causal", "looks/masked", "pairs/contrastive")
    assert first == last and set(first) == {"validation/loss", *(f"validation/loss/{name}" for name in names)}
    assert first["validation/loss"] == pytest.approx(sum(first[f"validation/loss/{name}"] for name in names))
    assert {"evaluate/held/retrieval/text_to_image/r@10", "evaluate/held/text/bits_per_byte"} <= evaluated.keys()


def test_held_out_samples_are_read_without_augmentation_or_the_weights_of_training(tmp_path, corpus, monkeypatch):
    data = tiny(corpus, sources=sources(corpus), validate_every=1)
    data["tasks"] = {"looks": data["tasks"]["looks"]}
    config, _ = fit(data, tmp_path)
    generators, read = [], image.Tokenizer.read

    def record(self, raw, generator=None):
        generators.append(generator)
        return read(self, raw, generator)

    monkeypatch.setattr(image.Tokenizer, "read", record)
    step = TrainStep(config, torch.device("cpu"))
    validation = Validation(config, step)
    names = {name for number in range(4) for *_, name in validation.stream[number].samples}
    assert names and all(name.startswith("all/sample01") for name in names)  # those of the validation shard
    before = validation()
    assert generators and set(generators) == {None}
    with torch.no_grad():
        for parameter in step.trained.parameters():
            parameter.normal_()
    assert validation() == before
    with torch.no_grad():
        for parameter in step.ema.parameters():
            parameter.mul_(0.5)
    assert validation() != before
    assert all(parameter.grad is None for parameter in step.ema.parameters())


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, corpus, monkeypatch):
    values = {1: 1.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 1.2, 6: 1.1}  # of equal ones the later
    run, counter = tmp_path / "run", iter(values.values())
    monkeypatch.setattr(Validation, "__call__", lambda self, averaged=None: {"validation/loss": next(counter)})
    data = text_only(
        corpus, run, sources=sources(corpus), steps=5, save_every=1, keep=1, validate_every=1, best="validation/loss"
    )
    loop.pretrain(build(data))
    assert [folder.name for folder in checkpoint.steps(run)] == ["step-00000002", "step-00000005"]
    assert json.loads((run / "best.json").read_text()) == {
        **{"figure": "validation/loss", "value": 1.0},
        **{"step": 2, "since": 1},
    }
    loop.pretrain(build({**data, "steps": 6}), resume=True)  # which knows the best one so far
    assert [folder.name for folder in checkpoint.steps(run)] == ["step-00000002", "step-00000006"]


def test_a_figure_that_is_undefined_is_never_the_best(tmp_path, corpus, monkeypatch):
    run, counter = tmp_path / "run", iter([math.nan, 2.0, math.nan, 1.0])
    monkeypatch.setattr(Validation, "__call__", lambda self, averaged=None: {"validation/loss": next(counter)})
    common = {"sources": sources(corpus), "save_every": 4, "validate_every": 1, "best": "validation/loss"}
    loop.pretrain(build(text_only(corpus, run, steps=4, **common)))
    assert json.loads((run / "best.json").read_text())["step"] == 4
    (run / "best.json").write_text('{"figure": "validation/loss", "value": NaN, "step": 3}')
    assert checkpoint.read_best(run) is None


def test_a_best_checkpoint_that_is_gone_is_made_again(tmp_path, corpus, monkeypatch):
    """It was damaged with the newest ones: the run goes on from before it, and finds the same figure."""
    run = tmp_path / "run"
    counter = iter([2.0, 2.0, 2.0, 2.5, 2.5])
    monkeypatch.setattr(Validation, "__call__", lambda self, averaged=None: {"validation/loss": next(counter)})
    data = text_only(corpus, run, sources=sources(corpus), steps=2, save_every=1, validate_every=1)
    loop.pretrain(build(data))
    (run / "best.json").write_text('{"figure": "validation/loss", "value": 2.0, "step": 3}')
    loop.pretrain(build({**data, "steps": 5, "save_every": 5, "keep": 1, "best": "validation/loss"}), resume=True)
    assert [folder.name for folder in checkpoint.steps(run)] == ["step-00000003", "step-00000005"]


@pytest.mark.parametrize("every", ["validate_every", "evaluate_every"])
def test_a_figure_that_there_is_not_is_named(tmp_path, corpus, every, monkeypatch):
    monkeypatch.setattr(loop, "run_evaluations", lambda *_: {"evaluate/held/text/bits_per_byte": 3.0})
    data = text_only(corpus, tmp_path / "run", sources=sources(corpus), steps=2, best="valid/loss", **{every: 1})
    data["evaluate"] = {"held": {"on": f"{corpus}/validation-*.tar"}}
    with pytest.raises(UserError, match=r"best: no figure is called 'valid/loss' \(there are: (validation|evaluate)/"):
        loop.pretrain(build(data))


def test_a_small_held_out_set_is_read_in_smaller_batches(tmp_path, corpus):
    data = text_only(corpus, tmp_path / "run", sources=sources(corpus), steps=1, validate_every=1)
    data["tasks"]["words"]["batch_size"] = 20  # of 32 samples to train on, and 16 held out
    loop.pretrain(build(data))
    assert records(tmp_path / "run")[-1]["validation/loss"] > 0


def test_shards_without_what_a_task_reads_are_refused_and_signals_stay_as_they_were(tmp_path, corpus):
    before = signal.getsignal(signal.SIGINT)
    images = [{key: sample[key] for key in ("__key__", "jpg")} for sample in samples(8)]
    shards.write(tmp_path / "images.tar", images)
    source = {"all": {"shards": f"{corpus}/train-*.tar", "validation": f"{tmp_path}/images.tar"}}
    data = text_only(corpus, tmp_path / "run", sources=source, steps=2, validate_every=1)
    with pytest.raises(UserError, match="task words: no sample of source all has any of: text"):
        loop.pretrain(build(data))
    assert signal.getsignal(signal.SIGINT) is before


def test_validation_shards_must_be_there_before_the_first_step(tmp_path, corpus):
    source = {"all": {"shards": f"{corpus}/train-*.tar", "validation": f"{corpus}/none-*.tar"}}
    with pytest.raises(UserError, match="sources.all.validation: no file matches"):
        loop.pretrain(build(text_only(corpus, tmp_path / "run", sources=source, validate_every=1)))
    assert not (tmp_path / "run").exists()


def test_a_held_out_sample_that_cannot_be_read_is_named_and_weighs_nothing(tmp_path, corpus, capsys):
    """The mean is over the steps that had something: a step without a sample is no step with a loss of 0."""
    made = [{e: one[e] for e in ("__key__", "txt", "json")} for one in samples(4, 100)]
    shards.write(tmp_path / "mixed.tar", [*made, *({"__key__": f"bad{i}", "txt": b"\xff"} for i in range(4))])
    data = text_only(corpus, tmp_path / "run", steps=1, validate_every=1, validation_steps=2)
    data["sources"]["all"]["validation"] = str(tmp_path / "mixed.tar")
    loop.pretrain(build(data))
    said = capsys.readouterr().err
    assert "validation: skipped 4 parts: 4 text-decode" in said and "bad0" in said

    config, _ = fit(data, tmp_path)
    validation = Validation(config, TrainStep(config, torch.device("cpu")))
    whole = validation()
    steps = [validation.stream[number] for number in range(2)]
    empty = dataclasses.replace(steps[1], batches=[])
    validation.stream = [steps[0], empty]
    assert validation()["validation/loss"] > 0.75 * whole["validation/loss"]


def test_what_is_wrong_with_best_is_told_to_every_rank(tmp_path, corpus):
    """It is found on the first rank alone, inside what the others wait for."""
    told = []

    class First(Ranks):
        def on_first(self, work):
            try:
                return work()
            except UserError as error:
                told.append(str(error))
                raise

    data = text_only(corpus, tmp_path / "run", sources=sources(corpus), steps=1, validate_every=1, best="no/such")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.parallel, "init", lambda device: First())
        with pytest.raises(UserError, match="no figure is called 'no/such'"):
            loop.pretrain(build(data))
    assert len(told) == 1
