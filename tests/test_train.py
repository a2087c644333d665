"""The whole line: a run learns, resumes exactly, survives bad data, and is the same for any number of workers."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from conftest import losses, records, samples, text_only, tiny

from multimodal_fm.corpus import index, shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.stream.dataset import StepDataset
from multimodal_fm.stream.loader import Loader
from multimodal_fm.stream.tasks import build_stream, fit_tokenizers
from multimodal_fm.train import loop
from multimodal_fm.train.config import build, load
from multimodal_fm.train.setup import open_sources
from multimodal_fm.train.signals import StopSignal
from multimodal_fm.train.smoke import toy
from multimodal_fm.train.train_step import TrainStep

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/tiny_*.yaml"))


def fit(data: dict, folder: Path):
    """The configuration with tokenizers that have learned in `folder`, and its corpora."""
    folder.mkdir(exist_ok=True)
    config = build(data)
    corpora = open_sources(config)
    tokenizers = fit_tokenizers(config.tasks, corpora, config.model.tokenizers, config.seed, folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizers=tokenizers)), corpora


def make_stream(config, corpora) -> StepDataset:
    return build_stream(config.tasks, corpora, config.model.tokenizers, config.seed, config.microbatches)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """An uninterrupted run of the tiny configuration."""
    run = tmp_path_factory.mktemp("whole") / "run"
    loop.pretrain(build({**tiny(corpus), "run_dir": str(run), "track": ["tensorboard"]}))
    return run


def test_the_losses_fall_and_the_records_are_complete(whole):
    rows = records(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    names = ("words/masked", "next/causal", "looks/masked", "looks/masked/audio", "pairs/contrastive")
    pace = {"seconds", "data_wait", "optimizer_share", "tokens_per_second", "memory_gb"}
    assert {"loss", *(f"loss/{name}" for name in names), "tokens", "lr", "grad_norm", *pace} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["tokens"] > 0 for row in rows)
    assert [p.name for p in checkpoint.steps(whole)] == ["step-00000008", "step-00000012"]
    assert list((whole / "tensorboard").iterdir())
    assert not list(whole.rglob("*.pt")) and not list(whole.rglob("*.pkl"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small corpus of generated scenes in the place of the tiny configurations' own."""
    folder = tmp_path_factory.mktemp("scenes")
    words = ["--seed", "0", "--train", "150", "--validation", "20", "--to", str(folder)]
    subprocess.run([sys.executable, "-m", "data.scenes", *words], check=True, capture_output=True, cwd=ROOT)
    return folder / "0"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_tiny_config_learns(path, tmp_path, scenes):
    loop.pretrain(
        load(path, [f"run_dir={tmp_path}/run", f"sources.scenes.shards={scenes}/train-*.tar", "num_workers=0"])
    )
    rows = records(tmp_path / "run")
    for name in (k for k in rows[0] if k.startswith("loss/") and k.count("/") == 2):
        first, last = (sum(r[name] for r in part) / 6 for part in (rows[:6], rows[-6:]))
        assert last < 0.97 * first, (name, first, last)


def test_the_same_seed_gives_the_same_losses_for_any_number_of_workers(whole, tmp_path, corpus):
    for workers in (1, 2):
        run = tmp_path / str(workers)
        loop.pretrain(build({**tiny(corpus), "run_dir": str(run), "num_workers": workers}))
        assert losses(run) == losses(whole)
    loop.pretrain(build({**tiny(corpus), "run_dir": str(tmp_path / "other"), "seed": 1}))
    assert losses(tmp_path / "other") != losses(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopping_and_resuming_changes_nothing(tmp_path, corpus, optimizer):
    data = tiny(corpus, optim={"name": optimizer, "lr": 3e-3, "warmup_steps": 3})
    loop.pretrain(build({**data, "run_dir": str(tmp_path / "whole")}))
    run = tmp_path / "run"
    loop.pretrain(build({**data, "run_dir": str(run)}))
    for folder in checkpoint.steps(run)[-1:]:  # as if it had been killed after step 8
        shutil.rmtree(folder)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # and in the middle of a line
    for start in (8, 4):
        loop.pretrain(build({**data, "run_dir": str(run)}), resume=True)
        assert losses(run) == losses(tmp_path / "whole"), start
        assert [row["step"] for row in records(run)] == list(range(1, 13))
    for name in ("model", "objectives", "ema", "ema_objectives", "optimizer"):
        a, b = (checkpoint.read_tensors(checkpoint.newest(r), name) for r in (run, tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(path, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "multimodal_fm", "pretrain", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup would have it ignore
    )


def wait_for_step(run: Path, step: int, process) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    """The configuration of a run that is long enough to be stopped on a busy machine, and what such a run loses."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = tiny(corpus, run_dir=str(folder / "run"), steps=60, save_every=5, num_workers=1)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    loop.pretrain(build(data))
    return folder / "tiny.yaml", losses(folder / "run")


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, uninterrupted, number, code):
    path, expected = uninterrupted
    run = tmp_path / "run"
    process = start(path, f"run_dir={run}")
    wait_for_step(run, 12, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    if code > 0:
        assert int(checkpoint.newest(run).name[5:]) == len(records(run)), "it saves the step that it left at"
        assert "--resume" in err and "Traceback" not in err
    loop.pretrain(load(path, [f"run_dir={run}"]), resume=True)
    assert losses(run) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_until_the_step_is_saved(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        stop = StopSignal()
        stop.catch_interrupts()
        os.kill(os.getpid(), number)
        assert stop.number == number
        stop.restore()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_second_signal_leaves_at_once(tmp_path, write_config):
    run = tmp_path / "run"
    process = start(write_config(steps=100_000, save_every=100_000))
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (130, 143)


def test_what_is_to_be_measured_must_be_there_before_the_first_step(tmp_path, corpus):
    config = build(
        {**tiny(corpus), "run_dir": str(tmp_path / "run"), "evaluate": {"all": {"on": f"{tmp_path}/none-*.tar"}}}
    )
    with pytest.raises(UserError, match="evaluate.all: no file matches"):
        loop.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(tmp_path, corpus):
    """Unless it is told to go on with it."""
    run = tmp_path / "run"
    shards.write(tmp_path / "train-0.tar", samples(8))
    data = text_only(corpus, run, sources={"all": {"shards": f"{tmp_path}/train-*.tar"}})
    loop.pretrain(build({**data, "steps": 4}))
    before = (run / "metrics.jsonl").read_text()
    shards.write(tmp_path / "train-0.tar", samples(9))
    config = build({**data, "steps": 6})
    with pytest.raises(UserError, match="is not the file"):
        loop.pretrain(config, resume=True)
    index.build(str(tmp_path / "train-0.tar"))
    with pytest.raises(UserError, match="--allow-data-change"):
        loop.pretrain(config, resume=True)
    assert (run / "metrics.jsonl").read_text() == before
    assert loop.pretrain(config, resume=True, allow_data_change=True).name == "step-00000006"


def broken_corpus(folder: Path) -> None:
    """24 whole samples and four with one part each that cannot be read."""
    empty = io.BytesIO()
    soundfile.write(empty, torch.zeros(0).numpy(), 16_000, format="WAV")
    made = samples(28)
    made[3]["jpg"] = made[3]["jpg"][:200]
    made[9]["jpg"] = b"<!DOCTYPE html><html><body>Not found</body></html>"
    del made[15]["flac"]
    made[15]["wav"] = empty.getvalue()
    made[21]["txt"] = "un café carré".encode("latin-1")
    shards.write(folder / "train-0.tar", made)


def test_four_broken_parts_are_named_and_stop_nothing(mmfm, tmp_path, write_config):
    broken_corpus(tmp_path)
    done = mmfm("pretrain", write_config(sources={"all": {"shards": f"{tmp_path}/train-*.tar"}}, steps=20))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {(r["key"], r["part"], r["reason"]) for r in rows} == {
        ("sample0003", "image", "decode"),
        ("sample0009", "image", "decode"),
        ("sample0015", "audio", "empty"),
        ("sample0021", "text", "text-decode"),
    }
    assert rows[0].keys() == {"source", "shard", "key", "part", "reason", "detail", "step"}
    for key in ("sample0003", "sample0009", "sample0015", "sample0021"):
        assert key in "".join(done.stderr.splitlines(keepends=True)[-8:])
    assert all(r["step"] <= 20 for r in rows)


def test_a_source_of_nothing_but_bad_samples_stops_with_a_line(tmp_path, corpus):
    made = samples(6)
    for sample in made:
        sample["txt"] = b"\xff"
    shards.write(tmp_path / "a.tar", made)
    data = text_only(corpus, tmp_path / "run", sources={"all": {"shards": f"{tmp_path}/a.tar"}})
    with pytest.raises(UserError, match="not one sample of step 1"):
        loop.pretrain(build(data))
    assert "text-decode" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_half_precision_runs_on_a_cpu(tmp_path, corpus):
    loop.pretrain(build({**tiny(corpus, steps=2, precision="bfloat16"), "run_dir": str(tmp_path / "run")}))
    assert all(row["skipped"] == 0 for row in records(tmp_path / "run"))


def test_a_bad_sample_is_replaced_and_no_position_shifts(tmp_path, corpus):
    """The other samples of every step are the same with a broken one among them."""
    good, bad = samples(12), samples(12)
    bad[5]["txt"] = b"\xff\xfe\xfa"
    streams = []
    for name, written in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        shards.write(tmp_path / name / "a.tar", written)
        source = {"all": {"shards": f"{tmp_path}/{name}/a.tar"}}
        stream = make_stream(*fit(text_only(corpus, tmp_path, sources=source), tmp_path / f"run-{name}"))
        streams.append([[name for *_, name in sorted(stream[step].samples)] for step in range(12)])
    assert all(len(a) == len(b) == 4 for a, b in zip(*streams))
    for a, b in zip(*streams):
        for left, right in zip(a, b):
            assert left == right or (left == "all/sample0005" != right)
    assert any("all/sample0005" in step for step in streams[0])


def test_microbatches_give_the_same_gradients(corpus, tmp_path):
    """Dealing a step into several microbatches changes its gradients by rounding only."""
    results = []
    for microbatches in (1, 3):
        config, corpora = fit(tiny(corpus, microbatches=microbatches, optim={"grad_clip": 0}), tmp_path)
        step = make_stream(config, corpora)[0]
        assert len(step.batches) == microbatches
        train_step = TrainStep(config, torch.device("cpu"))
        report = train_step(0, [loop.with_counts(batch, step.counts) for batch in step.batches])
        results.append((report, {n: p.grad for n, p in train_step.trained.named_parameters()}))
    (one, gradients), (several, others) = results
    for name in ("loss", "loss/words/masked", "loss/next/causal", "loss/looks/masked", "loss/pairs/contrastive"):
        torch.testing.assert_close(one[name], several[name], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], others[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps, written", [(7, ["profile.json", "profile.txt"]), (2, [])])
def test_a_profile_is_written_of_a_few_steps(tmp_path, corpus, steps, written):
    loop.pretrain(build(text_only(corpus, tmp_path / "run", steps=steps)), profile=True)
    assert sorted(file.name for file in (tmp_path / "run").glob("profile*")) == written


def test_smoke_runs_at_toy_size_and_touches_nothing_of_the_users(tmp_path, write_config):
    path = write_config(steps=100_000, backbone={"width": 768, "depth": 12, "num_heads": 12})
    for name in ("run", "run-smoke"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("keep me")
    folder = loop.pretrain(toy(load(path)))
    assert folder.name == "step-00000010" and tmp_path not in folder.parents
    for name in ("run", "run-smoke"):
        assert [file.name for file in (tmp_path / name).iterdir()] == ["mine.txt"]
    shutil.rmtree(folder.parents[1])


def test_nothing_finite_stops_with_a_line(tmp_path, corpus):
    config = build(
        {
            **text_only(corpus, tmp_path / "run", optim={"lr": 1e30, "grad_clip": 0, "warmup_steps": 1}, steps=40),
        }
    )
    with pytest.raises(UserError, match="without a finite gradient"):
        loop.pretrain(config)


def test_loading_draws_nothing_from_the_global_generator(corpus, tmp_path):
    stream = make_stream(*fit(text_only(corpus, tmp_path), tmp_path))
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = Loader(stream, 0, 3, workers)
        next(iter(loader))
        loader.close()
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_read_on_the_way_ends_with_a_checkpoint(tmp_path, corpus, monkeypatch):
    config = build(text_only(corpus, tmp_path / "run", steps=9, save_every=100))
    real = StepDataset.read

    def read(self, step, *more):
        data = real(self, step, *more)
        return dataclasses.replace(data, samples=[]) if step == 3 else data

    monkeypatch.setattr(StepDataset, "read", read)
    with pytest.raises(UserError, match=r"not one sample of step 4 .*checkpoint: .*step-00000003"):
        loop.pretrain(config)
    monkeypatch.undo()
    assert loop.pretrain(config, resume=True).name == "step-00000009"
