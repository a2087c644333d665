"""The synthetic suite: its references against other computations, its recipe, the tokenizer of numbers, its figures."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.in_context import rules
from multimodal_fm.errors import SampleError
from multimodal_fm.tokenizers import numbers
from multimodal_fm.train import loop
from multimodal_fm.train.config import load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import in_context as benchmark  # noqa: E402


def test_a_key_has_one_value_in_a_recall_and_none_once_they_are_shuffled():
    draw = np.random.default_rng(0)
    for _ in range(50):
        text = rules.draw_recall(draw)
        pairs = list(zip(text[::2], text[1::2]))
        assert len(pairs) == rules.PAIRS and len(dict(pairs)) == len(set(pairs))
        times = rules.count_occurrences(text)
        assert [key for (key, _), n in zip(pairs, times) if n == 0] == list(dict.fromkeys(text[::2]))
        shuffled = rules.shuffle_values(text, draw)
        assert shuffled[::2] == text[::2] and shuffled[-1] == text[-1] and sorted(shuffled) == sorted(text)


def test_the_bayesian_of_a_chain_is_that_of_an_integral_over_all_transitions():
    """The bigram reference against Monte Carlo over the prior, weighted by the likelihood of what was seen."""
    draw = np.random.default_rng(1)
    text, transitions = rules.draw_chain(draw)
    text = text[:9]
    states = [rules.STATES.index(letter) for letter in text]
    prior = np.random.default_rng(2).dirichlet(np.ones(3), size=(400_000, 3))
    weight, nats = np.ones(len(prior)), []
    for before, after in zip(states[:-1], states[1:]):
        nats.append(-np.log((weight * prior[:, before, after]).sum() / weight.sum()))
        weight = weight * prior[:, before, after]
    found = rules.chain_references(text, transitions)
    assert found["bigram"] == pytest.approx(nats, rel=0.03)
    means = {
        name: np.mean([rules.chain_references(*rules.draw_chain(draw))[name].mean() for _ in range(100)])
        for name in found
    }
    assert means["truth"] < means["bigram"] < means["unigram"] < means["uniform"] == pytest.approx(np.log(3))


def test_least_squares_make_no_error_once_there_are_as_many_points_as_dimensions():
    rows = np.stack([rules.draw_regression(np.random.default_rng(seed)) for seed in range(200)])
    errors = np.stack([rules.least_squares_errors(one) for one in rows])
    assert errors[:, rules.DIMS :].max() < 1e-6
    for k in range(rules.DIMS):  # in expectation (d - k) / d of the variance is left, which is d
        assert errors[:, k].mean() == pytest.approx(rules.DIMS - k, rel=0.35)
    shuffled = rules.shuffle_targets(rows[0], np.random.default_rng(0))
    assert (shuffled[::2] == rows[0][::2]).all() and sorted(shuffled[1::2, 0]) == sorted(rows[0][1::2, 0])
    assert rules.least_squares_errors(shuffled)[-1] > 1e-3


def test_numbers_are_read_weighed_and_refused():
    plain, weighted = numbers.Tokenizer(), numbers.Tokenizer(numbers.Config(dims=2, weighted=True, max_tokens=3))
    assert plain.read(np.arange(5.0))[0].content.shape == (5, 1)
    rows = np.array([[1.0, 2.0, 1.0], [3.0, 4.0, 0.0], [5.0, 6.0, 1.0], [7.0, 8.0, 1.0]])
    data = io.BytesIO()
    np.save(data, rows)
    first, second = weighted.read({"npy": data.getvalue()})
    assert first.content.tolist() == rows[:3].tolist() and second.content.tolist() == rows[3:].tolist()
    embed, predict = weighted.embedder(4), weighted.predictor(4)
    assert embed(first.content).shape == (3, 4)
    assert torch.equal(embed(first.content), embed(first.content * torch.tensor([1.0, 1.0, 9.0]))), (
        "weights are not read"
    )
    vectors = torch.randn(3, 4)
    errors = ((predict.project(vectors) - first.content[:, :2]) ** 2).mean(1) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(predict(vectors, first.content), errors)
    for wrong, said in (
        (b"x", "decode"),
        (np.zeros((3, 2)), "decode"),
        (np.zeros((0, 3)), "empty"),
        (np.full((2, 3), np.nan), "decode"),
    ):
        with pytest.raises(SampleError) as caught:
            weighted.read({"npy": wrong} if isinstance(wrong, bytes) else wrong)
        assert caught.value.reason == said
    assert weighted.read({"txt": b"x"}) == []


def test_numbers_that_are_announced_and_not_there_are_refused():
    """NumPy's own reader would ask for all of the memory first."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 1)}\n"
    with pytest.raises(SampleError, match="are no array"):
        numbers.Tokenizer().read({"npy": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in_context")
    words = ["--train", "96", "--validation", "40", "--to", str(folder)]
    subprocess.run([sys.executable, "-m", "data.in_context", *words], check=True, capture_output=True, cwd=ROOT)
    return folder / "0"


def test_the_recipe_and_the_config_fit_and_a_run_of_them_is_measured(built, tmp_path):
    settings = [f"sources.{name}.{key}={built}/{name}-{split}.{ending}"
                for name, ending in (("recall", "jsonl"), ("chain", "jsonl"), ("regression", "tar"))
                for key, split in (("shards", "train"), ("validation", "validation"))]  # fmt: skip
    settings += [f"tasks.{name}.batch_size=4" for name in ("recall", "chain", "regression")]
    settings += [
        f"run_dir={tmp_path}/run",
        "steps=3",
        "num_workers=0",
        "threads=1",
        "track=[]",
        "model.backbone.width=32",
    ]
    config = load(ROOT / "configs/in_context.yaml", settings)
    loop.pretrain(config)
    found = benchmark.measure(tmp_path / "run", config)
    assert found["chain"]["uniform"]["value"] == pytest.approx(np.log(3))
    assert found["chain"]["model"]["value"] > found["chain"]["unigram"]["value"], "it has hardly learned"
    assert found["recall"]["last, shuffled values"]["value"] < 0.5
    assert 0.3 < found["regression"]["11 points"]["value"] < 3


class Perfect:
    """A stand-in for `predict` that answers as a perfect reader of the context does."""

    def __call__(self, model, objective, modality, inputs):
        if modality == "numbers":
            y = np.stack([one[1::2, 0] for one in inputs])
            outputs = np.zeros((len(inputs), 2 * rules.POINTS - 1, rules.DIMS))
            for row, one in enumerate(inputs):
                x, own = one[::2, : rules.DIMS], y[row]
                for k in range(rules.POINTS):
                    outputs[row, 2 * k, 0] = x[k] @ np.linalg.lstsq(x[:k], own[:k], rcond=None)[0] if k else 0.0
            return np.zeros(outputs.shape[:2]), outputs
        logits = np.zeros((len(inputs), len(inputs[0]) + 1, 258))
        for row, text in enumerate(inputs):
            for i in range(1, len(text), 2):
                before = text[: i - 1]
                known = {before[j]: before[j + 1] for j in range(0, len(before), 2)}
                logits[row, i, ord(known.get(text[i - 1], "?"))] = 1
        return np.zeros(logits.shape[:2]), logits


def test_who_reads_the_context_recalls_and_regresses_and_learns_nothing_from_shuffled_ones(monkeypatch):
    monkeypatch.setattr(benchmark, "predict", Perfect())
    draw = np.random.default_rng(0)
    bytewise = SimpleNamespace(tokenizers={"text": SimpleNamespace(encode=lambda text: list(text.encode()))})
    recall = benchmark.measure_recall(bytewise, None, [rules.draw_recall(draw) for _ in range(200)])
    assert recall["0 before"]["value"] == 0 and recall["1 before"]["value"] == recall["4+ before"]["value"] == 1
    control = recall["last, shuffled values"]
    assert recall["last"]["value"] == 1 and control["low"] < control["chance"] < control["high"] < 0.4
    arrays = [rules.draw_regression(draw) for _ in range(100)]
    regression = benchmark.measure_regression(None, None, arrays)
    assert regression["gap to least squares, from 4 points on"]["value"] == pytest.approx(0, abs=1e-6)
    assert regression["8 points"]["value"] < 1e-6 < 0.5 < regression["11 points, shuffled targets"]["value"]
