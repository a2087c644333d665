"""Corruptions against a second computation, and the drop that they cause, by hand and on a model."""

import colorsys
import dataclasses
import io

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny, tone
from PIL import Image

from multimodal_fm import load, objectives
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config as Source
from multimodal_fm.corpus.shards import Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.evals import heads, knn, robustness
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.embed_corpus import embed_corpus
from multimodal_fm.evals.metrics import estimate_difference
from multimodal_fm.evals.robustness import Change, Config, corrupt_corpus
from multimodal_fm.evals.run import evaluate
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


def picture(seed: int = 0, size=(40, 48)) -> np.ndarray:
    """Smooth colors with some texture, (H, W, 3) uint8."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run") / "run"
    loop.pretrain(build({**tiny(corpus, steps=4, save_every=4), "run_dir": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.mark.parametrize("name", robustness.CORRUPTIONS["image"])
@pytest.mark.parametrize("size", [(40, 48), (224, 230)])
def test_stronger_corruptions_change_pictures_more(name, size):
    corrupt, clean = robustness.CORRUPTIONS["image"][name], picture(size=size)
    changed = [corrupt(clean, strength, draw()) for strength in range(1, 6)]
    assert all(one.shape == clean.shape and one.dtype == np.uint8 for one in changed)
    away = [np.abs(one.astype(float) - clean).mean() for one in changed]
    assert (
        away[0] > 0 and all(after > 0.98 * before for before, after in zip(away, away[1:])) and away[4] > 1.2 * away[0]
    )
    again = corrupt(clean, 3, draw())
    assert np.array_equal(changed[2], again)


def test_image_corruptions_by_a_second_computation():
    clean = picture()
    bright = robustness.brightness(clean, 3, draw())
    for row, column in ((0, 0), (13, 20), (39, 47)):
        hue, saturation, value = colorsys.rgb_to_hsv(*clean[row, column] / 255)
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15))
        assert bright[row, column] == pytest.approx(np.array(wanted) * 255, abs=1)
    black = robustness.brightness(np.zeros((4, 4, 3), np.uint8), 5, draw())
    assert (black == int(0.3 * 255)).all()
    flat = robustness.contrast(clean, 5, draw()).astype(float)
    assert (flat - flat.mean((0, 1))).std() == pytest.approx(0.15 * (clean - clean.mean((0, 1))).std(), rel=0.2)
    assert flat.mean((0, 1)) == pytest.approx(clean.mean((0, 1)), abs=1)
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = robustness.gaussian_noise(grey, 5, draw()).astype(float) / 255
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert len(np.unique(robustness.pixelate(clean, 5, draw()), axis=0)) < len(np.unique(clean, axis=0))


@pytest.mark.parametrize("strength, decibel", [(1, 30), (3, 10), (5, 0)])
def test_white_noise_has_the_ratio_that_it_says(strength, decibel):
    wave = np.sin(np.arange(40_000) / 7).astype(np.float32)[:, None]
    noisy, rate = robustness.white_noise((wave, 16_000), strength, draw())
    ratio = np.square(wave, dtype=float).mean() / np.square(noisy - wave, dtype=float).mean()
    assert 10 * np.log10(ratio) == pytest.approx(decibel, abs=0.1) and rate == 16_000
    silent = np.zeros((100, 1), np.float32)
    assert not robustness.white_noise((silent, 16_000), 5, draw())[0].any()


def test_speed_shortens_or_lengthens():
    rates = {robustness.speed((np.ones((9, 1)), 16_000), 5, draw(seed))[1] for seed in range(20)}
    assert rates == {24_000, round(16_000 / 1.5)}


def test_typos_rise_with_the_strength_and_keep_what_was_changed():
    text = "the quick brown fox jumps over a lazy dog, " * 40
    words = text.split()
    before: set[int] = set()
    for strength in range(1, 6):
        changed = robustness.typos(text, strength, draw()).split()
        assert len(changed) == len(words)
        now = {i for i, (a, b) in enumerate(zip(words, changed)) if a != b}
        swapped_alike = 0.04  # a swap of two equal letters changes nothing
        assert 0.1 * strength - 0.06 - swapped_alike < len(now) / len(words) < 0.1 * strength + 0.06
        assert before <= now and all(changed[i] == "a" for i, word in enumerate(words) if word == "a")
        before = now
    assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(words, changed))
    assert robustness.typos("猫 12 ...", 5, draw()) == "猫 12 ..."


def test_a_changed_corpus_is_the_same_but_for_one_modality(model, corpus):
    embedded = embed_corpus(model, Corpus(Source(f"{corpus}/validation-*.tar")))
    change = Change("gaussian_noise", robustness.gaussian_noise, 5, 0)
    view, again = (corrupt_corpus(embedded, model, "image", change) for _ in range(2))
    assert torch.equal(view.inputs["image"].vectors, again.inputs["image"].vectors)
    assert not torch.equal(view.inputs["image"].vectors, embedded.inputs["image"].vectors)
    for modality in ("text", "audio"):
        assert view.inputs[modality] is embedded.inputs[modality]
    # read from the changed corpus afresh, the vectors are the same
    fresh = embed_corpus(model, view.corpus, ["image"])
    torch.testing.assert_close(fresh.inputs["image"].vectors, view.inputs["image"].vectors, rtol=0, atol=1e-5)
    raw = view.corpus.raw(0)
    assert set(raw) == {"png", "txt", "json", "flac", "cls"} and view.field(3, ".cls") == embedded.field(3, ".cls")
    other = corrupt_corpus(embedded, model, "image", dataclasses.replace(change, seed=1))
    assert not torch.equal(other.inputs["image"].vectors, view.inputs["image"].vectors)


def test_a_sound_is_changed_as_its_tokenizer_would_read_it(model):
    data = tone(440)
    change = Change("speed", lambda sound, strength, generator: (sound[0], sound[1] * 2), 1, 0)
    changed = robustness.corrupt_input({"flac": data}, "audio", model.tokenizers["audio"], change)
    wave, rate = soundfile.read(io.BytesIO(changed["wav"]))
    assert rate == 32_000 and np.abs(wave - soundfile.read(io.BytesIO(data))[0]).max() < 1e-6


def test_texts_that_labels_point_into_stay(model, tmp_path):
    rows = [{"answer": {"start": 0, "end": 3}}, {"words": ["one"]}, {}]
    text = "some longer words that could be misspelled"
    shards.write(tmp_path / "a.tar", [{"__key__": str(i), "txt": text, "json": row} for i, row in enumerate(rows)])
    change = Change("typos", lambda text, *_: text[::-1], 5, 0)
    changed = robustness.CorruptedCorpus(Corpus(Source(f"{tmp_path}/a.tar")), "text", model.tokenizers["text"], change)
    assert [changed.raw(i)["txt"].decode() for i in range(3)] == [text, text, text[::-1]] and changed.kept == 2


def test_the_drop_is_the_paired_difference(model, corpus, monkeypatch):
    """The figures of each strength are those of the changed corpus alone, and the drop their mean difference."""
    evaluation = Evaluation(
        f"{corpus}/validation-*.tar",
        modalities=["text", "image"],
        measure=["retrieval", "knn", "robustness"],
        corruptions=["contrast", "typos"],
        strengths=[1, 5],
    )
    figures, embedded = evaluate(model, {}, evaluation)
    plain = ("knn/image/accuracy", "retrieval/text_to_image/r@10", "retrieval/image_to_text/r@10")
    for name in plain:
        own = [figures[f"robustness/image/contrast/{strength}/{name}"]["value"] for strength in (1, 5)]
        drop = figures[f"robustness/image/contrast/{name}/drop"]
        assert drop["value"] == pytest.approx(figures[name]["value"] - np.mean(own))
        assert drop["low"] <= drop["value"] <= drop["high"] and drop["n"] == figures[name]["n"]
        assert figures[f"robustness/image/all/{name}/drop"] == drop
    assert "robustness/text/typos/5/knn/text/accuracy" in figures
    robust = [name for name in figures if name.startswith("robustness/")]
    assert not [name for name in robust if name.endswith(("r@1", "mrr")) or "image/contrast/1/knn/text" in name]
    view = corrupt_corpus(embedded, model, "image", Change("contrast", robustness.contrast, 5, 0))
    again = evaluate_view(view)
    assert figures["robustness/image/contrast/5/knn/image/accuracy"] == again["knn/image/accuracy"]
    assert evaluate(model, {}, evaluation)[0] == figures


def test_a_trained_head_is_measured_too(corpus, tmp_path):
    """By the samples of the changed corpus, which the head reads itself."""
    config = tiny(corpus, steps=20, save_every=20, run_dir=str(tmp_path / "run"))
    config["model"]["heads"]["classify"] = {"classes": ["0", "1", "2", "3"]}
    task = {"objectives": {"supervised": {}}, "modalities": ["image"], "batch_size": 8, "sources": {"all": 1}}
    config["tasks"] = {"colors": task, "pairs": config["tasks"]["pairs"]}
    loop.pretrain(build(config))
    model = load(tmp_path / "run")
    trained = objectives.load(checkpoint.newest(tmp_path / "run"), model)
    evaluation = Evaluation(
        f"{corpus}/validation-*.tar", measure=["heads", "robustness"], corruptions=["contrast", "typos"], strengths=[5]
    )
    figures, embedded = evaluate(model, trained, evaluation)
    view = corrupt_corpus(embedded, model, "image", Change("contrast", robustness.contrast, 5, 0))
    wanted = heads.Evaluator().run(view, heads.Config(), model, trained)["classify/accuracy"]["value"]
    assert figures["robustness/image/contrast/5/classify/accuracy"]["value"] == wanted
    drop = figures["robustness/image/contrast/classify/accuracy/drop"]
    assert drop["value"] == pytest.approx(figures["classify/accuracy"]["value"] - wanted) and drop["n"] == 16
    assert not [name for name in figures if name.startswith(("robustness/text", "robustness/audio"))]


def evaluate_view(view) -> dict:
    return knn.Evaluator().run(view, knn.Config())


@pytest.mark.parametrize(
    "changes, said",
    [({"corruptions": ["fog"]}, "no 'fog'; there are gaussian_noise"), ({"strengths": [6]}, "from 1 to 5")],
)
def test_corruptions_that_there_are_not(changes, said):
    with pytest.raises(UserError, match=said):
        robustness.check(Config(**changes))


def test_a_paired_bootstrap_against_brute_force():
    generator = np.random.default_rng(0)
    before, after, clusters = generator.random(60), generator.random(60) + 0.1, np.arange(60) // 3
    found = estimate_difference(before, after, clusters)
    difference = after - before
    means = [
        np.concatenate([difference[clusters == c] for c in generator.integers(0, 20, 20)]).mean() for _ in range(4000)
    ]
    assert found["value"] == pytest.approx(difference.mean())
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.012)
    assert found["p"] == pytest.approx(2 * min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0)), abs=0.02)
    assert found["detectable"] == pytest.approx(2.8 * np.std(means), rel=0.05)
    weights = generator.random(60) + 1
    assert estimate_difference(before, after, clusters, weights)["value"] == pytest.approx(
        difference.sum() / weights.sum()
    )


def test_scores_that_do_not_differ():
    found = estimate_difference(np.ones(100), np.ones(100))
    assert (found["value"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)
    assert found["detectable"] == pytest.approx(0.03)
