"""The whole line: a run learns, resumes exactly, survives bad data, and is the same for any number of workers."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import samples, tiny
from test_config import mmfm

from multimodal_fm import load as load_model
from multimodal_fm.config import build, load
from multimodal_fm.corpus import index, shards
from multimodal_fm.errors import UserError
from multimodal_fm.model import Model
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.stream.dataset import Steps
from multimodal_fm.stream.tasks import fit, tasks_of, weights_of
from multimodal_fm.stream.workers import Loader
from multimodal_fm.train import loop
from multimodal_fm.train.grad_cache import forward_backward
from multimodal_fm.train.smoke import toy

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/tiny_*.yaml"))


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> dict[int, dict]:
    timing = ("seconds", "tokens_per_second")
    return {row["step"]: {k: v for k, v in row.items() if k not in timing} for row in metrics(run)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """An uninterrupted run of the tiny configuration."""
    run = tmp_path_factory.mktemp("whole") / "run"
    loop.pretrain(build({**tiny(corpus), "run": str(run)}))
    return run


def test_the_losses_fall_and_the_records_are_complete(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "loss/words", "loss/next", "loss/looks", "loss/pairs", "tokens", "lr"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["tokens"] > 0 for row in rows)
    assert [p.name for p in checkpoint.steps(whole)] == ["step-00000008", "step-00000012"]
    assert not list(whole.rglob("*.pt")) and not list(whole.rglob("*.pkl"))
    assert list((whole / "tensorboard").iterdir())


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small corpus of generated scenes in the place of the tiny configurations' own."""
    folder = tmp_path_factory.mktemp("scenes")
    words = ["--seed", "0", "--train", "150", "--validation", "20", "--to", str(folder)]
    subprocess.run([sys.executable, "-m", "data.scenes", *words], check=True, capture_output=True, cwd=ROOT)
    return folder / "0"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_tiny_config_learns(path, tmp_path, scenes):
    loop.pretrain(load(path, [f"run={tmp_path}/run", f"sources.scenes.shards={scenes}/train-*.tar", "workers=0"]))
    rows = metrics(tmp_path / "run")
    for name in (k for k in rows[0] if k.startswith("loss/") and k.count("/") == 1):
        first, last = (sum(r[name] for r in part) / 6 for part in (rows[:6], rows[-6:]))
        assert last < 0.97 * first, (name, first, last)


def test_the_same_seed_gives_the_same_losses_for_any_number_of_workers(whole, tmp_path, corpus):
    for workers in (1, 2):
        run = tmp_path / str(workers)
        loop.pretrain(build({**tiny(corpus), "run": str(run), "workers": workers}))
        assert losses(run) == losses(whole)
    loop.pretrain(build({**tiny(corpus), "run": str(tmp_path / "other"), "seed": 1}))
    assert losses(tmp_path / "other") != losses(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopping_and_resuming_changes_nothing(tmp_path, corpus, optimizer):
    data = tiny(corpus, optim={"name": optimizer, "lr": 3e-3, "warmup": 3})
    loop.pretrain(build({**data, "run": str(tmp_path / "whole")}))
    run = tmp_path / "run"
    loop.pretrain(build({**data, "run": str(run)}))
    for folder in checkpoint.steps(run)[-1:]:  # as if it had been killed after step 8
        import shutil

        shutil.rmtree(folder)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # and in the middle of a line
    for start in (8, 4):
        loop.pretrain(build({**data, "run": str(run)}), resume=True)
        assert losses(run) == losses(tmp_path / "whole"), start
        assert [row["step"] for row in metrics(run)] == list(range(1, 13))
    for name in ("model", "ema", "optimizer"):
        a, b = (checkpoint.read_tensors(checkpoint.newest(r), name) for r in (run, tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(path, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "multimodal_fm", "pretrain", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, write_config, number, code):
    changes = {"steps": 40, "save_every": 5, "workers": 1}
    whole_path = write_config("whole.yaml", **changes)
    loop.pretrain(load(whole_path, [f"run={tmp_path / 'whole'}"]))
    run = tmp_path / "run"
    process = start(whole_path, f"run={run}")
    wait_for_step(run, 12, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    if code > 0:
        newest = checkpoint.newest(run)
        assert int(newest.name[5:]) == len(metrics(run)), "it saves the step that it left at"
        assert "--resume" in err and "Traceback" not in err
    done = mmfm("pretrain", whole_path, f"run={run}", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(tmp_path / "whole")


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
        {**tiny(corpus), "run": str(tmp_path / "run"), "evaluate": {"all": {"on": f"{tmp_path}/none-*.tar"}}}
    )
    with pytest.raises(UserError, match="evaluate.all: no file matches"):
        loop.pretrain(config)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_overwritten(whole, corpus):
    with pytest.raises(UserError, match="--resume"):
        loop.pretrain(build({**tiny(corpus), "run": str(whole)}))


def test_resume_refuses_another_config_and_other_data(whole, tmp_path, corpus):
    with pytest.raises(UserError, match="other model"):
        loop.pretrain(build({**tiny(corpus), "run": str(whole), "model": {"width": 64}}), resume=True)
    data = tiny(corpus)
    data["sources"]["all"]["shards"] = f"{corpus}/train-0.tar"
    before = (whole / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="other sources"):
        loop.pretrain(build({**data, "run": str(whole)}), resume=True)
    assert (whole / "metrics.jsonl").read_text() == before
    shards.write(tmp_path / "train-0.tar", samples(8))
    data["sources"]["all"]["shards"] = f"{tmp_path}/train-*.tar"
    loop.pretrain(build({**data, "run": str(tmp_path / "run"), "steps": 4}))
    shards.write(tmp_path / "train-0.tar", samples(9))
    config = build({**data, "run": str(tmp_path / "run"), "steps": 6})
    with pytest.raises(UserError, match="is not the file"):
        loop.pretrain(config, resume=True)
    index.build(str(tmp_path / "train-0.tar"))
    with pytest.raises(UserError, match="--allow-data-change"):
        loop.pretrain(config, resume=True)
    assert loop.pretrain(config, resume=True, allow_data_change=True).name == "step-00000006"


def broken_corpus(folder: Path) -> None:
    """24 whole samples and four with one part each that cannot be read."""
    import soundfile

    empty = io.BytesIO()
    soundfile.write(empty, torch.zeros(0).numpy(), 16_000, format="WAV")
    made = samples(28)
    made[3]["jpg"] = made[3]["jpg"][:200]
    made[9]["jpg"] = b"<!DOCTYPE html><html><body>Not found</body></html>"
    del made[15]["flac"]
    made[15]["wav"] = empty.getvalue()
    made[21]["txt"] = "un café carré".encode("latin-1")
    shards.write(folder / "train-0.tar", made)


def test_four_broken_parts_are_named_and_stop_nothing(tmp_path, write_config):
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


def test_a_source_of_nothing_but_bad_items_stops_with_a_line(tmp_path, corpus):
    made = samples(6)
    for sample in made:
        sample["txt"] = b"\xff"
    shards.write(tmp_path / "a.tar", made)
    data = tiny(corpus, sources={"all": {"shards": f"{tmp_path}/a.tar"}}, run=str(tmp_path / "run"))
    data["tasks"] = {"words": data["tasks"]["words"]}
    with pytest.raises(UserError, match="not one sample of step 1"):
        loop.pretrain(build(data))
    assert "text-decode" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path, corpus):
    config = build({**tiny(corpus, steps=2), "run": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer-text.json").write_text("{")
    with pytest.raises(UserError, match="--resume"):
        loop.pretrain(config)
    assert loop.pretrain(config, resume=True).name == "step-00000002"


def test_half_precision_runs_on_a_cpu(tmp_path, corpus):
    loop.pretrain(build({**tiny(corpus, steps=2, precision="bfloat16"), "run": str(tmp_path / "run")}))
    assert all(row["skipped"] == 0 for row in metrics(tmp_path / "run"))


def test_a_bad_item_is_replaced_and_no_position_shifts(tmp_path, corpus):
    """The other samples of every step are the same with a broken one among them."""
    good, bad = samples(12), samples(12)
    bad[5]["txt"] = b"\xff\xfe\xfa"
    streams = []
    for name, made in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        shards.write(tmp_path / name / "a.tar", made)
        data = tiny(corpus, sources={"all": {"shards": f"{tmp_path}/{name}/a.tar"}})
        data["tasks"] = {"words": data["tasks"]["words"]}
        config = build({**data, "run": str(tmp_path / f"run-{name}")})
        Path(config.run).mkdir()
        corpora = {"all": shards.Corpus(config.sources["all"], "all")}
        fitted = fit(config, corpora, Path(config.run))
        steps = Steps(tasks_of(config, corpora), fitted, 0)
        streams.append([[name for _, _, name in sorted(steps[s].keys)] for s in range(12)])
    assert all(len(a) == len(b) == 4 for a, b in zip(*streams))
    for a, b in zip(*streams):
        for left, right in zip(a, b):
            assert left == right or (left == "all/sample0005" != right)
    assert any("all/sample0005" in step for step in streams[0])


def test_microbatches_give_the_same_gradients(corpus, tmp_path):
    """Dealing a step into several microbatches changes its gradients by rounding only."""
    found = []
    for microbatches in (1, 3):
        config = build({**tiny(corpus), "run": str(tmp_path), "microbatches": microbatches})
        corpora = {n: shards.Corpus(s, n) for n, s in config.sources.items()}
        config.tokenizers = fit(config, corpora, tmp_path)
        step = Steps(tasks_of(config, corpora), config.tokenizers, 0, microbatches)[0]
        assert len(step.batches) == microbatches
        torch.manual_seed(0)
        model = Model(config)
        report = forward_backward(model, weights_of(config), step.batches)
        found.append((report, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (one, gradients), (several, others) = found
    for name in ("loss", "loss/words", "loss/next", "loss/looks", "loss/pairs"):
        torch.testing.assert_close(one[name], several[name], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], others[name], rtol=1e-3, atol=1e-5, msg=name)


FOURTH = '''
"""A fourth modality: a time series, a member `series` of text with one number a line."""
from dataclasses import dataclass
import torch
from torch import nn
from multimodal_fm.errors import SampleError
from multimodal_fm.tokenizers import base
from multimodal_fm.tokens import sequence_of

@dataclass
class Config:
    patch: int = 4
    limit: int = 16

class Tokenizer(base.Tokenizer):
    Config, extensions = Config, ("series",)

    def read(self, raw, generator=None):
        raw = raw["series"] if isinstance(raw, dict) else raw
        try:
            values = torch.tensor([float(v) for v in raw.split()])
        except ValueError as error:
            raise SampleError("decode", str(error))
        patch = self.config.patch
        count = min(len(values) // patch, self.config.limit)
        position = torch.zeros(count, 3)
        position[:, 0] = torch.arange(count)
        return [sequence_of(values[: count * patch].view(count, patch), position)]

    def embedder(self, width):
        return nn.Linear(self.config.patch, width)

    def predictor(self, width):
        return Predict(width, self.config.patch)

class Predict(nn.Linear):
    def forward(self, vectors, content):
        return (super().forward(vectors) - content).square().mean(-1)
'''


def test_a_fourth_kind_is_one_file_and_a_config(tmp_path, monkeypatch):
    (tmp_path / "series_modality.py").write_text(FOURTH)
    (tmp_path / "modalities").mkdir()
    (tmp_path / "modalities" / "__init__.py").write_text("")
    (tmp_path / "series_modality.py").rename(tmp_path / "modalities" / "series.py")
    monkeypatch.syspath_prepend(tmp_path)
    made = samples(24)
    for i, sample in enumerate(made):
        wave = torch.sin(torch.arange(40.0) * (0.2 + 0.2 * (i % 4)))
        sample["series"] = "\n".join(f"{v:.3f}" for v in wave)
    shards.write(tmp_path / "loop.tar", made)
    data = tiny(tmp_path, steps=30, optim={"lr": 3e-3, "warmup": 2})
    data["sources"] = {"all": {"shards": f"{tmp_path}/loop.tar", "group": "color"}}
    data["tokenizers"] = {"text": {"vocab_size": 300, "max_tokens": 24}, "series": {"tokenizer": "modalities.series"}}
    decoder = {"width": 32, "depth": 1, "heads": 2}
    data["tasks"] = {
        "shapes": {
            "objective": "masked",
            "hide": "drop",
            "share": 0.5,
            "decoder": decoder,
            "modalities": ["series"],
            "batch_size": 8,
            "sources": {"all": 1},
        },
        "next": {"objective": "causal", "modalities": ["series"], "batch_size": 8, "sources": {"all": 1}},
        "pairs": {"objective": "contrastive", "modalities": ["text", "series"], "batch_size": 8, "sources": {"all": 1}},
    }
    loop.pretrain(build({**data, "run": str(tmp_path / "run")}))
    rows = metrics(tmp_path / "run")
    for name in ("loss/shapes", "loss/next", "loss/pairs"):
        assert sum(r[name] for r in rows[-5:]) < 0.9 * sum(r[name] for r in rows[:5]), name
    model = load_model(tmp_path / "run")
    vectors = model.embed(series=["\n".join(["0.5"] * 40)], text=["a red square"])
    assert vectors["series"].shape == vectors["text"].shape == (1, 32)


def test_smoke_runs_at_toy_size(tmp_path, write_config):
    path = write_config(steps=100_000, model={"width": 768, "depth": 12, "heads": 12})
    config = toy(load(path))
    assert loop.pretrain(config).name == "step-00000010"
    assert not (tmp_path / "run").exists()


def test_nothing_finite_stops_with_a_line(tmp_path, corpus):
    config = build({**tiny(corpus, optim={"lr": 1e30, "clip": 0, "warmup": 1}, steps=40), "run": str(tmp_path / "run")})
    with pytest.raises(UserError, match="without a finite gradient"):
        loop.pretrain(config)


def test_loading_draws_nothing_from_the_global_generator(corpus, tmp_path):
    config = build({**tiny(corpus), "run": str(tmp_path)})
    corpora = {n: shards.Corpus(s, n) for n, s in config.sources.items()}
    config.tokenizers = fit(config, corpora, tmp_path)
    before = torch.get_rng_state()
    for workers, how in ((0, "threads"), (1, "threads"), (1, "processes")):
        loader = Loader(Steps(tasks_of(config, corpora), config.tokenizers, 0), 0, 3, workers, how)
        next(iter(loader))
        loader.close()
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_folder_is_trained_in_by_one_process(tmp_path, corpus):
    """A resume beside a run that is still alive would cut its records back."""
    run = tmp_path / "run"
    loop.pretrain(build({**tiny(corpus, steps=2, save_every=2), "run": str(run)}))
    before = (run / "metrics.jsonl").read_bytes()
    hold = "import sys, time; from pathlib import Path; from multimodal_fm.train import resume\n"
    hold += "with resume.alone(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is training there"):
            loop.pretrain(build({**tiny(corpus, steps=4), "run": str(run)}), resume=True)
    finally:
        other.kill()
        other.wait()
    assert (run / "metrics.jsonl").read_bytes() == before
    assert loop.pretrain(build({**tiny(corpus, steps=4), "run": str(run)}), resume=True).name == "step-00000004"


def test_what_cannot_be_read_on_the_way_ends_with_a_checkpoint(tmp_path, corpus, monkeypatch):
    config = build({**tiny(corpus, steps=9, save_every=100), "run": str(tmp_path / "run")})
    real = Steps.read

    def read(self, step, *more):
        found = real(self, step, *more)
        return dataclasses.replace(found, keys=[] if step == 3 else found.keys)

    monkeypatch.setattr(Steps, "read", read)
    with pytest.raises(UserError, match=r"not one sample of step 4 .*checkpoint: .*step-00000003"):
        loop.pretrain(config)
    monkeypatch.undo()
    assert loop.pretrain(config, resume=True).name == "step-00000009"
