"""Checkpoints: whole or absent, loaded from anywhere, and never a way to run somebody else's code."""

import hashlib
import json
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from conftest import text_only, tiny

from multimodal_fm import load as load_model
from multimodal_fm import objectives
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.tokenizers import text
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


def publish(run, step, size=8):
    tensors = {"model": {"w": torch.full((size,), float(step))}}
    return checkpoint.save(checkpoint.folder_of(run, step), tensors, {"state": {"step": step}}, {})


def test_a_checkpoint_comes_back(tmp_path):
    folder = publish(tmp_path, 7)
    assert folder.name == "step-00000007" and checkpoint.verify(folder) == ""
    assert checkpoint.newest(tmp_path) == folder
    assert checkpoint.read_tensors(folder, "model")["w"].tolist() == [7.0] * 8
    assert checkpoint.read_data(folder, "state") == {"step": 7}


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_seen_and_the_one_before_is_used(tmp_path, name, harm):
    publish(tmp_path, 1)
    file = publish(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if harm == "flip" else data[:-5])
    said = []
    assert checkpoint.newest(tmp_path, said.append).name == "step-00000001"
    assert len(said) == 1 and "step-00000002" in said[0]


def test_nothing_whole_is_an_error(tmp_path):
    for run, said in ((tmp_path / "none", "no such run"), (tmp_path, "no checkpoint")):
        with pytest.raises(UserError, match=said):
            checkpoint.newest(run)
    (publish(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest(tmp_path, lambda _: None)


def test_half_written_folders_are_never_taken_and_swept_away(tmp_path):
    publish(tmp_path, 1)
    torn = tmp_path / "checkpoints" / "step-00000002.tmp-abcd"
    torn.mkdir()
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    for step in (2, 3):
        publish(tmp_path, step)
    checkpoint.retain(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    publish(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            publish(tmp_path, 2, size=100_000)
        except UserError as error:
            os._exit(7 if "cannot be written" in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_kill_during_a_save_never_publishes_half(tmp_path, delay):
    publish(tmp_path, 1)
    child = os.fork()
    if child == 0:
        for step in range(2, 1000):
            publish(tmp_path, step, size=200_000)
        os._exit(0)
    time.sleep(0.05 + delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for folder in checkpoint.steps(tmp_path):
        assert checkpoint.verify(folder) == ""
        assert checkpoint.read_tensors(folder, "model")["w"][0] == int(folder.name[5:])


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    folder = publish(tmp_path, 1)
    listing = json.loads((folder / "MANIFEST.json").read_text())
    listing["../../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / "MANIFEST.json").write_text(json.dumps(listing))
    assert checkpoint.verify(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """A short run of text alone."""
    run = tmp_path_factory.mktemp("checkpoint") / "run"
    loop.pretrain(build(text_only(corpus, run, steps=2)))
    return run


def test_a_moved_run_loads_and_embeds(run, tmp_path):
    before = load_model(run).embed(text=["a red square"])["text"]
    shutil.copytree(run, tmp_path / "elsewhere")
    run.rename(run.with_name("hidden"))
    try:
        model = load_model(tmp_path / "elsewhere")
        torch.testing.assert_close(model.embed(text=["a red square"])["text"], before, rtol=0, atol=0)
        last = load_model(tmp_path / "elsewhere", ema=False).embed(text=["a red square"])["text"]
        assert not torch.equal(last, before)
    finally:
        run.with_name("hidden").rename(run)


PLUGIN = """
from pathlib import Path
from multimodal_fm.{folder} import {base}

Path({marker!r}).touch()


class {cls}({base}.{cls}):
    pass
"""


@pytest.mark.parametrize(
    "file, folder, base, cls",
    [
        ("model", "tokenizers", "text", "Tokenizer"),
        ("model", "heads", "retrieval", "Head"),
        ("config", "objectives", "masked", "Objective"),
    ],
)
def test_a_strangers_checkpoint_runs_no_code(run, tmp_path, monkeypatch, file, folder, base, cls):
    """It names a plug-in whose file lies in its own folder, which is the current one and on the import path."""
    checkpoint_dir = shutil.copytree(checkpoint.newest(run), tmp_path / "checkpoint")
    name, marker = f"stranger_{folder}.plugin", tmp_path / "code-ran"
    module = checkpoint_dir / f"stranger_{folder}" / "plugin.py"
    module.parent.mkdir()
    module.write_text(PLUGIN.format(folder=folder, base=base, cls=cls, marker=str(marker)))
    data = checkpoint.read_data(checkpoint_dir, file)
    own = data["tasks"]["words"] if file == "config" else data
    (settings,) = own[folder].values()
    settings[cls.lower()] = name
    (checkpoint_dir / f"{file}.json").write_text(json.dumps(data))
    manifest = json.loads((checkpoint_dir / "MANIFEST.json").read_text())
    text = (checkpoint_dir / f"{file}.json").read_bytes()
    manifest[f"{file}.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (checkpoint_dir / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(checkpoint_dir)
    monkeypatch.syspath_prepend(checkpoint_dir)

    def load(**options):
        return objectives.load(checkpoint_dir, load_model(checkpoint_dir, **options), **options)

    with pytest.raises(UserError, match="names code from outside this package") as caught:
        load()
    assert "\n" not in str(caught.value) and not marker.exists()
    assert list(load(plugins=True)) == ["words/masked"] and marker.exists()


@pytest.mark.parametrize(
    "text", ["[]", '{"tokenizers": 3}', '{"tokenizers": {"text": 3}}', "{", '{"backbone": {"width": -1}}']
)
def test_a_model_that_cannot_be_read_is_a_line(run, tmp_path, text, monkeypatch):
    checkpoint_dir = shutil.copytree(checkpoint.newest(run), tmp_path / "checkpoint")
    (checkpoint_dir / "model.json").write_text(text)
    monkeypatch.setattr(checkpoint, "verify", lambda _: "")
    with pytest.raises(UserError, match="model.json"):
        load_model(checkpoint_dir)


def test_two_modalities_that_learn_a_tokenizer_each_keep_their_own(tmp_path, corpus):
    """Through a run, a resume and a load from where the run was moved to."""
    data = tiny(corpus, steps=2, save_every=2, run_dir=str(tmp_path / "run"))
    shards.write(tmp_path / "code.tar", [{"__key__": str(i), "txt": f"def f{i}(x): return x[{i}]"} for i in range(9)])
    data["sources"]["code"] = {"shards": f"{tmp_path}/code.tar"}
    data["model"]["tokenizers"] |= {
        "code": {"tokenizer": "text", "vocab_size": 280, "max_tokens": 24, "fields": ["txt"]}
    }
    task = {"objectives": {"causal": {}}, "batch_size": 4}
    data["tasks"] = {
        "words": {**task, "modalities": ["text"], "sources": ["all"]},
        "code": {**task, "modalities": ["code"], "sources": ["code"]},
    }
    loop.pretrain(build(data))
    loop.pretrain(build({**data, "steps": 4}), resume=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    model = load_model(tmp_path / "moved")
    learned = {modality: model.tokenizers[modality].config for modality in ("text", "code")}
    assert text.load_merges(learned["text"].file).n_vocab > text.load_merges(learned["code"].file).n_vocab
    assert len(text.Tokenizer(learned["code"]).encode("return x[")) < len(
        text.Tokenizer(learned["text"]).encode("return x[")
    )
    assert len(text.Tokenizer(learned["text"]).encode("a red square")) < len(
        text.Tokenizer(learned["code"]).encode("a red square")
    )
