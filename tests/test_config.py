import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny

from multimodal_fm.config import build, load, to_data
from multimodal_fm.corpus import storage
from multimodal_fm.errors import UserError

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


def mmfm(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "multimodal_fm", *map(str, words)], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_is_read_and_opens_with_its_command(path):
    config = load(path)
    head = path.read_text().split("\n\n")[0]
    assert f"mmfm pretrain configs/{path.name}" in head and "minute" in head
    assert to_data(build(yaml.safe_load(yaml.safe_dump(to_data(config))))) == to_data(config)


def test_odd_surroundings_are_a_line_or_no_matter(corpus, tmp_path):
    """stdout closed, no home to keep a cache in, a limit on how long a file may grow."""
    closed = mmfm("inspect", f"{corpus}/train-0.tar", preexec_fn=lambda: os.close(1))
    assert closed.returncode == 0 and not closed.stderr
    limited = mmfm(
        *("pack", corpus, "--to", tmp_path / "packed", "--workers", 0),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert limited.returncode == 2 and limited.stderr.splitlines()[-1].endswith("File too large")
    assert "Traceback" not in limited.stderr


def test_who_has_no_home_keeps_the_cache_among_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv("MMFM_CACHE", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    assert storage.cache_folder() == tmp_path / f"multimodal_fm-{os.getuid()}"


def test_a_config_survives_the_round_trip(corpus):
    config = build(tiny(corpus))
    assert to_data(build(to_data(config))) == to_data(config)


def test_all_wrong_keys_come_in_one_message(write_config):
    with pytest.raises(UserError) as caught:
        load(write_config(), ["modle.width=64", "optim.lrr=1", "tasks.words.shrae=0.1", "steps=many", "model.heads=7"])
    message = str(caught.value)
    assert "modle.width (did you mean model.width?)" in message
    assert "optim.lrr (did you mean optim.lr?)" in message
    assert "tasks.words.shrae (did you mean tasks.words.share?)" in message
    assert "steps is a whole number, not 'many'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change, said",
    [
        (["tasks.words.objective=maskd"], "did you mean masked?"),
        (["tasks.words.modalities=[txt]"], "did you mean text?"),
        (["tasks.words.sources.al=1"], "did you mean all?"),
        (["tasks.words.batch_size=0"], "tasks.words.batch_size is at least 1"),
        (["optim.name=muonn"], "did you mean muon?"),
        (["model.heads=5"], "must be heads (5) times an even number"),
        (["tokenizers.audio.patch_mels=7"], "must be a multiple of patch_mels"),
        (["precision=float16"], "is one of float32, bfloat16"),
        (["tasks.words.objective=no.such.module"], "cannot be imported"),
        (["tasks={}"], "at least one task"),
        (["model.heads=0"], "at least 1"),
        (["tokenizers.image.patch=0"], "patch and max_tokens are at least 1"),
        (["tokenizers.image.min_crop_scale=0"], "a share above 0"),
        (["tokenizers.audio.hop_length=0"], "at least 1"),
        (["tokenizers.text.vocab_size=100"], "at least 258"),
        (["tokenizers.text.fields=[]"], "at least one field"),
        (["optim.betas=[1]"], "two numbers"),
        (["optim.clip=-1"], "from 0 up"),
        (["sources.all.piece=0"], "at least 16"),
        (["ema=2"], "is from 0 to 1"),
        (["tasks.looks.share={imgae: 0.5}"], "did you mean image?"),
        (["tasks.looks.also={causal: {}}"], "compare whole sequences"),
        (["tasks.words.sources.all=.nan"], "are weights"),
        (
            ["tasks.items={objective: masked, modalities: [text], batch_size: 1, sources: {all: 1}}"],
            "cannot be a name",
        ),
        (["tasks.words.objective=os.path"], "no plug-in"),
        (["run=2024-13-45"], "the value is not YAML"),
        (["steps"], "is not key=value"),
    ],
)
def test_what_is_wrong_is_named(write_config, change, said):
    with pytest.raises(UserError, match=".") as caught:
        load(write_config(), change)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00", ""])
def test_a_broken_file_is_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_are_utf_8_whatever_the_machine_takes_for_text(write_config, corpus, tmp_path):
    """In a locale of ASCII alone: a config and shards with other letters train, and what is saved is read again."""
    path = write_config(sources={"all": {"shards": f"{corpus}/train-*.tar", "where": {"größe": "→"}}})
    path.write_bytes(path.read_bytes() + "# größer → besser\n".encode())
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = mmfm("pretrain", path, "--smoke", env={**os.environ, **plain})
    assert done.returncode == 2 and "no samples with gr\\xf6\\xdfe=\\u2192" in done.stderr
    done = mmfm("pretrain", path, "--smoke", "sources.all.where={}", env={**os.environ, **plain})
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_it_in_one_line_and_exits_2(write_config):
    for words in (
        ("pretrain", write_config(), "modle.width=64"),
        ("pretrain", "no-such.yaml"),
        ("pretrain", write_config(), "sources.all.shards=nothing-*.tar"),
        ("pretrain", write_config(), "--resume"),
        ("evaluate", "no-such-run", "--on", "x.tar"),
        ("search", "no-such-run", "a", "--in", "x.tar"),
        ("search", "no-such-run", "a", "--in", "x.tar", "--top", "many"),
        ("pretrain", write_config(), f"run={__file__}"),
        ("pretrain", write_config(), "tokenizers.text.file=/nonexistent", "workers=1"),
        ("evaluate", "x" * 300, "--on", "x.tar"),
        ("nonsense",),
    ):
        done = mmfm(*words)
        assert done.returncode == 2, (words, done)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (words, done.stderr)


def test_help_is_quick_and_complete():
    done = mmfm("--help")
    assert done.returncode == 0
    for command in ("pretrain", "evaluate", "search"):
        assert command in done.stdout
    heavy = "import sys, multimodal_fm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
