"""Runs that are killed, stopped and started again, by one rank and by several: nothing is lost, nobody stays behind."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import losses, records, text_only
from ranks import start_ranks, wait_for
from test_parallel import FSDP, assert_same, is_alive, short, train

from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.train import loop, parallel
from multimodal_fm.train.config import build
from multimodal_fm.train.saver import Saver
from multimodal_fm.train.train_step import TrainStep
from multimodal_fm.train.validate import Validation

ROOT = Path(loop.__file__).parents[2]


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.02)


def rows(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


# --- signals ---


def stop_in(phase: str, number: int):
    """Patches in which a phase of the run sends SIGTERM to its own process, at one of several places of it."""
    patch = pytest.MonkeyPatch()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def before(owner, name: str, turn: int = 1) -> None:
        real, calls = getattr(owner, name), []

        def call(*given, **named):
            calls.append(0)
            if len(calls) == turn:
                stop()
            return real(*given, **named)

        patch.setattr(owner, name, call)

    places = {
        "start": [(loop, "open_sources"), (loop, "prepare_tokenizers"), (TrainStep, "_learner"), (loop, "Loader")],
        "compile": [(TrainStep, "__call__")],
        "step": [
            (TrainStep, "__call__", 1 + number % 6),
            (TrainStep, "_clip", 2 + number % 5),
            (loop.Run, "next_batch", 4),
        ],
        "validation": [(Validation, "__call__", 1 + number % 2)],
        "save": [(checkpoint, "begin"), (checkpoint, "write_part", 1 + number), (checkpoint, "publish", 2)],
    }[phase]
    before(*places[number % len(places)])
    return patch


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
@pytest.mark.parametrize(
    "phase", ["start", pytest.param("compile", marks=pytest.mark.slow), "step", "validation", "save"]
)
def test_sigterm_in_each_phase_leaves_a_whole_checkpoint(tmp_path, corpus, phase, number):
    """70. The exit code says so, and the run that goes on is the uninterrupted one."""
    settings = {"steps": 8, "save_every": 2, "validate_every": 3, "validation_steps": 1, "compile": phase == "compile"}
    data = text_only(corpus, tmp_path / "run", **settings)
    data["sources"]["all"]["validation"] = f"{corpus}/validation-*.tar"
    patch = stop_in(phase, number)
    pids = start_ranks(1, lambda: loop.pretrain(build(data)))
    patch.undo()
    assert wait_for(pids) == [143]
    newest = checkpoint.steps(tmp_path / "run")[-1]
    assert checkpoint.verify(newest) == "" and int(newest.name[5:]) < 8
    loop.pretrain(build({**data, "compile": False}), resume="auto")
    loop.pretrain(build({**data, "run_dir": str(tmp_path / "whole"), "compile": False}))
    ours, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert ours == whole if phase != "compile" else list(ours) == list(whole)


@pytest.mark.parametrize("layout", [{}, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, corpus, layout):
    """71."""
    data = short(corpus, tmp_path / "run", steps=10_000, save_every=10_000, parallel=layout)
    pids = start_ranks(2, lambda: loop.pretrain(build(data)))
    wait_until(lambda: rows(tmp_path / "run") > 2)
    os.kill(pids[1], signal.SIGTERM)
    assert wait_for(pids) == [143, 143]
    newest = checkpoint.newest(tmp_path / "run")
    assert int(newest.name[5:]) == rows(tmp_path / "run")


# --- kills ---


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_kills_at_random_instants_change_nothing(tmp_path, corpus, seed):
    """57. Losses and weights of the run that comes to its end are those of one that nobody killed."""
    draw = random.Random(seed)
    data = text_only(corpus, tmp_path / "run", steps=40, save_every=3, num_workers=1, log_samples=True)
    began = time.monotonic()
    loop.pretrain(build({**data, "run_dir": str(tmp_path / "whole")}))
    length, kills = time.monotonic() - began, 0
    while kills < 10:
        (pid,) = start_ranks(1, lambda: loop.pretrain(build(data), resume="auto"))
        time.sleep(draw.uniform(0, length / 2))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        if rows(tmp_path / "run") == 40 and kills < 10:
            shutil.rmtree(tmp_path / "run")  # it came to its end: once more
    loop.pretrain(build(data), resume="auto")
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert records(tmp_path / "whole", "samples") == records(tmp_path / "run", "samples")


def save_for_ever(run: Path) -> None:
    """Publish one checkpoint after the other, in every file of which stands its step."""
    ranks = parallel.init(torch.device("cpu"))
    saver = Saver(ranks)
    for step in range(1, 100_000):
        value = {"w": torch.full((50_000,), float(step))}
        tensors, data = {"model": value, "ema": value, "optimizer": value}, {"state": {"step": step}}
        saver.start(checkpoint.folder_of(run, step), tensors, data, {}, lambda: checkpoint.retain(run, 2))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 25))])
def test_four_kills_during_saves_leave_the_newest_published_one_whole(tmp_path, size, seed):
    """58, 59. Of two ranks one is killed while it writes; what is published is all of one step."""
    draw, newest = random.Random(seed), 0
    for number in range(4):
        pids = start_ranks(size, lambda: save_for_ever(tmp_path))
        if number % 2:  # while the first one is written, or any one later
            wait_until(lambda: any((tmp_path / "checkpoints").glob("step-*")))
        else:
            wait_until(lambda: checkpoint.steps(tmp_path))
        time.sleep(draw.uniform(0, 0.2))
        os.kill(pids[draw.randrange(size)], signal.SIGKILL)
        time.sleep(draw.uniform(0, 0.05))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(pids)
        for folder in checkpoint.steps(tmp_path):
            assert checkpoint.verify(folder) == ""
            step = int(folder.name[5:])
            assert checkpoint.read_data(folder, "state") == {"step": step}
            for name in ("model", "ema", "optimizer"):
                assert set(checkpoint.read_tensors(folder, name)["w"].tolist()) == {float(step)}
            newest = step
        shutil.rmtree(tmp_path / "checkpoints")
    assert newest, "no checkpoint was ever published"


# --- what a checkpoint may look like ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    run = tmp_path_factory.mktemp("finished") / "run"
    loop.pretrain(build(text_only(corpus, run, steps=4, save_every=2)))
    return run


def test_a_flipped_bit_in_any_file_is_seen(finished, tmp_path):
    """60. The one before it is taken, with a warning."""
    draw = random.Random(0)
    for file in sorted(checkpoint.newest(finished).iterdir()):
        run = shutil.copytree(finished, tmp_path / file.name)
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (checkpoint.newest(run) / file.name).write_bytes(data)
        said = []
        found = checkpoint.newest(run, said.append).name
        assert (found == "step-00000002" and file.name in said[0]) or file.name in ("MANIFEST.json", "SIGNATURE"), file


@pytest.mark.parametrize("layout", [{}, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["whole", "fsdp"])
def test_tensors_of_another_type_or_shape_are_refused(finished, tmp_path, corpus, layout):
    """68. None is turned into what is wanted in silence."""
    from safetensors.torch import save_file

    for change, said in (
        (lambda tensors, name: tensors[name].half(), "is of type torch.float16"),
        (lambda tensors, name: tensors[name][:-1], "weights do not fit"),
    ):
        run = shutil.copytree(finished, tmp_path / said.split()[0])
        folder = checkpoint.newest(run)
        tensors = checkpoint.read_tensors(folder, "model")
        name = "backbone.blocks.0.attention.project_in.weight"
        save_file({**tensors, name: change(tensors, name).contiguous()}, folder / "model.safetensors")
        (folder / "MANIFEST.json").unlink()
        checkpoint.write_manifest(folder)

        def resume(run=run, said=said):
            with pytest.raises(UserError, match=said):
                loop.pretrain(build(text_only(corpus, run, steps=6, microbatches=2, parallel=layout)), resume=True)

        assert wait_for(start_ranks(2 if layout else 1, resume)) == [0] * (2 if layout else 1)
        shutil.rmtree(run)


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(finished, tmp_path):
    """64."""
    run = shutil.copytree(finished, tmp_path / "run")
    (checkpoint.folder_of(run, 4) / "model.safetensors").write_bytes(b"")
    checkpoint.retain(run, 1)
    assert checkpoint.newest(run, lambda _: None).name == "step-00000002"


def test_clocks_that_jump_change_nothing(finished, tmp_path, corpus, monkeypatch):
    """80. What is newest is told by its step, what takes long by a clock that does not jump."""
    draw = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    run = shutil.copytree(finished, tmp_path / "run")
    for age, folder in enumerate(checkpoint.steps(run)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    loop.pretrain(build(text_only(corpus, run, steps=6, save_every=2)), resume=True)
    loop.pretrain(build(text_only(corpus, tmp_path / "whole", steps=6, save_every=2)))
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    ours, whole = ([row["tokens"] for row in losses(one).values()] for one in (run, tmp_path / "whole"))
    assert ours == whole


def test_a_run_that_was_moved_goes_on_and_relative_paths_do(tmp_path, corpus, monkeypatch):
    """81."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus)
    sources = {"all": {"shards": "data/train-*.tar"}}
    loop.pretrain(build(text_only(corpus, "runs/mine", steps=2, sources=sources)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "moved")
    loop.pretrain(build(text_only(corpus, "elsewhere/moved/mine", steps=4, sources=sources)), resume=True)
    loop.pretrain(build(text_only(corpus, tmp_path / "whole", steps=4, sources=sources)))
    moved, whole = losses(tmp_path / "elsewhere" / "moved" / "mine"), losses(tmp_path / "whole")
    assert list(moved) == [1, 2, 3, 4] and moved[1] == pytest.approx(whole[1]) and moved[2]["loss"] > 0


# --- torchrun ---


def torchrun(*options: str, **named) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **named)


def descendants(pid: int) -> dict[int, str]:
    """Process ids below one, and their command lines."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, IndexError):
            continue
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {one: found[one] for one in below - {pid}}


def ranks_of(process: subprocess.Popen) -> list[int]:
    below = descendants(process.pid)
    return sorted(one for one, command in below.items() if re.search(r"-m multimodal_fm pretrain", command)
                  and one in children(process.pid))  # fmt: skip


def children(pid: int) -> set[int]:
    return {int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, FSDP], ids=["ddp", "fsdp"])
def test_torchrun_starts_a_killed_rank_again_and_the_history_is_the_same(tmp_path, corpus, layout):
    """73. Twice, by kill -9."""
    settings = {"steps": 40, "save_every": 5, "strict_numerics": True, "num_workers": 1, "parallel": layout}
    data = short(corpus, tmp_path / "run", **settings)
    train(1, {**data, "run_dir": str(tmp_path / "whole")})
    (tmp_path / "run.json").write_text(json.dumps(data))
    words = ["-m", "multimodal_fm", "pretrain", str(tmp_path / "run.json"), "--resume", "auto"]
    process = torchrun("--max-restarts=2", *words)  # no more than there are kills: no start fails
    for number, step in enumerate((8, 22)):
        wait_until(lambda step=step: rows(tmp_path / "run") >= step or process.poll() is not None, 240)
        assert process.poll() is None, process.communicate()[0][-4000:]
        before = ranks_of(process)
        os.kill(before[number], signal.SIGKILL)
        wait_until(lambda before=before: not any(map(is_alive, before)))
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_nobody_stays_when_the_launcher_is_killed(tmp_path, corpus):
    """74. Ranks, readers and the meter of energy are gone after 10 seconds, and the run can be gone on with."""
    data = short(corpus, tmp_path / "run", steps=2000, save_every=5, num_workers=1)
    (tmp_path / "run.json").write_text(json.dumps(data))
    process = torchrun("-m", "multimodal_fm", "pretrain", str(tmp_path / "run.json"))
    wait_until(lambda: rows(tmp_path / "run") > 6 or process.poll() is not None)
    below = descendants(process.pid)
    assert len(below) >= 4
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, below)), 10)
    step = int(checkpoint.newest(tmp_path / "run").name[5:])
    loop.pretrain(build({**data, "steps": step + 2}), resume=True)
    assert list(losses(tmp_path / "run")) == list(range(1, step + 3))


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_collective_ends_the_run_with_its_stacks(tmp_path, corpus):
    """79, with several ranks: one sleeps, the others wait for it; the stacks of all are printed within the time set."""
    (tmp_path / "sleepy.py").write_text(
        "import os, time\nfrom multimodal_fm.train import loop\nreal = loop.Run.update\n"
        "def update(run, batches):\n    if run.step == 3 and os.environ['RANK'] == '1':\n        time.sleep(600)\n"
        "    return real(run, batches)\nloop.Run.update = update\n"
        "from multimodal_fm.train.config import load\nimport sys\nloop.pretrain(load(sys.argv[1]))\n"
    )
    data = short(corpus, tmp_path / "run", steps=20, hang_timeout=15)
    (tmp_path / "run.json").write_text(json.dumps(data))
    process = torchrun(str(tmp_path / "sleepy.py"), str(tmp_path / "run.json"))
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "in update" in out and "Timeout (0:00:15)!" in out and re.search(r"File .*distributed", out), out[-3000:]
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002"
