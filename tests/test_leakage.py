"""The leakage audit: planted copies are found, nothing else is, and the scores without them are those of the rest."""

import io

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

from multimodal_fm import load as load_model
from multimodal_fm.corpus import shards
from multimodal_fm.evals import leakage
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.run import evaluate
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

WORDS = ["red", "green", "house", "river", "cloud", "apple", "stone", "bird", "light", "winter", "music", "paper"]
PLANTED = {"exact": 6, "near": 6}


def picture(seed: int) -> Image.Image:
    """Blobs of color that no two seeds share, 80 x 80."""
    values = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((80, 80), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def sentence(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 12))


def sample(seed: int, **changes) -> dict:
    """A picture and a sentence with a label that has nothing to do with them."""
    label = str(np.random.default_rng(seed + 10**6).integers(4))
    made = {"__key__": f"s{seed}", "png": encode(picture(seed)), "txt": sentence(seed), "cls": label}
    return made | changes


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run on 120 samples, and a test set of 40, of which six are copies of these and six nearly so."""
    folder = tmp_path_factory.mktemp("planted")
    shards.write(folder / "train-0.tar", [sample(seed) for seed in range(120)])
    test = [sample(1000 + seed) for seed in range(28)]
    test += [sample(seed, __key__=f"copy{seed}") for seed in range(6)]
    for seed in range(6, 12):
        data, text = encode(picture(seed), "JPEG", quality=60), f"  {sentence(seed).upper()} "
        test.append({"__key__": f"near{seed}", "jpg": data, "txt": text, "cls": sample(seed)["cls"]})
    shards.write(folder / "test.tar", test)
    config = tiny(folder, steps=2, save_every=2, run_dir=str(folder / "run"))
    config["sources"] = {"mine": {"shards": f"{folder}/train-*.tar"}}
    for task in config["tasks"].values():
        task["sources"] = {"mine": 1}
        task["modalities"] = [modality for modality in task["modalities"] if modality != "audio"]
    config["tasks"]["looks"]["objectives"]["masked"].pop("mask_ratio")
    config["model"]["tokenizers"].pop("audio")
    loop.pretrain(build(config))
    return folder


@pytest.fixture(scope="module")
def measured(planted):
    run = checkpoint.newest(planted / "run")
    evaluation = Evaluation(
        str(planted / "test.tar"), train=str(planted / "train-0.tar"), measure=["knn", "retrieval", "leakage"]
    )
    return evaluate(load_model(run), {}, evaluation, run)


def test_planted_copies_are_found(measured):
    figures, embedded = measured
    for modality in ("image", "text"):
        for kind, count in PLANTED.items():
            figure = figures[f"leakage/{modality}/{kind}"]
            assert figure["count"] == count and figure["value"] == pytest.approx(count / 40) and figure["n"] == 40
            assert figure["searched"] == 2 * 120  # as `train`, and as the source of the run
            assert {one["train"] for one in figure["first"]} <= {f"s{seed}" for seed in range(12)}
            assert all(one["test"][4:] == one["train"][1:] for one in figure["first"])
        assert figures[f"leakage/{modality}/embedding"]["count"] <= 2
    assert any(note.startswith("leakage/image/exact: 6 of 40 test inputs: copy0 = s0 of ") for note in embedded.notes)


def test_the_score_without_them_is_that_of_the_rest(measured):
    """A leaked picture's nearest neighbor is itself, with its label; the others' labels cannot be told."""
    figures, embedded = measured
    name = "knn/image/accuracy"
    scores, without = embedded.scores[name], figures[f"leakage/{name}/without_leaks"]
    embedding = figures["leakage/image/embedding"]["count"]
    assert without["n"] == 28 - embedding and without["left_out"] == 12 + embedding
    rest = [v for v, s in zip(scores.values, scores.samples) if not embedded.key(s).startswith(("copy", "near"))]
    leaked = [v for v, s in zip(scores.values, scores.samples) if embedded.key(s).startswith(("copy", "near"))]
    if not embedding:
        assert without["value"] == pytest.approx(np.mean(rest))
    assert np.mean(leaked) > 0.75 > np.mean(rest) and without["value"] < figures[name]["value"] - 0.1
    assert without["low"] <= without["chance"] <= without["high"]
    both = figures["leakage/retrieval/text_to_image/r@10/without_leaks"]
    assert both["left_out"] == without["left_out"]


def test_data_of_which_nothing_leaked_is_clean(planted):
    run = checkpoint.newest(planted / "run")
    shards.write(planted / "clean.tar", [sample(5000 + seed) for seed in range(30)])
    evaluation = Evaluation(str(planted / "clean.tar"), measure=["retrieval", "leakage"])
    figures, _ = evaluate(load_model(run), {}, evaluation, run)
    for modality in ("image", "text"):
        assert figures[f"leakage/{modality}/exact"]["count"] == figures[f"leakage/{modality}/near"]["count"] == 0
        assert figures[f"leakage/{modality}/embedding"]["count"] <= 2
        assert figures[f"leakage/{modality}/embedding"]["chance"] == pytest.approx(0.001)


def test_a_text_alone_is_no_leak_of_a_pair(planted):
    """The captions occur in training, the pictures do not: the pairs stay, the texts are reported."""
    run = checkpoint.newest(planted / "run")
    shards.write(planted / "captions.tar", [sample(7000 + seed, txt=sentence(seed)) for seed in range(20)])
    evaluation = Evaluation(str(planted / "captions.tar"), measure=["retrieval", "knn", "leakage"])
    figures, embedded = evaluate(load_model(run), {}, evaluation, run)
    assert figures["leakage/text/exact"]["count"] == 20 and figures["leakage/image/exact"]["count"] == 0
    name = "leakage/retrieval/image_to_text/r@10/without_leaks"
    assert figures.get(name, {"left_out": 0})["left_out"] == figures["leakage/image/embedding"]["count"]
    assert any("knn/text/accuracy: all 20" in note for note in embedded.notes)


def test_embedding_copies_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    test[7] = train[11] + 0.02 * torch.randn(16, generator=generator)
    excess, rows = leakage.find_copies(test, train)
    assert rows[7] == 11 and excess.argmax() == 7 and 1 <= (excess > 0).sum() <= 3
    unit = torch.nn.functional.normalize(train - train.mean(0), dim=1).double()
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    queries = torch.nn.functional.normalize(test - train.mean(0), dim=1).double()
    wanted = (queries @ unit.T).amax(1) - torch.quantile(cosines.amax(1), 0.999)
    torch.testing.assert_close(excess, wanted)


def test_a_planted_embedding_copy_in_a_corpus(planted, tmp_path):
    """Pictures below 64 pixels have no perceptual hash: of those that differ in a bit or two the model tells."""
    pictures = [picture(seed).resize((40, 40)) for seed in range(150)]
    changed = [Image.fromarray(np.asarray(one) ^ 1) for one in pictures[:5]]
    others = [picture(3000 + seed).resize((40, 40)) for seed in range(15)]
    shards.write(tmp_path / "train.tar", [{"__key__": f"t{i}", "png": encode(p)} for i, p in enumerate(pictures)])
    shards.write(
        tmp_path / "test.tar", [{"__key__": f"x{i}", "png": encode(p)} for i, p in enumerate(changed + others)]
    )
    evaluation = Evaluation(str(tmp_path / "test.tar"), measure=["leakage"], trained_on=[str(tmp_path / "train.tar")])
    figures, embedded = evaluate(load_model(planted / "run"), {}, evaluation)
    assert figures["leakage/image/exact"]["count"] == 0 and "leakage/image/near" not in figures
    assert any("near: not measured: images below 64 pixels" in note for note in embedded.notes)
    found = figures["leakage/image/embedding"]
    assert {("x" + str(i), "t" + str(i)) for i in range(5)} <= {(o["test"], o["train"]) for o in found["first"]}
    assert found["count"] <= 6


def test_a_strangers_sources_are_not_read(planted, monkeypatch, tmp_path):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "anothers"))
    run = checkpoint.newest(planted / "run")
    figures, embedded = evaluate(load_model(run), {}, Evaluation(str(planted / "test.tar"), measure=["leakage"]), run)
    assert not figures and any("not trained here by you" in note for note in embedded.notes)
    assert any("not measured: what the model was trained on is not known" in note for note in embedded.notes)


def test_sources_of_the_start_count_too_and_missing_ones_are_named(planted, corpus, tmp_path):
    config = tiny(corpus, steps=1, save_every=1, run_dir=str(tmp_path / "second"), init=str(planted / "run"))
    config["tasks"] = {"words": config["tasks"]["words"]}
    (tmp_path / "gone").mkdir()
    for file in corpus.glob("train-*.tar"):
        (tmp_path / "gone" / file.name).write_bytes(file.read_bytes())
    config["sources"]["all"]["shards"] = str(tmp_path / "gone" / "train-*.tar")
    loop.pretrain(build(config))
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    run = checkpoint.newest(tmp_path / "second")
    evaluation = Evaluation(str(planted / "test.tar"), modalities=["text"], measure=["leakage"])
    figures, embedded = evaluate(load_model(run), {}, evaluation, run)
    assert figures["leakage/text/exact"]["count"] == 6
    assert figures["leakage/text/exact"]["first"][0]["source"] == f"mine of {planted / 'run'}"
    assert any(note.startswith("leakage: not compared with all: ") for note in embedded.notes)
