"""Several ranks: the same losses however the model lies on them, the same history whoever made it, and nobody hangs."""

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import losses, records, tiny
from ranks import run_ranks, start_ranks, wait_for
from test_codes import FSQ, VQ, codec_config
from test_latent import latent_config

from multimodal_fm import load as load_model
from multimodal_fm import objectives
from multimodal_fm.backbone import Backbone
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.stream.dataset import StepDataset
from multimodal_fm.train import loop, parallel, watch
from multimodal_fm.train.config import build
from multimodal_fm.train.layouts import local
from multimodal_fm.train.muon import orthogonalize_all
from multimodal_fm.train.owners import RowsOfMatrices, WholeMatrices, assign
from multimodal_fm.train.train_step import TrainStep

FSDP = {"kind": "fsdp"}
OPTIM = {"name": "muon", "lr": 3e-3, "warmup_steps": 3, "decay_fraction": 0.0}  # a rate that steps do not change


def short(corpus, run: Path, **changes) -> dict:
    """Two tasks, one of which compares the whole step, for a second or two."""
    common = {"run_dir": str(run), "steps": 4, "save_every": 2, "optim": OPTIM, "microbatches": 4}
    data = tiny(corpus, **common | changes)
    if "tasks" not in changes:
        data["tasks"] = {name: data["tasks"][name] for name in ("words", "pairs")}
    return data


def train(size: int, data: dict, resume="auto") -> None:
    run_ranks(size, lambda: loop.pretrain(build(data), resume=resume))


def assert_same(run: Path, other: Path, tolerance: float = 0.0, by_step: dict[int, float] | None = None) -> None:
    """The histories of losses agree, to `by_step` where that is more, and the checkpoints' tensors do."""
    one, two = losses(run), losses(other)
    assert list(one) == list(two)
    for step, row in one.items():
        near = max(tolerance, (by_step or {}).get(step, 0.0))
        assert two[step] == pytest.approx(row, rel=near, abs=near) if near else two[step] == row, step
    for name in ("model", "objectives", "ema", "ema_objectives", "optimizer"):
        a, b = (checkpoint.read_tensors(checkpoint.newest(r), name) for r in (run, other))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=100 * tolerance, atol=100 * tolerance, msg=f"{name} {key}")


class Rounded(TrainStep):
    """Begins with each weight one rounding away from what it should be, up or down by `seed`."""

    seed = 0

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in self.trained.parameters():
                up = torch.rand(weight.shape, generator=generator) < 0.5
                weight.copy_(torch.nextafter(weight, torch.where(up, math.inf, -math.inf)))


def largest_differences(run: Path, other: Path) -> dict[int, float]:
    """That of any figure of each step, relative or absolute, whichever is less."""
    one, two = losses(run), losses(other)
    return {
        step: max(abs(two[step][key] - value) / max(1.0, abs(value)) for key, value in row.items())
        for step, row in one.items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    """A run of one rank."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(1, short(corpus, run))
    return run


@pytest.mark.parametrize("layout", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(tmp_path, corpus, alone, layout):
    train(2, short(corpus, tmp_path / "run", parallel=layout))
    assert_same(alone, tmp_path / "run", 1e-6)
    load_model(tmp_path / "run").embed(text=["a red square"])


def test_blocks_travel_as_bfloat16_and_are_kept_as_float32(tmp_path, corpus, monkeypatch):
    """With `precision: bfloat16`; the losses are those of one rank but for the rounding of gains."""
    real, seen = Backbone.forward, tmp_path / "seen"

    def note(norm, given) -> None:
        seen.write_text(str(norm.weight.dtype))

    def forward(self, *arguments, **more):
        self.blocks[0].norm_1.register_forward_pre_hook(note)
        return real(self, *arguments, **more)

    common = {"precision": "bfloat16", "steps": 3, "save_every": 3}
    train(1, short(corpus, tmp_path / "one", **common))
    monkeypatch.setattr(Backbone, "forward", forward)
    train(2, short(corpus, tmp_path / "two", **common, parallel=FSDP))
    assert seen.read_text() == "torch.bfloat16"
    for step, row in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(row, rel=2e-2), step
    tensors = checkpoint.read_tensors(checkpoint.newest(tmp_path / "two"), "model")
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "blocks" in name)


@pytest.mark.parametrize("changes", [{"strict_numerics": True}, {"model.backbone": {
    "width": 16, "depth": 2, "num_heads": 2, "block": "classic", "max_positions": 64, "grid": [64, 64]}}],
    ids=["strict", "classic"])  # fmt: skip
def test_shards_in_bfloat16_have_the_gradients_of_one_rank(tmp_path, corpus, changes):
    settings = short(corpus, tmp_path, steps=2, save_every=2, precision="bfloat16")
    for key, value in changes.items():
        (settings["model"] if "." in key else settings)[key.rpartition(".")[2]] = value
    for size, layout in ((1, {}), (2, FSDP)):
        train(size, {**settings, "run_dir": str(tmp_path / str(size)), "parallel": layout})
    one, two = records(tmp_path / "1"), records(tmp_path / "2")
    for row, other in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(row[key], rel=0 if "strict_numerics" in changes else 2e-2), key


def test_strict_numerics_give_the_same_bits_however_many_ranks(tmp_path, corpus):
    train(1, short(corpus, tmp_path / "one", strict_numerics=True))
    train(2, short(corpus, tmp_path / "run", strict_numerics=True, parallel=FSDP))
    assert_same(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("strict", [False, True])
def test_every_layout_gives_the_losses_of_one_rank(tmp_path, corpus, monkeypatch, optimizer, strict):
    """The whole tiny configuration, by DDP, FSDP2 and HSDP of two and four ranks.

    Muon makes the rounding of a gradient of low rank larger from step to step, and how much depends on the processor.
    So in a step a layout may differ by twice what one rank differs by, in the worst of four runs, when each of its
    first weights is one rounding away. Weights and averages are held to the same tolerance as by AdamW.
    """
    optim = OPTIM | {"name": optimizer}
    common = {"steps": 6, "save_every": 3, "optim": optim, "microbatches": 4, "strict_numerics": strict}

    def settings(name, **changes):
        return tiny(corpus, run_dir=str(tmp_path / name), **common, **changes)

    train(1, settings("one"))
    by_step: dict[int, float] = {}
    for seed in range(4) if optimizer == "muon" and not strict else ():
        with monkeypatch.context() as patch:
            patch.setattr(Rounded, "seed", seed)
            patch.setattr(loop, "TrainStep", Rounded)
            train(1, settings(f"rounded-{seed}"))
        for step, found in largest_differences(tmp_path / "one", tmp_path / f"rounded-{seed}").items():
            by_step[step] = max(by_step.get(step, 0.0), 2 * found)
    assert all(near < 2e-5 for near in by_step.values()), by_step
    for size, layout in ((2, {}), (4, {}), (2, FSDP), (4, FSDP), (4, {"kind": "hsdp", "shard_size": 2})):
        name = f"{layout.get('kind', 'ddp')}-{size}"
        train(size, settings(name, parallel=layout))
        assert_same(tmp_path / "one", tmp_path / name, 0.0 if strict else 2e-6, by_step)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_one_history_of_one_two_one_and_four_ranks(tmp_path, corpus, strict):
    """And of DDP and FSDP2 in turns; what has changed is written down."""
    common = {"steps": 8, "save_every": 2, "strict_numerics": strict, "log_samples": True}
    train(1, short(corpus, tmp_path / "one", **common))
    layouts = [(1, {}), (2, FSDP), (1, {}), (4, FSDP), (2, {})]
    for number, (size, layout) in enumerate(layouts[:4], 1):
        train(size, short(corpus, tmp_path / "run", **common | {"steps": 2 * number}, parallel=layout))
    assert_same(tmp_path / "one", tmp_path / "run", 0.0 if strict else 2e-6)
    assert records(tmp_path / "one", "samples") == records(tmp_path / "run", "samples")
    changed = {(row["step"], row["key"], row["before"], row["after"]) for row in records(tmp_path / "run", "changes")}
    assert {(2, "ranks", 1, 2), (4, "ranks", 2, 1), (6, "ranks", 1, 4)} < changed
    assert {(2, "parallel.kind", "ddp", "fsdp"), (4, "parallel.kind", "fsdp", "ddp")} < changed


@pytest.mark.parametrize("layout", [FSDP, pytest.param({}, marks=pytest.mark.slow)], ids=["fsdp", "ddp"])
def test_ranks_that_do_not_divide_the_microbatches(tmp_path, corpus, layout):
    """Three microbatches for two ranks, frozen blocks, a modality that half of the microbatches lack."""
    common = {"microbatches": 3, "steps": 3, "trainable": ["embedders.*", "heads.*", "backbone.blocks.1.*"]}
    train(1, short(corpus, tmp_path / "one", **common))
    train(2, short(corpus, tmp_path / "two", **common, parallel=layout))
    assert_same(tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.parametrize("layout", [FSDP, pytest.param({}, marks=pytest.mark.slow)], ids=["fsdp", "ddp"])
def test_a_rank_without_samples_keeps_the_others_waiting_for_nothing(tmp_path, corpus, monkeypatch, layout):
    """38. All samples of the second rank's microbatches of step 3 are lost."""
    real = StepDataset.read

    def read(self, step, *more):
        data = real(self, step, *more)
        return dataclasses.replace(data, batches=[]) if step == 2 and self.own.start else data

    monkeypatch.setattr(StepDataset, "read", read)
    train(2, short(corpus, tmp_path / "run", parallel=layout))
    assert [row["skipped"] for row in records(tmp_path / "run")] == [0] * 4


@pytest.mark.parametrize("layout", [{}, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_by_all(tmp_path, corpus, monkeypatch, layout, value):
    """75, 76. Weights and moments are those of before the step, on both ranks."""
    real, kept = TrainStep.__call__, {}

    def call(self, step, batches, measure=False):
        before = self.weights
        if step == 2:
            kept.update({name: tensor.clone() for name, tensor in self.trained.state_dict().items()})
            self.weights = dict.fromkeys(before, value) if self.ranks.rank == 1 else before
        report = real(self, step, batches, measure)
        self.weights = before
        if step == 2:
            for name, tensor in self.trained.state_dict().items():
                assert torch.equal(local(tensor), local(kept[name])), name
        assert float(report["skipped"]) == (step == 2)
        return report

    monkeypatch.setattr(TrainStep, "__call__", call)
    train(2, short(corpus, tmp_path / "run", parallel=layout))
    assert [row["skipped"] for row in records(tmp_path / "run")] == [0, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["latent", "fsq", "vq", "layer_decay", "compile"])
def test_shards_of_all_that_a_learner_may_be(tmp_path, corpus, monkeypatch, which):
    """A teacher, views, shares of the gradient; codebooks, which learn by counting; rates by layer; compiled parts."""
    if which == "latent":
        monitors = {name: {"figure": f"{name}/*", "above": 2.0} for name in ("grad_share", "modality_grad_share")}
        data = latent_config(corpus, tmp_path, validate_every=2, validation_steps=1, monitors=monitors)
    elif which in ("fsq", "vq"):
        data = codec_config(corpus, tmp_path, head=FSQ if which == "fsq" else VQ, steps=4, save_every=2)
    else:
        optim = {"name": "adamw", "lr": 3e-3, "warmup_steps": 3, "layer_decay": 0.7}
        data = short(corpus, tmp_path, optim=optim, compile=which == "compile")
    real = Backbone.compile
    monkeypatch.setattr(Backbone, "compile", lambda self, **options: real(self, **options, backend="eager"))
    for size, name in ((1, "one"), (2, "two")):
        train(size, {**data, "run_dir": str(tmp_path / name), "parallel": FSDP, "microbatches": 3})
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two)
    for row, other in zip(one, two, strict=True):
        for key in row:
            if key.partition("/")[0] in ("loss", "validation", "grad_share", "modality_grad_share", "grad_norm"):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (row["step"], key)


# --- optimizers ---


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((7, 5), (3, 9), (7, 5), (1, 4), (12, 12))]


def test_the_work_is_shared_out_evenly():
    shapes = [m.shape for m in matrices()]
    owners = assign(shapes, 2)
    assert owners == assign(shapes, 2) and set(owners) == {0, 1}
    assert owners[4] != owners[0]  # the largest has a rank for itself as long as the others are less


def test_matrices_are_orthogonalized_by_their_owners():
    """Whole ones, and such whose rows lie on three ranks, some of which have none."""

    def work():
        ranks = parallel.init(torch.device("cpu"))
        expected = orthogonalize_all(matrices())
        for own, wanted in zip(WholeMatrices()(matrices()), expected, strict=True):
            torch.testing.assert_close(own, wanted)
        chunks = [dict(enumerate(m.chunk(ranks.size))) for m in matrices()]
        rows = [own.get(ranks.rank) for own in chunks]
        exchange = RowsOfMatrices(
            [m.shape for m in matrices()], [r is not None for r in rows], dist.group.WORLD, torch.device("cpu")
        )
        found = exchange([r for r in rows if r is not None])
        wanted = [m.chunk(ranks.size)[ranks.rank] for m, r in zip(expected, rows, strict=True) if r is not None]
        for own, one in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, one)
        parallel.shutdown()

    run_ranks(3, work)


# --- checkpoints ---


def test_large_checkpoints_lie_in_several_files(tmp_path, corpus, monkeypatch):
    """Each rank writes and hashes some of them; whoever reads them needs no more than their names."""
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 100_000)
    for size, name in ((2, "two"), (1, "one")):
        train(size, short(corpus, tmp_path / name, parallel=FSDP, steps=2))
    folder = checkpoint.newest(tmp_path / "two")
    files = sorted(path.name for path in folder.glob("ema-*.safetensors"))
    assert len(files) > 2 and files[0] == f"ema-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "ema.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert checkpoint.verify(folder) == ""
    assert_same(tmp_path / "one", tmp_path / "two", 1e-6)
    model = load_model(tmp_path / "two")
    assert len(objectives.load(tmp_path / "two", model)) == 2
    train(2, short(corpus, tmp_path / "two", parallel=FSDP))
    (checkpoint.newest(tmp_path / "two") / files[1]).write_bytes(b"x" * 100)
    assert checkpoint.newest(tmp_path / "two", lambda _: None).name == "step-00000002"


def test_a_checkpoint_has_the_values_of_the_step_that_was_asked_for(tmp_path, corpus, monkeypatch):
    """65. The training goes on while it is written, and is ahead by the time it is."""
    real, update, done, written = checkpoint.write_part, TrainStep.__call__, [], []

    def slow(work, *arguments):
        time.sleep(0.2)
        written.append((work.name.partition(".")[0], len(done)))
        return real(work, *arguments)

    def count(*arguments):
        done.append(update(*arguments))
        return done[-1]

    train(1, short(corpus, tmp_path / "plain", keep=3))
    monkeypatch.setattr(checkpoint, "write_part", slow)
    monkeypatch.setattr(TrainStep, "__call__", count)
    train(1, short(corpus, tmp_path / "run", keep=3))
    for one, other in zip(checkpoint.steps(tmp_path / "plain"), checkpoint.steps(tmp_path / "run"), strict=True):
        for name in ("model", "ema", "optimizer"):
            a, b = (checkpoint.read_tensors(folder, name) for folder in (one, other))
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(steps > 2 for name, steps in written if name == "step-00000002"), "the steps go on meanwhile"


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_line(tmp_path, corpus, monkeypatch, size):
    """63, with several ranks one of which has no room. The checkpoint before it stays, nothing half written does."""
    real = checkpoint.write_part

    def write(work, part, tensors):
        if work.name.startswith("step-00000004") and part.name == "objectives":  # the second of the files
            raise OSError(28, "No space left on device")
        return real(work, part, tensors)

    monkeypatch.setattr(checkpoint, "write_part", write)

    def work():
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            loop.pretrain(build(short(corpus, tmp_path / "run", steps=9)))

    run_ranks(size, work)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_milestones_are_kept(tmp_path):
    for step in range(1, 10):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), {"model": {"w": torch.zeros(1)}}, {}, {})
        checkpoint.retain(tmp_path, 2, best=3, keep_every=4)
    assert [int(folder.name[5:]) for folder in checkpoint.steps(tmp_path)] == [3, 4, 8, 9]


# --- settings ---


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"parallel": {"kind": "hsdp"}}, "shard_size is a number from 1 up"),
        ({"parallel": {"shard_size": 2}}, "shard_size is a number from 1 up"),
        ({"keep_every": 3}, "keep_every is a multiple of save_every"),
        ({"hang_timeout": -1}, "hang_timeout is from 0"),
    ],
)
def test_settings_that_cannot_be(corpus, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        build(short(corpus, tmp_path, **changes))


def test_shards_that_do_not_divide_the_ranks():
    with pytest.raises(UserError, match="shard_size=4 does not divide the 6 ranks"):
        parallel.Config("hsdp", 4).check(6)


def test_deterministic_algorithms_are_on_for_the_run_alone(tmp_path, corpus, alone):
    train(1, short(corpus, tmp_path / "run", deterministic=True))
    assert losses(tmp_path / "run") == losses(alone)
    assert not torch.are_deterministic_algorithms_enabled()


# --- nobody hangs, nobody stays ---


def test_a_step_that_hangs_prints_its_stacks_and_ends(tmp_path):
    """79."""

    def work():
        with open(tmp_path / "stderr", "w") as file:
            watch.sys.stderr = file
            watchdog = watch.Watchdog(1)
            with watchdog.paused():
                time.sleep(1.5)
            hang_in_a_collective()

    def hang_in_a_collective():
        time.sleep(60)

    began = time.monotonic()
    assert wait_for(start_ranks(1, work)) == [1]
    assert 2 < time.monotonic() - began < 20
    assert "hang_in_a_collective" in (tmp_path / "stderr").read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_leaves_when_its_launcher_dies(tmp_path, monkeypatch):
    """74."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def rank():
        watch.leave_with_launcher()
        (tmp_path / "rank").write_text(str(os.getpid()))
        time.sleep(60)

    def launcher():
        start_ranks(1, rank)
        time.sleep(60)

    (pid,) = start_ranks(1, launcher)
    deadline = time.monotonic() + 30
    while not (tmp_path / "rank").exists() or not (tmp_path / "rank").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank_pid = int((tmp_path / "rank").read_text())
    time.sleep(1.5)
    assert is_alive(rank_pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    while is_alive(rank_pid):
        assert time.monotonic() < deadline, "an orphan goes on"
        time.sleep(0.1)
