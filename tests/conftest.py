"""What the tests share: a tiny corpus of all three modalities, made on the spot, and a tiny configuration over it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default tests are for the CPU; `gpu` ones ask for more

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from multimodal_fm import cli
from multimodal_fm.corpus import shards
from multimodal_fm.stream.tasks import build_stream

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}


def jpeg(color, size=(40, 30), kind="JPEG", mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, kind)
    return data.getvalue()


def tone(frequency: float, seconds: float = 0.5, rate: int = 16_000, kind: str = "FLAC", channels: int = 1) -> bytes:
    data = io.BytesIO()
    wave = 0.4 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    soundfile.write(data, np.stack([wave] * channels, 1), rate, format=kind)
    return data.getvalue()


def samples(count: int = 24, start: int = 0) -> list[dict]:
    """Colors as words, pictures and tones; every sample has an own key and says its color in two languages."""
    made = []
    for i in range(start, start + count):
        name, color = list(COLORS.items())[i % 4]
        made.append(
            {
                "__key__": f"sample{i:04d}",
                "jpg": jpeg(tuple(max(0, c - i % 7) for c in color)),
                "txt": f"a {name} square number {i}",
                "json": {
                    "color": name,
                    "language": "en" if i % 2 else "fr",
                    "captions": {"en": f"{name}", "fr": f"le {name}"},
                },
                "flac": tone(220.0 * (1 + i % 4)),
                "cls": str(i % 4),
            }
        )
    return made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two training shards and one to measure on."""
    folder = tmp_path_factory.mktemp("corpus")
    shards.write(folder / "train-0.tar", samples(16))
    shards.write(folder / "train-1.tar", samples(16, 16))
    shards.write(folder / "validation-0.tar", samples(16, 100))
    return folder


def tiny(corpus, **changes) -> dict:
    """The plain data of a configuration that trains in a second or two, with changes.

    `tokenizers`, `backbone` and `heads` are those of its model, the other changes keys of the configuration.
    """
    data = {
        "sources": {"all": {"shards": f"{corpus}/train-*.tar", "group": "color"}},
        "tasks": {
            "words": {"objectives": {"masked": {}}, "modalities": ["text"], "batch_size": 4, "sources": {"all": 1}},
            "next": {"objectives": {"causal": {}}, "modalities": ["text"], "batch_size": 4, "sources": {"all": 1}},
            "looks": {
                "objectives": {
                    "masked": {
                        "hide": "drop",
                        "mask_ratio": {"image": 0.5, "audio": 0.5},
                        "decoder": {"width": 32, "depth": 1, "num_heads": 2},
                    }
                },
                "modalities": ["image", "audio"],
                "batch_size": 6,
                "sources": {"all": 1},
            },
            "pairs": {
                "objectives": {"contrastive": {}},
                "modalities": ["text", "image", "audio"],
                "batch_size": 8,
                "sources": {"all": 1},
            },
        },
        "model": {
            "tokenizers": {
                "text": {"vocab_size": 300, "max_tokens": 24},
                "image": {"patch": 8, "max_tokens": 12, "min_crop_scale": 0.6, "hflip": 0.5},
                "audio": {"patch_frames": 8, "n_mels": 32, "patch_mels": 32, "max_tokens": 8},
            },
            "backbone": {"width": 48, "depth": 2, "num_heads": 2},
            "heads": {"retrieval": {"embed_dim": 32}},
        },
        "optim": {"lr": 3e-3, "warmup_steps": 3},
        "steps": 12,
        "save_every": 4,
        "num_workers": 0,
        "threads": 1,
    }
    for name in ("tokenizers", "backbone", "heads"):
        if name in changes:
            data["model"][name] = changes.pop(name)
    return {**data, "track": [], **changes}


def text_only(corpus, run_dir, **changes) -> dict:
    """The tiny configuration with its one masked task over text: a run of it takes a fraction of a second."""
    data = tiny(corpus, **{"run_dir": str(run_dir), **changes})
    tokenizers = data["model"]["tokenizers"]
    data["model"]["tokenizers"] = {"text": tokenizers["text"]} if "tokenizers" not in changes else tokenizers
    if "tasks" not in changes:
        data["tasks"] = {"words": data["tasks"]["words"]}
    return data


def records(run, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (Path(run) / f"{name}.jsonl").read_text().splitlines()]


def losses(run) -> dict[int, dict]:
    """Losses and other figures of each step that do not depend on the machine's pace."""
    kept = ("grad_norm", "lr", "skipped", "tokens")
    rows = [row for row in records(run) if "loss" in row]
    return {row["step"]: {k: v for k, v in row.items() if k.startswith("loss") or k in kept} for row in rows}


def dataset_of(config, corpora, **settings):
    """The stream of a configuration whose tokenizers have learned."""
    own = (config.tasks, corpora, config.model.tokenizers, config.seed, config.microbatches, config.round_to)
    return build_stream(*own, **settings)


@pytest.fixture
def write_config(tmp_path, corpus):
    """Writes the tiny configuration with changes; returns its path. The run folder is tmp_path / "run"."""

    def write(name="tiny.yaml", **changes):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **tiny(corpus, **changes)}, sort_keys=False))
        return path

    return write


@pytest.fixture
def mmfm(monkeypatch, capsys):
    """The command line, in this process: `mmfm("evaluate", run)` returns its exit code and what it has printed."""

    def call(*words) -> subprocess.CompletedProcess:
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        monkeypatch.setattr(sys, "argv", ["mmfm", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return subprocess.CompletedProcess(sys.argv, caught.value.code or 0, *capsys.readouterr())

    return call


def output(done: subprocess.CompletedProcess) -> str:
    """What a command has printed that succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for test in items:
            if "gpu" in test.keywords:
                test.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_make_parametrize_id(val, argname):
    """Bytes are not in the names of tests: a sound file may hold the second in which it was made."""
    return argname if isinstance(val, bytes) else None
