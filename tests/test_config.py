"""Configurations: what is read, and what is said of one that is wrong."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny

from multimodal_fm.config import to_data
from multimodal_fm.corpus import storage
from multimodal_fm.errors import UserError
from multimodal_fm.model import Model
from multimodal_fm.train.config import build, load

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


def start(*words, **options):
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "multimodal_fm", *map(str, words)], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_is_read_and_opens_with_its_command(path):
    config = load(path)
    head = path.read_text().split("\n\n")[0]
    assert f"mmfm pretrain configs/{path.name}" in head and "minute" in head
    assert to_data(build(yaml.safe_load(yaml.safe_dump(to_data(config), sort_keys=False)))) == to_data(config)


def test_odd_surroundings_are_a_line_or_no_matter(corpus, tmp_path):
    """stdout closed, no home to keep a cache in, a limit on how long a file may grow."""
    closed = start("inspect", f"{corpus}/train-0.tar", preexec_fn=lambda: os.close(1))
    assert closed.returncode == 0 and not closed.stderr
    limited = start(
        *("pack", corpus, "--to", tmp_path / "packed", "--workers", 0),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert limited.returncode == 2 and limited.stderr.splitlines()[-1].endswith("File too large")
    assert "Traceback" not in limited.stderr


def test_without_a_home_the_cache_lies_among_temporary_files(monkeypatch, tmp_path):
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
    wrong = ["modle.backbone.width=64", "optim.lrr=1", "tasks.words.objectives.masked.mask_ration=0.1", "steps=many"]
    with pytest.raises(UserError) as caught:
        load(write_config(), [*wrong, "model.backbone.num_heads=7"])
    message = str(caught.value)
    assert "modle.backbone.width (did you mean model.backbone.width?)" in message
    assert "optim.lrr (did you mean optim.lr?)" in message
    assert "objectives.masked.mask_ration (did you mean tasks.words.objectives.masked.mask_ratio?)" in message
    assert "steps is a whole number, not 'many'" in message
    assert "model.backbone: width (48) must be num_heads (7) times an even number" in message
    assert "\n" not in message


TASK = "{objectives: {masked: {}}, modalities: [text], batch_size: 1, sources: {all: 1}}"


@pytest.mark.parametrize(
    "change, said",
    [
        ("tasks.words.objectives={maskd: {}}", "tasks.words.objectives.maskd.objective is none of"),
        ("tasks.words.objectives={maskd: {}}", "did you mean masked?"),
        ("tasks.words.modalities=[txt]", "did you mean text?"),
        ("tasks.words.modalities=[text, text]", "names one of them twice"),
        ("tasks.words.modalities=[]", "at least one modality"),
        ("tasks.words.sources.al=1", "did you mean all?"),
        ("tasks.words.sources.all={now: 1}", "weights by step are written {0: 2, 10000: 1}"),
        ("tasks.words.batch_size=0", "tasks.words.batch_size is at least 1"),
        ("tasks.words.objectives.masked.weight=-1", "weight is a number from 0 up"),
        ("optim.name=muonn", "did you mean muon?"),
        ("model.backbone.num_heads=5", "must be num_heads (5) times an even number"),
        ("model.tokenizers.audio.patch_mels=7", "must be a multiple of patch_mels"),
        ("model.tokenizers.keys={tokenizer: text}", "model.tokenizers.keys cannot be a name"),
        ("model.heads.retrieval.embed_dim=0", "embed_dim is at least 1"),
        ("precision=float16", "is one of float32, bfloat16"),
        ("tasks.words.objectives={mine: {objective: no.such.module}}", "mine.objective cannot be imported"),
        ("tasks={}", "at least one task"),
        ("model.backbone.num_heads=0", "at least 1"),
        ("model.tokenizers.image.patch=0", "patch and max_tokens are at least 1"),
        ("model.tokenizers.image.min_crop_scale=0", "min_crop_scale"),
        ("model.tokenizers.audio.hop_length=0", "at least 1"),
        ("model.tokenizers.text.vocab_size=100", "at least 258"),
        ("model.tokenizers.text.fields=[]", "at least one field"),
        ("optim.betas=[1]", "two numbers"),
        ("optim.grad_clip=-1", "from 0 up"),
        ("sources.all.piece_bytes=0", "at least 16"),
        ("ema_decay=2", "ema_decay is from 0 to 1"),
        ("tasks.looks.objectives.masked.mask_ratio={imgae: 0.5}", "names no modality of the task: imgae"),
        ("tasks.looks.objectives.masked.mask_ratio={image: 0}", "hides nothing"),
        ("tasks.looks.objectives.causal={}", "tasks.looks.objectives.causal must stand first"),
        ("tasks.words.objectives={causal: {prefix: [text]}}", "leaves no modality to predict"),
        ("tasks.words.objectives={contrastive: {}}", "tasks.words.modalities must be at least two"),
        ("tasks.pairs.objectives.contrastive.pairs={text_video: 1}", "pairs names text_video; there are text_image"),
        ("tasks.pairs.objectives={masked: {fuse: true}, contrastive: {}}", "needs a sequence for each modality"),
        ("tasks.words.sources.all=.nan", "are weights"),
        (f"tasks.a/b={TASK}", "cannot be a name"),
        ("tasks.words.objectives={mine: {objective: os.path}}", "is no plug-in"),
        ("tasks.words.objectives={os.path: {}}", "cannot be a name: write {NAME: {objective: os.path}}"),
        ("validate_every=5", "needs `validation` shards"),
        ("evaluate_every=5", "needs something to measure"),
        ("best=validation/loss", "needs validate_every or evaluate_every"),
        ("best=", "best is text, not null: '' is an empty one"),
        ("track=[tensorbord]", "did you mean tensorboard?"),
        ("run_dir=2024-13-45", "the value is not YAML"),
        ("steps", "is not key=value"),
    ],
)
def test_what_is_wrong_is_named(write_config, change, said):
    with pytest.raises(UserError) as caught:
        load(write_config(), [change])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["steps: 5\nseed: 1\nsteps: 6", "optim: {lr: 1, lr: 2}"])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line \d: the key (steps|lr) stands twice"):
        load(path)


def test_only_what_the_tasks_read_is_built(corpus):
    """Without `tokenizers` an audio-only model needs no tokenizer of text, nor its file."""
    data = tiny(corpus)
    del data["model"]["tokenizers"]
    data["tasks"] = {"looks": {**data["tasks"]["looks"], "modalities": ["audio"]}}
    data["tasks"]["looks"]["objectives"] = {"masked": {"mask_ratio": 0.5}}
    config = build(data)
    assert list(config.model.tokenizers) == ["audio"]
    assert list(Model(config.model).embedders) == ["audio"]


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
    done = start("pretrain", path, "--smoke", env={**os.environ, **plain})
    assert done.returncode == 2 and "no samples with gr\\xf6\\xdfe=\\u2192" in done.stderr
    done = start("pretrain", path, "--smoke", "sources.all.where={}", env={**os.environ, **plain})
    assert done.returncode == 0, done.stderr


CONFIG = "(the tiny configuration)"


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", CONFIG, "modle.backbone.width=64"),
        ("pretrain", "no-such.yaml"),
        ("pretrain", CONFIG, "sources.all.shards=nothing-*.tar"),
        ("pretrain", CONFIG, "--resume"),
        ("evaluate", "no-such-run", "--on", "x.tar"),
        ("search", "no-such-run", "a", "--in", "x.tar"),
        ("search", "no-such-run", "a", "--in", "x.tar", "--top", "many"),
        ("pretrain", CONFIG, f"run_dir={__file__}"),
        ("pretrain", CONFIG, "model.tokenizers.text.file=/nonexistent", "num_workers=1"),
        ("evaluate", "x" * 300, "--on", "x.tar"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_the_command_line_says_it_in_one_line_and_exits_2(write_config, mmfm, words):
    done = mmfm(*(write_config() if word == CONFIG else word for word in words))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_process_exits_with_2(write_config):
    done = start("pretrain", write_config(), "modle.backbone.width=64")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_help_is_quick_and_complete():
    done = start("--help")
    assert done.returncode == 0
    for command in ("pretrain", "evaluate", "search"):
        assert command in done.stdout
    heavy = "import sys, multimodal_fm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
