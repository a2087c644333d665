"""What the command line says to somebody who wrote a key, an option or an argument wrongly."""

import json
import os
import subprocess
import sys
import time

import pytest

from multimodal_fm import cli
from multimodal_fm.errors import UserError
from multimodal_fm.train.config import load


@pytest.mark.parametrize(
    "key, meant",
    [
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("lrr", "optim.lr"),
        ("model.learning_rate", "optim.lr"),
        ("epochs", "steps"),
        ("workers", "num_workers"),
        ("output_dir", "run_dir"),
        ("run", "run_dir"),
        ("model.hidden_size", "model.backbone.width"),
        ("width", "model.backbone.width"),
        ("n_layers", "model.backbone.depth"),
        ("model.heads.retrieval.projection_dim", "model.heads.retrieval.embed_dim"),
        ("num-attention-heads", "model.backbone.num_heads"),
        ("patch_size", "model.tokenizers.image.patch"),
        ("tasks.words.batch", "tasks.words.batch_size"),
        ("batch_size", "tasks.words.batch_size or tasks.next.batch_size or tasks.looks.batch_size"),
        ("tasks.looks.objectives.masked.n_layers", "tasks.looks.objectives.masked.decoder.depth"),
        ("tasks.words.xyzzy", ""),
        ("tasks.words.batch_sise", "tasks.words.batch_size"),
        ("warmup", "optim.warmup_steps"),
        ("modle.width", "model.backbone.width"),
    ],
)
def test_an_unknown_key_is_told_the_usual_name_at_the_right_place(write_config, key, meant):
    with pytest.raises(UserError) as caught:
        load(write_config(), [f"{key}=1"])
    hint = f" (did you mean {meant}?)" if meant else ""
    assert str(caught.value).endswith(f"unknown key {key}{hint}")


def test_a_number_of_heads_is_not_taken_for_the_heads_of_the_model(write_config):
    with pytest.raises(
        UserError, match=r"unknown key heads \(did you mean model.backbone.num_heads or model.heads\?\)"
    ):
        load(write_config(), ["heads=8"])


def test_keys_that_the_file_leaves_out_are_known_too(corpus, tmp_path):
    """Those of the default tokenizers, heads and backbone, and of the optimizer."""
    path = tmp_path / "short.yaml"
    task = "objectives: {masked: {}}, modalities: [text], batch_size: 4, sources: [all]"
    path.write_text(f"sources: {{all: {{shards: {corpus}/train-*.tar}}}}\ntasks: {{words: {{{task}}}}}\n")
    with pytest.raises(UserError) as caught:
        load(path, ["patch_size=8", "embedding_dim=64", "d_model=64", "wd=0"])
    for key in ("model.tokenizers.image.patch", "model.heads.retrieval.embed_dim", "model.backbone.width"):
        assert f"did you mean {key}?" in str(caught.value)
    assert "optim.weight_decay" in str(caught.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (["evaluate"], "mmfm: evaluate: RUN is missing (see mmfm evaluate --help)"),
        (["search"], "mmfm: search: INDEX is missing (see mmfm search --help)"),
        (["pack", "photos", "--to"], "mmfm: pack: --to needs a value (see mmfm pack --help)"),
        (["pretrain"], "mmfm: pretrain: CONFIG is missing (see mmfm pretrain --help)"),
        (["pretrain", "a.yaml", "--steps", "5"], "written without dashes, as in steps=50"),
        (["evaluate", "x", "--gruop", "y"], "Did you mean --group? (see mmfm evaluate --help)"),
        (["evaluat"], 'Did you mean "evaluate"?'),
    ],
)
def test_a_wrong_command_line_is_named(mmfm, words, said):
    done = mmfm(*words)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_of_several_processes_the_first_says_what_is_wrong(tmp_path):
    """As torchrun starts them; each leaves its line where torchrun looks for it."""

    def start(rank: int) -> subprocess.Popen:
        env = {**os.environ, "RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json")}
        return subprocess.Popen(
            [sys.executable, "-m", "multimodal_fm", "evaluate"], env=env, stderr=subprocess.PIPE, text=True
        )

    first, second = start(0), start(1)
    assert first.communicate()[1].startswith("mmfm: evaluate: RUN is missing") and first.returncode == 2
    while not (tmp_path / "1.json").exists() and second.poll() is None:
        time.sleep(0.05)
    second.terminate()
    assert second.communicate()[1] == ""
    for rank in (0, 1):
        assert "RUN is missing" in json.loads((tmp_path / f"{rank}.json").read_text())["message"]["message"]


def test_a_process_that_fails_alone_says_so_after_a_while(mmfm, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(cli, "SECONDS_FOR_THE_FIRST", 0)
    assert "RUN is missing" in mmfm("evaluate").stderr


def test_resume_takes_auto_in_pretrain_alone():
    assert cli.arguments(["pretrain", "a.yaml", "--resume"]) == ["pretrain", "a.yaml", "--resume", "yes"]
    assert cli.arguments(["pretrain", "a.yaml", "--resume", "auto"]) == ["pretrain", "a.yaml", "--resume", "auto"]
    assert cli.arguments(["tune", "runs/a", "--resume", "steps=3"]) == ["tune", "runs/a", "--resume", "steps=3"]
