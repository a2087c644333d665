"""Two runs side by side: planted differences are found, planted equality is called none."""

import json

import numpy as np
import pytest
from scipy.stats import chi2

from multimodal_fm.cli import evaluation
from multimodal_fm.errors import UserError
from multimodal_fm.evals import compare
from multimodal_fm.run_dir import evaluations, predictions


def write(run, scores, keys=None, name="test", labels=None):
    run.mkdir(exist_ok=True)
    keys = [f"k{i}" for i in range(len(scores))] if keys is None else keys
    rows = [
        {"key": k, "label": "x", "predicted": "x", "score": float(s), "confidence": 0.5} for k, s in zip(keys, scores)
    ]
    for row, label in zip(rows, labels or []):
        row["label"] = label
    predictions.write(run, name, rows)


def figure(value, low=None, high=None, chance=None, n=100, **more) -> dict:
    low, high = value - 0.05 if low is None else low, value + 0.05 if high is None else high
    return {"value": value, "low": low, "high": high, "chance": chance, "n": n, **more}


def evaluated(run, figures, name="held_out", on="a.tar"):
    run.mkdir(exist_ok=True)
    evaluations.write(run, name, {"on": [on], "step": 1, "seed": 0, "figures": figures, "notes": []})


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "a", tmp_path / "b"


def test_a_planted_difference_is_found(runs):
    a, b = runs
    generator = np.random.default_rng(0)
    first = generator.random(400) < 0.6
    second = np.where(generator.random(400) < 0.2, True, first)  # right where the first is, and in some places more
    write(a, first)
    write(b, second[::-1], keys=[f"k{i}" for i in range(399, -1, -1)])  # joined by key, whatever the order
    one = compare.compare(a, b)["paired"]["test"]
    assert one["verdict"] == "b higher" and one["p"] < 0.001 and one["n"] == 400
    assert one["difference"] == pytest.approx(second.mean() - first.mean()) and 0 < one["low"] < one["high"]
    assert (one["a"], one["b"]) == (pytest.approx(first.mean()), pytest.approx(second.mean()))
    assert compare.compare(b, a)["paired"]["test"]["verdict"] == "a higher"
    draws = generator.integers(0, 400, (4000, 400))
    means = (second.astype(float) - first)[draws].mean(1)
    assert [one["low"], one["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)


def test_no_difference_is_called_none_at_the_rate_that_it_says(runs):
    """Two runs that are right as often: about one of twenty pairs shows a difference, and what would show is said."""
    a, b = runs
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(100):
        scores = (generator.random((2, 200)) < 0.7).astype(float)
        found = compare.estimate_difference(*scores)
        wrong += not found["low"] <= 0 <= found["high"]
        assert found["detectable"] == pytest.approx(2.8 * (scores[1] - scores[0]).std() / np.sqrt(200), rel=0.05)
    assert wrong <= 12
    write(a, scores[0])
    write(b, scores[1])
    result = compare.compare(a, b)
    text = "\n".join(compare.render_comparison(result))
    one = result["paired"]["test"]
    assert one["verdict"] == "no difference" and f"no difference (one of {one['detectable']:.3f} would show)" in text


def test_mcnemar_against_counting():
    a = np.array([1] * 30 + [0] * 25 + [1] * 45 + [0] * 10)
    b = np.array([0] * 30 + [1] * 25 + [1] * 45 + [0] * 10)
    found = compare.test_mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (30, 25)
    corrected = (abs(30 - 25) - 1) ** 2 / 55  # the test's large-sample form, with Edwards' correction
    assert found["p"] == pytest.approx(chi2.sf(corrected, 1), abs=0.01)
    assert compare.test_mcnemar(a, a) == {"only_a": 0, "only_b": 0, "p": 1.0}


def test_scores_that_are_no_answers_have_no_mcnemar(runs):
    a, b = runs
    generator = np.random.default_rng(0)
    own = generator.random(50)
    write(a, own)
    write(b, own + 0.1)
    one = compare.compare(a, b)["paired"]["test"]
    assert "mcnemar" not in one and one["low"] == pytest.approx(0.1) and one["verdict"] == "b higher"


def test_samples_are_joined(runs):
    """By key, and by how often it came before, as keys of several shards may be equal; the rest is counted."""
    a, b = runs
    write(a, [1, 0, 1, 1], keys=["x", "x", "y", "z"])
    write(b, [1, 1, 0], keys=["y", "x", "x"])
    result = compare.compare(a, b)
    assert result["paired"]["test"]["n"] == 3 and result["paired"]["test"]["difference"] == 0
    assert result["notes"] == ["test: 1 samples that only one of the runs has are left out"]


def test_what_cannot_be_compared(runs):
    a, b = runs
    with pytest.raises(UserError, match="a: no such run folder"):
        compare.compare(a, b)
    a.mkdir()
    b.mkdir()
    with pytest.raises(UserError, match="neither predictions nor evaluations.*mmfm evaluate"):
        compare.compare(a, b)
    write(a, [1, 0], keys=["x", "y"])
    write(b, [1, 0], keys=["v", "w"])
    with pytest.raises(UserError, match="no sample in common"):
        compare.compare(a, b)
    write(b, [1, 0], keys=["x", "y"], labels=["x", "other"])
    with pytest.raises(UserError, match="the sample y has two labels, 'x' and 'other'"):
        compare.compare(a, b)
    for line in ("{", '{"key": "x"}', '{"key": "x", "score": NaN}', "3"):
        (b / "predictions-test.jsonl").write_text('{"key": "y", "score": 1}\n' + line)
        with pytest.raises(UserError, match="predictions-test.jsonl, line 2"):
            compare.compare(a, b)
    write(b, [1], name="other")
    (b / "predictions-test.jsonl").unlink()
    with pytest.raises(UserError, match="a has predictions 'test'; .*b has predictions 'other'"):
        compare.compare(a, b)


def test_figures_of_one_name_are_compared_unpaired(runs):
    a, b = runs
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 300), generator.normal(0.5, 1, 200)
    errors = [one.std() / np.sqrt(len(one)) for one in values]
    figures = [figure(v.mean(), v.mean() - 1.96 * e, v.mean() + 1.96 * e) for v, e in zip(values, errors)]
    evaluated(a, {"knn/image/accuracy": figures[0], "knn/audio/accuracy": figure(0.5)})
    evaluated(b, {"knn/image/accuracy": figures[1], "knn/text/accuracy": figure(0.5)}, on="b.tar")
    result = compare.compare(a, b)
    assert list(result["figures"]) == ["held_out/knn/image/accuracy"] and not result["paired"]
    one = result["figures"]["held_out/knn/image/accuracy"]
    width = 1.96 * np.hypot(*errors)  # of a difference of two independent means
    assert [one["low"], one["high"]] == pytest.approx([one["difference"] - width, one["difference"] + width])
    assert one["verdict"] == "b higher" and "a.tar and b.tar" in result["notes"][0]
    assert "unpaired" in "\n".join(compare.render_comparison(result))


def test_an_asymmetric_interval_keeps_its_sides():
    one = compare.difference_of_figures(figure(0.1, 0.08, 0.3), figure(0.9, 0.7, 0.92))
    wanted = [0.8 - np.hypot(0.2, 0.2), 0.8 + np.hypot(0.02, 0.02)]
    assert [one["low"], one["high"]] == pytest.approx(wanted)


def test_forgetting_by_modality(runs):
    base, tuned = runs
    before = {
        "retrieval/text_to_image/r@10": figure(0.5, chance=0.1),
        "retrieval/text_to_image/mrr": figure(0.3, chance=0.1),
        "knn/audio/accuracy": figure(0.6, chance=0.2),
        "knn/image/accuracy": figure(0.4, chance=0.1),
        "text/bits_per_byte": figure(2.0),
        "space/image/uniformity": figure(-2.0),
        "robustness/image/all/knn/image/accuracy/drop": figure(0.1),
        "robustness/image/contrast/5/knn/image/accuracy": figure(0.1, chance=0.1),
    }
    after = before | {
        "retrieval/text_to_image/r@10": figure(0.2, chance=0.1),
        "retrieval/text_to_image/mrr": figure(0.1, chance=0.1),
        "knn/audio/accuracy": figure(0.2, chance=0.2),
        "knn/image/accuracy": figure(0.7, chance=0.1),
        "text/bits_per_byte": figure(3.0),
        "space/image/uniformity": figure(-1.0),
    }
    evaluated(base, before)
    evaluated(tuned, after)
    result = compare.measure_forgetting(base, tuned)
    rows = {row["name"].removeprefix("held_out/"): row for row in result["rows"]}
    assert rows["retrieval/text_to_image/r@10"]["lost"] == pytest.approx(0.75)
    assert rows["retrieval/text_to_image/r@10"]["modalities"] == ["text", "image"]
    assert rows["knn/audio/accuracy"]["lost"] == pytest.approx(1) and rows["knn/audio/accuracy"]["verdict"] == "forgot"
    assert rows["knn/image/accuracy"]["lost"] == pytest.approx(-1) and rows["knn/image/accuracy"]["verdict"] == "gained"
    assert (
        rows["text/bits_per_byte"]["lost"] == pytest.approx(0.5) and rows["text/bits_per_byte"]["verdict"] == "forgot"
    )
    assert not [name for name in rows if "mrr" in name or "space" in name or "/5/" in name]
    modalities = result["modalities"]
    assert list(modalities) == ["text", "image", "audio"]
    assert modalities["audio"] == {"figures": 1, "forgot": 1, "gained": 0, "lost": pytest.approx(1)}
    assert modalities["text"] == {"figures": 2, "forgot": 2, "gained": 0, "lost": pytest.approx(0.625)}
    assert modalities["image"]["gained"] == 1
    json.dumps(result)
    text = "\n".join(compare.render_forgetting(result))
    assert "+75%" in text and "by modality" in text
    with pytest.raises(UserError, match="no figure in common"):
        evaluated(tuned, {})
        compare.measure_forgetting(base, tuned)


def test_the_command(mmfm, runs, capsys):
    a, b = runs
    write(a, [1, 0, 1, 1] * 20, name="cifar \x1b[31m/test")
    write(b, [1, 1, 1, 1] * 20, name="cifar \x1b[31m/test")
    evaluated(a, {"knn/image/accuracy": figure(0.5)}, name="e\x1bvil")
    evaluated(b, {"knn/image/accuracy": figure(0.52)}, name="e\x1bvil")
    done = mmfm("compare", a, b)
    assert done.returncode == 0 and "McNemar" in done.stdout and "B - A" in done.stdout and "\x1b" not in done.stdout
    evaluation.compare(str(a), str(b), json=True)
    (one,) = json.loads(capsys.readouterr().out)["paired"].values()
    assert one["mcnemar"]["only_b"] == 20
    evaluation.compare(str(a), str(b), forgetting=True)
    assert "by modality" in capsys.readouterr().out
