"""`mmfm scale`: planted laws are found again, and a toy ladder runs, goes on and is written down."""

import json

import numpy as np
import pytest
from conftest import text_only

from multimodal_fm.errors import UserError
from multimodal_fm.reports import scale as page
from multimodal_fm.train import scale
from multimodal_fm.train.config import build
from multimodal_fm.train.scale import Size, fit, parse_sizes, resize

N = np.array([2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 4e6])


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(scale, "DRAWS", 80)


@pytest.mark.parametrize("E, A, alpha", [(1.7, 400.0, 0.5), (0.0, 12.0, 0.1), (2.5, 3000.0, 0.8)])
def test_a_law_without_noise_is_found_exactly(E, A, alpha):
    law = fit(N, E + A * N**-alpha)
    assert (law.E, law.alpha) == pytest.approx((E, alpha), abs=2e-3) and pytest.approx(A, rel=0.03) == law.A
    assert law.predict(2e7)["value"] == pytest.approx(E + A * 2e7**-alpha, rel=1e-3)


def test_the_intervals_cover_the_truth_and_the_next_run_as_often_as_they_say():
    E, A, alpha, noise, tries = 1.5, 300.0, 0.5, 0.01, 12
    truth, covered, inside = E + A * N**-alpha, 0, 0
    for seed in range(tries):
        draw = np.random.default_rng(seed)
        law = fit(N, truth * np.exp(noise * draw.standard_normal(len(N))))
        interval, predicted = law.to_data()["alpha"], law.predict(1.6e7)
        covered += interval["low"] <= alpha <= interval["high"]
        measured = (E + A * 1.6e7**-alpha) * np.exp(noise * draw.standard_normal())
        inside += predicted["low"] <= measured <= predicted["high"]
    assert covered >= 0.8 * tries and inside >= 0.8 * tries
    assert interval["high"] - interval["low"] < 0.6, "an interval that holds everything says nothing"


def test_another_law_is_seen_not_to_hold():
    """A loss that stops falling lies outside of what the smaller runs predict."""
    law = fit(N, 1.5 + 300 * N**-0.5)
    assert not law.predict(1.6e7)["low"] <= 1.65 <= law.predict(1.6e7)["high"]


@pytest.mark.parametrize("call, said", [
    (lambda: fit([1, 2, 3], [3, 2, 1]), "at least 4 runs"), (lambda: fit(N, -N), "above 0"),
    (lambda: parse_sizes("32,x", 2), "no WIDTH"), (lambda: parse_sizes("32,32x2", 2), "twice"),
])  # fmt: skip
def test_what_cannot_be_fitted(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_sizes_keep_the_width_of_heads(corpus, tmp_path):
    config = build(text_only(corpus, tmp_path / "run"))  # heads of 24
    assert parse_sizes("32, 48x3", 2) == [Size(32, 2), Size(48, 3)]
    for width, heads in ((24, 1), (48, 2), (72, 3), (20, 1), (64, 2)):
        backbone = resize(config, Size(width, 3), tmp_path, 7).model.backbone
        assert (backbone.width, backbone.num_heads, backbone.depth) == (width, heads, 3)


def test_a_size_that_cannot_be(corpus, tmp_path):
    with pytest.raises(UserError, match="size 21x1: width"):
        resize(build(text_only(corpus, tmp_path / "run")), Size(21, 1), tmp_path, 0)


def test_the_page_shows_what_was_fitted_and_what_was_held_out(tmp_path):
    law = fit(N, 1.5 + 300 * N**-0.5)
    runs = [{"size": f"{i}x1", "seed": 0, "parameters": int(n), "loss": 2.0, "held_out": i == 7, "inside": True,
             "predicted": law.predict(n)} for i, n in enumerate(N)]  # fmt: skip
    curve = [{"parameters": n, **law.predict(n)} for n in N]
    result = {"figure": "validation/loss", "steps": 10, "law": law.to_data(), "runs": runs, "curve": curve}
    text = page.write(tmp_path, result).read_text()
    assert (
        text.count("<svg") == 1 and "held out" in text and "alpha 0.5 (" in text and "http" not in text.split("<svg")[0]
    )


@pytest.mark.slow
def test_a_toy_ladder(mmfm, corpus, tmp_path):
    import yaml

    data = text_only(corpus, tmp_path / "run", steps=30, validate_every=30, save_every=30)
    data["sources"]["all"]["validation"] = f"{corpus}/validation-*.tar"
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(data))
    words = ("scale", tmp_path / "toy.yaml", "--sizes", "8x1,16x1,24x1,32x1", "--held-out", "48x1")
    done = mmfm(*words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run-scale/scale.json").read_text())
    assert [run["size"] for run in result["runs"]] == ["8x1", "16x1", "24x1", "32x1", "48x1"]
    losses = [run["loss"] for run in result["runs"]]
    assert losses[-1] < losses[0] and "held out 48x1" in done.stdout
    before = (tmp_path / "run-scale/8x1-0/metrics.jsonl").stat().st_mtime_ns
    assert mmfm(*words).returncode == 0 and (tmp_path / "run-scale/8x1-0/metrics.jsonl").stat().st_mtime_ns == before
    assert mmfm("scale", tmp_path / "toy.yaml", "--sizes", "8,16").returncode == 2
