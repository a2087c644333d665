"""The examples run, and what they show is so."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_pretrain_and_search_and_classify(example, tmp_path, capsys):
    example("pretrain_and_search").main(tmp_path)
    said = capsys.readouterr().out
    for modality in ("image", "audio"):
        hits = said.split(f"\n{modality}\n")[1].splitlines()[:3]
        assert sum("red" in hit for hit in hits) >= 2, said
    red, blue = map(float, re.search(r"red image: (\S+), and a blue one: (\S+)", said).groups())
    assert red > blue
    example("classify").main(tmp_path / "run", str(tmp_path / "train-0.tar"))
    assert float(capsys.readouterr().out.split()[-1]) > 0.9


def test_own_loop(example, tmp_path, capsys):
    example("own_loop").main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    steps = [list(map(float, re.findall(r"\d+\.\d+", line))) for line in lines]
    assert len(steps) == 4 and steps[-1][0] < steps[0][0] and steps[-1][1] < steps[0][1]
