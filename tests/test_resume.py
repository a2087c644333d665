"""Going on with a run: what may change, what is refused, and whose files are left alone."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import losses, records, samples, text_only, tiny

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


@pytest.fixture(scope="module")
def short(tmp_path_factory, corpus):
    """A run of text alone, four steps, with checkpoints of the steps 2 and 4."""
    run = tmp_path_factory.mktemp("short") / "run"
    loop.pretrain(build(text_only(corpus, run, steps=4, save_every=2)))
    return run


@pytest.fixture
def run(short, tmp_path):
    """A copy of the short run, to be changed."""
    return shutil.copytree(short, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder, by path."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def reverse(data):
    """The same maps with their keys the other way round; lists as they are."""
    return {key: reverse(data[key]) for key in reversed(data)} if isinstance(data, dict) else data


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_order_of_the_keys_of_a_config_means_nothing(tmp_path, corpus, optimizer):
    """State is stored and found by name: tokenizers, tasks, sources and heads may stand in any order."""
    data = tiny(
        corpus, steps=6, save_every=3, log_samples=True, optim={"name": optimizer, "lr": 3e-3, "warmup_steps": 3}
    )
    shards.write(tmp_path / "more.tar", samples(12, 200))
    data["sources"]["more"] = {"shards": f"{tmp_path}/more.tar", "group": "color"}
    for name in ("words", "pairs"):
        data["tasks"][name]["sources"] = {"all": 2, "more": 1}
    data["model"]["backbone"]["experts"] = True
    data["model"]["heads"]["second"] = {"head": "retrieval", "embed_dim": 16}
    for name, changed in (("same", copy.deepcopy(data)), ("reversed", reverse(data))):
        changed["tasks"]["looks"]["objectives"]["masked"]["mask_ratio"] = {"image": 0.5, "audio": 0.5}
        data["run_dir"] = changed["run_dir"] = str(tmp_path / name)
        loop.pretrain(build(data))
        shutil.rmtree(checkpoint.newest(tmp_path / name))
        loop.pretrain(build(changed), resume=True)
    same, other = (records(tmp_path / name, "samples") for name in ("same", "reversed"))
    assert [sorted(row["samples"]) for row in same] == [sorted(row["samples"]) for row in other]
    for step, row in losses(tmp_path / "same").items():
        other = losses(tmp_path / "reversed")[step]
        assert {k: other[k] for k in row if not k.endswith("accuracy")} == pytest.approx(
            {k: row[k] for k in row if not k.endswith("accuracy")}, rel=1e-3
        ), step  # the accuracy of a pair has the order of the modalities in its name
    assert not (tmp_path / "reversed" / "changes.jsonl").exists()


def test_what_may_change_is_recorded_and_goes_on(run, corpus):
    data = text_only(
        corpus, run, steps=7, num_workers=1, precision="bfloat16", microbatches=2,
        optim={"lr": 1e-3, "warmup_steps": 3, "schedule": "cosine"},
    )  # fmt: skip
    data["tasks"]["words"]["weight"] = 0.5
    data["tasks"]["words"]["objectives"]["masked"]["weight"] = 0.5
    before = losses(run)
    assert loop.pretrain(build(data), resume=True).name == "step-00000007"
    after = losses(run)
    assert {step: after[step] for step in before} == before and list(after) == list(range(1, 8))
    assert after[5]["loss"] == pytest.approx(0.25 * after[5]["loss/words/masked"]) and after[5]["lr"] < 2e-3
    changes = {row["key"]: (row["before"], row["after"]) for row in records(run, "changes") if row["step"] == 4}
    assert changes == {
        "steps": (4, 7),
        "save_every": (2, 4),
        "num_workers": (0, 1),
        "precision": ("float32", "bfloat16"),
        "microbatches": (1, 2),
        "optim.lr": (3e-3, 1e-3),
        "optim.schedule": ("wsd", "cosine"),
        "tasks.words.weight": (1.0, 0.5),
        "tasks.words.objectives.masked.weight": (1.0, 0.5),
    }


def test_every_change_is_recorded_whatever_its_key_is_called_and_a_source_may_go(tmp_path, corpus):
    """Only where a run lies, and its tokenizer's file, go without saying."""
    data = text_only(corpus, tmp_path / "run", steps=2, save_every=2)
    data["tasks"] = {"profiles": data["tasks"]["words"] | {"sources": {"all": 1, "more": 1}}}
    data["sources"]["more"] = data["sources"]["all"]
    loop.pretrain(build(data))
    data["sources"].pop("more")
    data["tasks"]["profiles"] |= {"sources": {"all": 1}, "weight": 0.5}
    data["steps"] = 4
    assert loop.pretrain(build(data), resume=True).name == "step-00000004"
    changed = {row["key"] for row in records(tmp_path / "run", "changes")}
    assert changed == {"steps", "tasks.profiles.weight", "tasks.profiles.sources.more"}


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("model.backbone.width", 64, "model.backbone.width was 48, is 64"),
        ("model.tokenizers.text.max_tokens", 12, "model.tokenizers.text.max_tokens was 24, is 12"),
        ("optim.name", "muon", "optim.name was adamw, is muon"),
        ("seed", 1, "seed was 0, is 1"),
        ("tasks.words.batch_size", 5, "tasks.words.batch_size was 4, is 5"),
        ("tasks.words.objectives", {"causal": {}}, "tasks.words.objectives (order) was ['masked'], is ['causal']"),
        ("sources.all.group", "language", "sources.all.group was color, is language"),
    ],
)
def test_what_must_not_change_is_refused_with_both_values(run, corpus, path, value, said):
    data, before = text_only(corpus, run, steps=4, save_every=2), contents(run)
    *keys, last = path.split(".")
    place = data
    for key in keys:
        place = place.setdefault(key, {})
    place[last] = value
    with pytest.raises(UserError) as caught:
        loop.pretrain(build(data), resume=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert contents(run) == before


def test_a_run_is_not_overwritten(run, corpus):
    before = contents(run)
    with pytest.raises(UserError, match="--resume"):
        loop.pretrain(build(text_only(corpus, run)))
    assert contents(run) == before


def test_a_run_folder_is_trained_in_by_one_process(run, corpus):
    """A resume beside a run that is still alive is refused, and deletes and cuts nothing."""
    newest = checkpoint.steps(run)[-1]
    (newest / "MANIFEST.json").unlink()  # as while it is being replaced: a resume would discard this checkpoint
    (newest.parent / "step-00000005.tmp-abcd").mkdir()
    (newest.parent / "step-00000005.tmp-abcd" / "model.json").touch()
    before = contents(run)
    hold = "import sys, time; from pathlib import Path; from multimodal_fm.train import resume\n"
    hold += "with resume.locked(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE)
    config = build(text_only(corpus, run, steps=4, save_every=2))
    try:
        other.stdout.readline()
        for resume in (True, "auto", False):
            with pytest.raises(UserError, match="another process is training there"):
                loop.pretrain(config, resume=resume)
    finally:
        other.kill()
        other.wait()
    assert contents(run) == before
    assert loop.pretrain(config, resume=True).name == "step-00000004"


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "metrics.tmp", "quarantine.jsonl", "changes.jsonl", "best.json", "tensorboard",
             "checkpoints", "checkpoints/step-00000004", "tokenizer-text.json"]
)  # fmt: skip
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_a_run_folder_is_refused_and_not_followed(run, tmp_path, corpus, name, dangling):
    outside = tmp_path / "outside"
    if (run / name).exists() and not dangling:
        (run / name).rename(outside)
    else:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        if not dangling:
            outside.write_text("not the run's")
    (run / name).symlink_to(outside)
    before = contents(tmp_path)
    for resume in (True, "auto", False):
        with pytest.raises(UserError, match="is a link"):
            loop.pretrain(build(text_only(corpus, run, steps=6)), resume=resume)
    assert contents(tmp_path) == before and (run / name).is_symlink() and outside.exists() is not dangling


def test_resume_auto_begins_and_goes_on(tmp_path, corpus, short):
    data = text_only(corpus, tmp_path / "run", steps=2, save_every=2)
    with pytest.raises(UserError, match="no run to go on with.*--resume auto"):
        loop.pretrain(build(data), resume=True)
    assert loop.pretrain(build(data), resume="auto").name == "step-00000002"
    assert loop.pretrain(build({**data, "steps": 4}), resume="auto").name == "step-00000004"
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_start_that_failed_before_its_first_checkpoint_blocks_nothing(tmp_path, corpus, short, resume):
    """What it left is cleared away, and the run is the same as in a new folder."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002.tmp-abcd").mkdir(parents=True)
    (run / "tokenizer-text.json").write_text("{")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    (run / "quarantine.jsonl").write_text('{"source": "all", "shard": "old.tar", "step": null}\n')
    (run / "changes.jsonl").write_text('{"step": 0, "key": "steps", "before": 1, "after": 2}\n')
    (run / ".lock").touch()
    loop.pretrain(build(text_only(corpus, run, steps=4, save_every=2)), resume=resume)
    assert losses(run) == losses(short)
    assert not any((run / f"{name}.jsonl").exists() for name in ("quarantine", "changes"))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "name", ["thesis.txt", "tokenizer.json", "checkpoints/epoch-1.ckpt", "profile-pictures/me.jpg", "step-1/x"]
)
@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_folder_with_files_of_others_is_refused(tmp_path, corpus, name, resume):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("mine")
    with pytest.raises(UserError, match="is not of a run"):
        loop.pretrain(build(text_only(corpus, run)), resume=resume)
    assert (run / name).read_text() == "mine"
