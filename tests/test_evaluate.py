"""What users call: embed, evaluate, search. Their figures against what can be worked out by hand."""

import json

import numpy as np
import pytest
import torch
from conftest import jpeg, samples, tiny, tone
from PIL import Image
from test_config import mmfm

from multimodal_fm import load as load_model
from multimodal_fm.config import Evaluation, build
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.evals import retrieval
from multimodal_fm.evals.embed_corpus import Encoded, Things, encode, figure
from multimodal_fm.evals.run import evaluate, table
from multimodal_fm.train import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run") / "run"
    loop.pretrain(build({**tiny(corpus, steps=60, save_every=60), "run": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run)


def test_embed_takes_all_that_it_says(model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "a.flac").write_bytes(tone(440))
    picture = Image.open(tmp_path / "a.jpg")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found = model.embed(
        text=["a red square", "something else entirely"],
        image=[tmp_path / "a.jpg", str(tmp_path / "a.jpg"), picture, tensor, tensor.float() / 255],
        audio=[str(tmp_path / "a.flac"), (torch.randn(2, 30_000), 22_050), (np.zeros(100, dtype=np.float32), 8_000)],
    )
    assert {k: tuple(v.shape) for k, v in found.items()} == {"text": (2, 32), "image": (5, 32), "audio": (3, 32)}
    for vectors in found.values():
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    for same in found["image"][1:]:
        torch.testing.assert_close(same, found["image"][0], rtol=0, atol=1e-5)


def test_a_vector_does_not_depend_on_its_company(model):
    long = (torch.randn(16_000 * 5, generator=torch.Generator().manual_seed(0)), 16_000)
    alone = model.embed(audio=[long])["audio"][0]
    torch.testing.assert_close(
        model.embed(audio=[(torch.ones(900), 16_000), long])["audio"][1], alone, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ({"text": "a red square"}, "give a list"),
        ({"image": ["no-such-file.jpg"]}, "no-such-file.jpg"),
        ({"text": [""]}, r"text\[0\]"),
        ({"smell": ["x"]}, "text, image, audio"),
        ({"text": []}, "empty"),
    ],
)
def test_embed_says_what_it_cannot_read(model, given, said):
    with pytest.raises(UserError, match=said):
        model.embed(**given)


def by_hand(vectors: dict[str, list], held: list[dict], rows: list[dict], tmp_path) -> Encoded:
    """An encoded corpus with given vectors."""
    shards.write(tmp_path / "hand.tar", [{"__key__": f"k{i}", "json": row} for i, row in enumerate(rows)])
    things = {}
    for modality, values in vectors.items():
        owners = [[i for i, one in enumerate(held) if t in one.get(modality, [])] for t in range(len(values))]
        raw = [f"text {t}" for t in range(len(values))]
        values = torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float), dim=-1)
        things[modality] = Things(values, values, raw, owners)
    return Encoded(Corpus(Config(str(tmp_path / "hand.tar"))), things, rows, held)


def test_retrieval_by_hand(tmp_path):
    """Three texts, and two pictures of which one is shared: ranks, right answers and chance can be counted."""
    encoded = by_hand(
        {"text": [[1, 0], [0, 1], [0.6, 0.8]], "image": [[1, 0.1], [0.1, 1]]},
        [{"text": [0], "image": [0]}, {"text": [1], "image": [1]}, {"text": [2], "image": [0]}],
        [{"g": "a"}, {"g": "b"}, {"g": "c"}],
        tmp_path,
    )
    figures = retrieval.run(encoded, retrieval.Config(group="g"))
    assert figures["retrieval/text_to_image/r@1"]["value"] == pytest.approx(2 / 3)  # the third is nearer to the other
    assert figures["retrieval/text_to_image/r@1"]["chance"] == pytest.approx(1 / 2)
    assert figures["retrieval/text_to_image/r@5"]["value"] == figures["retrieval/text_to_image/r@5"]["chance"] == 1
    assert figures["retrieval/text_to_image/median_rank"]["value"] == 1
    assert figures["retrieval/text_to_image/mrr"]["value"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert figures["retrieval/text_to_image/mrr"]["chance"] == pytest.approx(3 / 4)
    assert figures["retrieval/image_to_text/r@1"]["n"] == 2
    # the first picture has two right texts of three: a guess is right with 2/3, the second has one
    assert figures["retrieval/image_to_text/r@1"]["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_chance_is_what_guessing_gives():
    generator = np.random.default_rng(0)
    for size, right in ((20, 1), (20, 3), (5, 5), (100, 7)):
        ranks = np.array([np.flatnonzero(generator.permutation(size) < right)[0] + 1 for _ in range(20_000)])
        late = retrieval._guess(size, right)
        for k in (1, 5, 10):
            assert retrieval._at(late, k) == pytest.approx((ranks <= k).mean(), abs=0.012)
        assert retrieval._reciprocal(size, right) == pytest.approx((1 / ranks).mean(), abs=0.012)


def test_a_model_that_sees_nothing_is_at_the_bottom(tmp_path):
    """Equal vectors are ties, and ties count against the query."""
    encoded = by_hand(
        {"text": [[1, 0]] * 8, "image": [[1, 0]] * 8},
        [{"text": [i], "image": [i]} for i in range(8)],
        [{} for _ in range(8)],
        tmp_path,
    )
    encoded.things["text"].raw[:] = [f"t{i}" for i in range(8)]
    figures = retrieval.run(encoded, retrieval.Config())
    assert (
        figures["retrieval/text_to_image/r@5"]["value"] == 0
        and figures["retrieval/text_to_image/median_rank"]["value"] == 8
    )


def test_vectors_that_are_no_numbers_are_at_the_bottom_too(tmp_path):
    encoded = by_hand(
        {"text": [[1, 0], [0, 1]], "image": [[1, 0], [0, 1]]},
        [{"text": [i], "image": [i]} for i in range(2)],
        [{"g": "a"}, {"g": "b"}],
        tmp_path,
    )
    encoded.things["image"].vectors[:] = torch.nan
    assert retrieval.run(encoded, retrieval.Config(group="g"))["retrieval/text_to_image/r@1"]["value"] == 0


def test_within_keeps_the_gallery_to_its_share(tmp_path):
    rows = [{"language": "ab"[i % 2], "g": str(i // 2)} for i in range(8)]
    vectors = [[np.cos(i), np.sin(i)] for i in range(8)]
    encoded = by_hand(
        {"text": vectors, "audio": vectors}, [{"text": [i], "audio": [i]} for i in range(8)], rows, tmp_path
    )
    inside = retrieval.run(encoded, retrieval.Config(group="g", within="language"))
    outside = retrieval.run(encoded, retrieval.Config(group="g"))
    assert inside["retrieval/text_to_audio/r@1"]["chance"] == pytest.approx(1 / 4)
    assert outside["retrieval/text_to_audio/r@1"]["chance"] == pytest.approx(2 / 8)


def test_queries_that_cannot_miss_are_left_out(tmp_path):
    """Twelve texts and pictures in one language, ten in another, where R@10 misses one text and one picture or none."""
    vectors = [[np.cos(i), np.sin(i)] for i in range(22)]
    pictures = [vectors[i ^ 1] for i in range(22)]  # everything is nearest to its neighbour
    pictures[0], pictures[12] = [-v for v in vectors[0]], [-v for v in vectors[12]]  # and these two are furthest
    encoded = by_hand(
        {"text": vectors, "image": pictures},
        [{"text": [i], "image": [i]} for i in range(22)],
        [{"language": "a" if i < 12 else "b", "g": str(i)} for i in range(22)],
        tmp_path,
    )
    config = retrieval.Config(group="g", within="language")
    figures = retrieval.run(encoded, config)
    ten = figures["retrieval/text_to_image/r@10"]
    assert ten["n"] == 12 and ten["value"] == pytest.approx(11 / 12) and ten["chance"] == pytest.approx(10 / 12)
    assert figures["retrieval/text_to_image/r@5"]["n"] == figures["retrieval/text_to_image/mrr"]["n"] == 22
    assert [row[-1] for row in table(figures)[1:]] == ["12 of 22"] * 2
    for vector in range(12):
        encoded.held[vector].clear()  # now none can miss
    ten = retrieval.run(encoded, config)["retrieval/text_to_image/r@10"]
    assert ten["n"] == 10 and ten["value"] == ten["chance"] == 1


def test_the_interval_is_over_groups():
    values = np.array([1.0, 0.0] * 50)
    alone = figure(values, np.arange(100), None)
    in_two = figure(values, np.arange(100) // 50, None)
    assert 0.3 < alone["low"] < 0.5 < alone["high"] < 0.7
    assert in_two["low"] == in_two["high"] == 0.5  # the two groups are alike
    split = figure(np.sort(values), np.arange(100) // 50, None)
    assert (split["low"], split["high"]) == (0.0, 1.0)


def test_a_gallery_holds_each_thing_once_and_bad_parts_are_named(model, tmp_path):
    made = samples(8)
    made[4]["jpg"] = made[0]["jpg"]
    made[5]["jpg"] = b"<html>"
    shards.write(tmp_path / "a.tar", made)
    encoded = encode(model, Corpus(Config(str(tmp_path / "a.tar"))))
    assert len(encoded.things["image"].raw) == 6 and encoded.things["image"].samples[0] == [0, 4]
    assert len(encoded.things["audio"].raw) == 4, "tones of one color are one sound"
    assert [(r["key"], r["part"], r["reason"]) for r in encoded.lost] == [("sample0005", "image", "decode")]


def test_a_trained_model_is_better_than_chance(model, corpus):
    figures, encoded = evaluate(model, Evaluation(f"{corpus}/validation-*.tar", group="color"))
    for direction in ("text_to_image", "image_to_text", "audio_to_image", "text_to_audio"):
        one = figures[f"retrieval/{direction}/mrr"]
        assert one["value"] > 1.2 * one["chance"], direction
    assert figures["probe/image/accuracy"]["value"] > 0.8 > figures["probe/image/accuracy"]["chance"]
    assert {"knn/image/accuracy", "knn/text/accuracy", "probe/text/accuracy"} <= figures.keys()
    bits = figures["text/bits_per_byte"]
    assert 0.1 < bits["value"] < 8 and bits["low"] <= bits["value"] <= bits["high"] and bits["chance"] is None


def test_the_commands(run, corpus, tmp_path):
    shard = corpus / "validation-0.tar"
    done = mmfm(
        "evaluate", run, "--on", shard, "--group", "color", "--within", "language", "--json", "--labels", "color"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {"value", "low", "high", "chance", "n"} == figures["retrieval/text_to_image/r@10"].keys()
    assert {"retrieval/audio_to_image/median_rank", "knn/image/accuracy", "text/bits_per_byte"} <= figures.keys()
    done = mmfm("evaluate", run, "--on", shard, "--where", "language=en", "--modalities", "text", "image")
    assert "text → image" in done.stdout and "audio" not in done.stdout
    (tmp_path / "red.jpg").write_bytes(jpeg("red"))
    for words in (
        ["a red square", "--in", shard],
        ["--in", shard, "a red square"],
        ["--image", tmp_path / "red.jpg", "--in", shard],
    ):
        done = mmfm("search", run, *words, "--top", "3")
        assert done.returncode == 0, done.stderr
        assert (
            all(modality in done.stdout for modality in ("text", "image", "audio"))
            and done.stdout.count("sample01") == 9
        )
    for words in (
        ("evaluate", run, "--on", shard, "--group", "nothing"),
        ("evaluate", run, "--on", shard, "--where", "x"),
        ("evaluate", run),
        ("evaluate", run, "--on", shard, "--modalities", "smell"),
        ("search", run, "--in", shard),
        ("search", run, "a", "--in", "nothing.tar"),
    ):
        done = mmfm(*words)
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("mmfm: ")
