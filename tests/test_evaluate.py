"""What users call: embed and evaluate. Their figures against what can be worked out by hand."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import jpeg, samples, tiny, tone
from PIL import Image

from multimodal_fm import batch as batching
from multimodal_fm import load as load_model
from multimodal_fm import model as model_module
from multimodal_fm import objectives
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.errors import UserError, printable
from multimodal_fm.evals import bits_per_byte, knn, likelihood, metrics, probe, retrieval
from multimodal_fm.evals import embed_corpus as embedding
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.embed_corpus import EmbeddedCorpus, Inputs, embed_corpus
from multimodal_fm.evals.metrics import estimate, find_nearest, rank_first
from multimodal_fm.evals.run import evaluate, find_trained_on, load_evaluations, table
from multimodal_fm.run_dir import checkpoint, evaluations
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run") / "run"
    loop.pretrain(build({**tiny(corpus, steps=60, save_every=60), "run_dir": str(folder)}))
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


def by_hand(vectors: dict[str, list], sample_inputs: list[dict], rows: list[dict], tmp_path) -> EmbeddedCorpus:
    """An embedded corpus with given vectors."""
    shards.write(tmp_path / "hand.tar", [{"__key__": f"k{i}", "json": row} for i, row in enumerate(rows)])
    inputs = {}
    for modality, values in vectors.items():
        holders = [[i for i, own in enumerate(sample_inputs) if t in own.get(modality, [])] for t in range(len(values))]
        texts = [f"text {t}" for t in range(len(values))]
        values = torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float), dim=-1)
        inputs[modality] = Inputs(values, values, texts, holders)
    return EmbeddedCorpus(Corpus(Config(str(tmp_path / "hand.tar"))), inputs, rows, sample_inputs)


def retrieve(embedded: EmbeddedCorpus, **config) -> dict[str, dict]:
    return retrieval.Evaluator().run(embedded, retrieval.Config(**config))


def test_retrieval_by_hand(tmp_path):
    """Three texts, and two pictures of which one is shared: ranks, right answers and chance can be counted."""
    embedded = by_hand(
        {"text": [[1, 0], [0, 1], [0.6, 0.8]], "image": [[1, 0.1], [0.1, 1]]},
        [{"text": [0], "image": [0]}, {"text": [1], "image": [1]}, {"text": [2], "image": [0]}],
        [{"g": "a"}, {"g": "b"}, {"g": "c"}],
        tmp_path,
    )
    figures = retrieve(embedded, group="g")
    assert figures["retrieval/text_to_image/r@1"]["value"] == pytest.approx(2 / 3)  # the third is nearer to the other
    assert figures["retrieval/text_to_image/r@1"]["chance"] == pytest.approx(1 / 2)
    assert figures["retrieval/text_to_image/r@5"]["value"] == figures["retrieval/text_to_image/r@5"]["chance"] == 1
    assert figures["retrieval/text_to_image/median_rank"]["value"] == 1
    assert figures["retrieval/text_to_image/median_rank"]["chance"] == 1  # half of all guesses are right at once
    assert figures["retrieval/text_to_image/mrr"]["value"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert figures["retrieval/text_to_image/mrr"]["chance"] == pytest.approx(3 / 4)
    assert figures["retrieval/image_to_text/r@1"]["n"] == 2
    # the first picture has two right texts of three: a guess is right with 2/3, the second has one
    assert figures["retrieval/image_to_text/r@1"]["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_chance_is_what_guessing_gives(tmp_path):
    """A gallery of 3 and one of 20: by counting, and against shuffles."""
    assert retrieval.guess_curve(3, 1).tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert retrieval.guess_curve(3, 2).tolist() == pytest.approx([1, 1 / 3])
    generator = np.random.default_rng(0)
    for size, right in ((20, 1), (20, 3), (5, 5), (100, 7)):
        ranks = np.array([np.flatnonzero(generator.permutation(size) < right)[0] + 1 for _ in range(20_000)])
        constant = np.full(20_000, size), np.full(20_000, right)
        figures = retrieval._figures("x", ranks, *constant, np.arange(20_000) % 100)
        for k in (1, 5, 10):
            assert figures[f"x/r@{k}"]["chance"] == pytest.approx((ranks <= k).mean(), abs=0.012)
        assert figures["x/mrr"]["chance"] == pytest.approx((1 / ranks).mean(), abs=0.012)
        assert figures["x/median_rank"]["chance"] == pytest.approx(np.median(ranks), abs=1)


def test_a_model_that_sees_nothing_is_at_the_bottom(tmp_path):
    """Equal vectors are ties, and ties count against the query."""
    embedded = by_hand(
        {"text": [[1, 0]] * 8, "image": [[1, 0]] * 8},
        [{"text": [i], "image": [i]} for i in range(8)],
        [{} for _ in range(8)],
        tmp_path,
    )
    embedded.inputs["text"].texts[:] = [f"t{i}" for i in range(8)]
    figures = retrieve(embedded)
    assert (
        figures["retrieval/text_to_image/r@5"]["value"] == 0
        and figures["retrieval/text_to_image/median_rank"]["value"] == 8
    )


def test_vectors_that_are_no_numbers_are_at_the_bottom_too(tmp_path):
    embedded = by_hand(
        {"text": [[1, 0], [0, 1]], "image": [[1, 0], [0, 1]]},
        [{"text": [i], "image": [i]} for i in range(2)],
        [{"g": "a"}, {"g": "b"}],
        tmp_path,
    )
    embedded.inputs["image"].vectors[:] = torch.nan
    assert retrieve(embedded, group="g")["retrieval/text_to_image/r@1"]["value"] == 0


def test_within_keeps_the_gallery_to_its_share(tmp_path):
    rows = [{"language": "ab"[i % 2], "g": str(i // 2)} for i in range(8)]
    vectors = [[np.cos(i), np.sin(i)] for i in range(8)]
    embedded = by_hand(
        {"text": vectors, "audio": vectors}, [{"text": [i], "audio": [i]} for i in range(8)], rows, tmp_path
    )
    inside = retrieve(embedded, group="g", within="language")
    outside = retrieve(embedded, group="g")
    assert inside["retrieval/text_to_audio/r@1"]["chance"] == pytest.approx(1 / 4)
    assert outside["retrieval/text_to_audio/r@1"]["chance"] == pytest.approx(2 / 8)


def test_queries_that_cannot_miss_are_left_out(tmp_path):
    """Twelve texts and pictures in one language, ten in another, where R@10 misses one text and one picture or none."""
    vectors = [[np.cos(i), np.sin(i)] for i in range(22)]
    pictures = [vectors[i ^ 1] for i in range(22)]  # everything is nearest to its neighbour
    pictures[0], pictures[12] = [-v for v in vectors[0]], [-v for v in vectors[12]]  # and these two are furthest
    embedded = by_hand(
        {"text": vectors, "image": pictures},
        [{"text": [i], "image": [i]} for i in range(22)],
        [{"language": "a" if i < 12 else "b", "g": str(i)} for i in range(22)],
        tmp_path,
    )
    config = {"group": "g", "within": "language"}
    figures = retrieve(embedded, **config)
    ten = figures["retrieval/text_to_image/r@10"]
    assert ten["n"] == 12 and ten["value"] == pytest.approx(11 / 12) and ten["chance"] == pytest.approx(10 / 12)
    assert figures["retrieval/text_to_image/r@5"]["n"] == figures["retrieval/text_to_image/mrr"]["n"] == 22
    assert [row[-1] for row in table(figures)[1:]] == ["12 of 22"] * 2
    for vector in range(12):
        embedded.sample_inputs[vector].clear()  # now none can miss
    ten = retrieve(embedded, **config)["retrieval/text_to_image/r@10"]
    assert ten["n"] == 10 and ten["value"] == ten["chance"] == 1


def test_the_interval_is_over_groups():
    values = np.array([1.0, 0.0] * 50)
    alone = estimate(values, np.arange(100), None)
    in_two = estimate(values, np.arange(100) // 50, None)
    assert 0.3 < alone["low"] < 0.5 < alone["high"] < 0.7
    assert in_two["low"] == in_two["high"] == 0.5  # the two groups are alike
    split = estimate(np.sort(values), np.arange(100) // 50, None)
    assert (split["low"], split["high"]) == (0.0, 1.0)


def test_an_estimate_by_hand():
    one = estimate(np.array([2.0, 6.0]), np.arange(2), None, weights=np.array([1.0, 3.0]))
    assert (one["value"], one["low"], one["high"], one["n"]) == (2.0, 2.0, 2.0, 2)  # 8 / 4; each draw is 2 / 1 or 6 / 3
    assert estimate(np.array([9.0, 1.0, 2.0]), np.arange(3), 0.5, median=True)["value"] == 2
    one = estimate(np.array([5.0] + [0.0] * 10), np.array([0] + [1] * 10), None, median=True)
    assert (one["value"], one["low"], one["high"]) == (0, 0, 5)  # a quarter of all draws has the first cluster alone
    values = np.random.default_rng(1).normal(size=400)
    one = estimate(values, np.arange(400), None)
    error = values.std() / 20  # the interval of a mean is 1.96 standard errors wide on each side
    assert one["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert one["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    median = estimate(values, np.arange(400), None, median=True)
    assert median["low"] < median["value"] < median["high"] and median["high"] - median["low"] < 6 * error


def test_draws_in_blocks_are_the_same_draws(monkeypatch):
    values, clusters = np.random.default_rng(2).normal(size=50), np.arange(50) // 3
    whole = [estimate(values, clusters, None, median=median) for median in (False, True)]
    monkeypatch.setattr(metrics, "MAX_SCORES", 120)
    assert whole == [estimate(values, clusters, None, median=median) for median in (False, True)]


def test_nearest_and_ranks_in_blocks_are_those_of_one_block(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(37, 8, generator=generator), torch.randn(23, 8, generator=generator)
    right, excluded = torch.rand(37, 23, generator=generator) < 0.2, torch.rand(37, 23, generator=generator) < 0.5
    right[:, 5] = True
    scores = queries.double() @ gallery.double().T
    order = scores.argsort(1, descending=True)
    expected = 1 + right.gather(1, order).int().argmax(1)
    for most in (1 << 22, 50, 1):
        monkeypatch.setattr(metrics, "MAX_SCORES", most)
        assert all(block.numel() <= max(most, 23) for _, block in metrics.score_blocks(queries, gallery))
        ranks, counts = rank_first(queries, gallery, lambda rows: right[rows])
        assert (ranks == expected).all() and (counts == right.sum(1)).all()
        best, which = find_nearest(queries, gallery, 4, lambda rows: excluded[rows])
        assert torch.equal(which, scores.masked_fill(excluded, -torch.inf).argsort(1, descending=True)[:, :4])
        torch.testing.assert_close(best, scores.gather(1, which))
    assert find_nearest(queries, gallery, 99)[1].shape == (37, 23)
    gallery[3] = torch.nan
    assert (find_nearest(queries, gallery, 22)[1] != 3).all(), "what is not a number is found last"


def test_memory_does_not_grow_with_queries_times_gallery(tmp_path):
    """12,000 queries in a gallery of 12,000: all scores alone would take 1.1 GB."""
    count = 12_000
    angle = np.arange(count) / 100
    vectors = torch.tensor(np.stack([np.cos(angle), np.sin(angle)], 1), dtype=torch.float)
    shards.write(tmp_path / "a.tar", [{"__key__": "a", "txt": "a"}])
    holders = [[i] for i in range(count)]
    inputs = {name: Inputs(vectors, vectors, [f"t{i}" for i in range(count)], holders) for name in ("text", "image")}
    rows = [{"g": str(i % 3) if i % 2 else f"own {i}"} for i in range(count)]
    own = [{"text": [i], "image": [i]} for i in range(count)]
    embedded = EmbeddedCorpus(Corpus(Config(str(tmp_path / "a.tar"))), inputs, rows, own)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = retrieve(embedded, group="g")
    assert figures["retrieval/text_to_image/median_rank"]["n"] == count
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MB"


def labeled(features, labels, groups, tmp_path) -> EmbeddedCorpus:
    """An embedded corpus of pictures with given features, classes and groups."""
    rows = [{"label": str(label), "g": str(group)} for label, group in zip(labels, groups, strict=True)]
    return by_hand({"image": features}, [{"image": [i]} for i in range(len(rows))], rows, tmp_path)


def accuracy(evaluator, embedded: EmbeddedCorpus, **config) -> dict | None:
    module = sys.modules[type(evaluator).__module__]
    figures = evaluator.run(embedded, module.Config(labels="label", **config), None, {})
    return figures.get(f"{module.__name__.rpartition('.')[2]}/image/accuracy")


EVALUATORS = (knn.Evaluator(), probe.Evaluator())
ids = lambda evaluator: type(evaluator).__module__.rpartition(".")[2]  # noqa: E731


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=ids)
def test_groups_hold_where_they_are_no_more_than_the_labels(evaluator, tmp_path):
    """Four classes in three groups: an input's twins are in its own group, and nearest outside are other classes."""
    combinations = [(label, group) for label in range(4) for group in range(3)] * 4
    features = np.zeros((len(combinations), 16))
    for row, (label, group) in enumerate(combinations):
        features[row, 3 * label + group] = 1.0
        features[row, 12 + (label - group) % 4] = 0.6
    embedded = labeled(features.tolist(), *zip(*combinations, strict=True), tmp_path)
    assert accuracy(evaluator, embedded)["value"] == 1.0  # the twins tell
    honest = accuracy(evaluator, embedded, group="g")
    assert honest["value"] < 0.1 and honest["chance"] == 0.25 and honest["n"] == len(combinations)
    assert not embedded.notes


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=ids)
def test_grouping_that_leaves_nothing_to_learn_from_is_said(evaluator, tmp_path):
    features, labels = [[np.cos(i), np.sin(i)] for i in range(20)], [i % 4 for i in range(20)]
    (tmp_path / "few").mkdir()
    embedded = labeled(features, labels, labels, tmp_path)
    assert accuracy(evaluator, embedded, group="g") is None
    (note,) = embedded.notes
    assert note == (
        "no kNN and no probe: each of the 4 classes lies in one group of 'g', so there is nothing to learn it from"
    )
    few = labeled(features[:6], labels[:6], range(6), tmp_path / "few")
    assert accuracy(evaluator, few) is None and few.notes == [
        "image: no kNN and no probe: 6 labeled inputs of 4 classes are too few"
    ]


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=ids)
def test_only_classes_that_another_group_has_are_scored(evaluator, tmp_path):
    """Eight of class 0 and six of class 1, each in two groups; five of class 2 are all in one, and cannot be right."""
    labels, groups = [0] * 8 + [1] * 6 + [2] * 5, [0] * 4 + [1] * 4 + [2] * 3 + [3] * 3 + [4] * 5
    features = np.eye(3)[labels] + np.random.default_rng(0).normal(size=(19, 3)) * 0.01
    one = accuracy(evaluator, labeled(features.tolist(), labels, groups, tmp_path), group="g")
    assert (one["value"], one["n"], one["chance"]) == (1.0, 14, pytest.approx(8 / 14))


def test_nobody_votes_for_itself(tmp_path):
    """Twins of different classes: each one's nearest neighbor is wrong."""
    features = [[np.cos(i // 2), np.sin(i // 2), 0.001 * (i % 2)] for i in range(20)]
    embedded = labeled(features, [i % 2 for i in range(20)], range(20), tmp_path)
    assert accuracy(knn.Evaluator(), embedded, k=1)["value"] == 0.0


def test_nearer_neighbors_weigh_more_and_only_k_of_them_vote(tmp_path):
    """Twins on the corners of a simplex: each input's twin outvotes all others."""
    corners = np.eye(8)[np.arange(16) // 2]
    features = corners + 0.01 * np.random.default_rng(0).normal(size=corners.shape)
    labels = [1 if i // 2 in (0, 5, 6) else 0 for i in range(16)]
    embedded = labeled(features.tolist(), labels, range(16), tmp_path)
    for k in (1, 3, 15):
        weighted = accuracy(knn.Evaluator(), embedded, k=k)
        assert weighted["value"] == 1.0 and weighted["chance"] == pytest.approx(10 / 16), k
    (tmp_path / "circle").mkdir()
    circle = [[np.cos(i * np.pi / 100), np.sin(i * np.pi / 100)] for i in range(200)]
    embedded = labeled(circle, [i // 5 % 2 for i in range(200)], range(200), tmp_path / "circle")  # arcs of five
    assert accuracy(knn.Evaluator(), embedded, k=2)["value"] >= 0.6
    assert accuracy(knn.Evaluator(), embedded)["value"] < 0.1, "of ten neighbors six are of the arcs beside"
    embedded.inputs["image"].features[:] = torch.nan
    assert accuracy(knn.Evaluator(), embedded)["value"] == 0.0


def test_the_probe_is_scored_on_what_it_has_not_seen(tmp_path):
    """Random features and classes: a probe fits 60 inputs in 80 dimensions perfectly, and knows nothing of others."""
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(60, 80)).tolist(), generator.integers(0, 3, 60).tolist()
    assert accuracy(probe.Evaluator(), labeled(features, labels, range(60), tmp_path))["value"] < 0.55


def test_folds_cover_all_once_and_split_no_group():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 4, 100), generator.integers(0, 30, 100)
    folds = list(probe.split_folds(labels, groups, 5))
    assert len(folds) == 5 and sorted(np.concatenate([test for _, test in folds])) == list(range(100))
    for train, test in folds:
        assert len(train) + len(test) == 100 and not set(groups[train]) & set(groups[test])
    assert len(list(probe.split_folds(labels, groups % 3, 5))) == 3


def test_groups_are_obeyed_by_retrieval(tmp_path):
    """An answer of another group is wrong however near it is; one of several groups is right for each of them."""
    embedded = by_hand(
        {"text": [[1, 0], [0, 1]], "image": [[0, 1], [1, 0], [0.9, 0.1]]},
        [{"text": [0], "image": [0]}, {"text": [1], "image": [1]}, {"image": [0, 2]}],
        [{"g": "a"}, {"g": "b"}, {"g": "b"}],
        tmp_path,
    )
    figures = retrieve(embedded, group="g")
    assert figures["retrieval/text_to_image/mrr"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    one = figures["retrieval/text_to_image/r@1"]  # all that the second text could find is right
    assert (one["value"], one["chance"], one["n"]) == (0, pytest.approx(1 / 3), 1)


def uniform(run, model):
    """The causal objective, made to find every token equally likely."""
    objective = objectives.load(run, model)["next/causal"]
    for parameter in objective.predictors["text"].parameters():
        parameter.data.zero_()
    return objective


def test_bits_per_byte_by_hand(run, monkeypatch):
    """A model that finds all 300 tokens equally likely spends log2(300) bits on each token after the first."""
    model = load_model(run)
    objective, tokenizer = uniform(run, model), model.tokenizers["text"]
    texts = ["a red square " * 30, "x", "le rouge " * 10, "a blue square"]
    windows = [tokenizer.read(text) for text in texts]
    assert len(windows[0]) > 2 and len(windows[1]) == 1
    expected = [sum(len(window) - 1 for window in own) * np.log2(300) for own in windows]
    for budget in (16_384, 60):
        monkeypatch.setattr(bits_per_byte, "batch_by_tokens", lambda w, n=budget: batching.batch_by_tokens(w, n))
        bits, sizes = bits_per_byte.measure_bits(model, objective, texts)
        assert bits.tolist() == pytest.approx(expected, rel=1e-5)
        assert sizes.tolist() == [len(text.encode()) for text in texts]
    inputs = Inputs(torch.zeros(4, 1), torch.zeros(4, 1), texts, [[i] for i in range(4)])
    embedded = EmbeddedCorpus(None, {"text": inputs}, [], [])
    figures = bits_per_byte.Evaluator().run(embedded, bits_per_byte.Config(), model, {"next/causal": objective})
    assert figures["text/bits_per_byte"]["value"] == pytest.approx(sum(expected) / sum(map(len, texts)), rel=1e-5)


def test_bits_per_byte_reads_no_more_than_its_tokens_at_a_time(run):
    model, sizes = load_model(run), []
    forward = model.forward
    model.forward = lambda batch: sizes.append(len(batch.tokens)) or forward(batch)
    texts = ["a red square number one " * 400 for _ in range(16)]
    bits_per_byte.measure_bits(model, objectives.load(run, model)["next/causal"], texts)
    assert sum(sizes) > 20_000 and max(sizes) <= batching.MAX_TOKENS


def test_a_text_that_is_only_read_has_no_bits(tmp_path, corpus):
    """Pictures from captions: `prefix: [text]` predicts no text, so the first causal task is passed over."""
    data = tiny(corpus, steps=1, run_dir=str(tmp_path / "run"))
    draw = {"objectives": {"causal": {"fuse": True, "prefix": ["text"]}}, "modalities": ["text", "image"]}
    draw |= {"batch_size": 4, "sources": ["all"]}
    data["tasks"] = {"draw": draw, **data["tasks"]}
    loop.pretrain(build(data))
    model = load_model(tmp_path / "run")
    evaluation = Evaluation(f"{corpus}/validation-*.tar", modalities=["text"])
    trained = objectives.load(tmp_path / "run", model)
    figures, _ = evaluate(model, trained, evaluation)
    assert figures["text/bits_per_byte"]["n"] == 16
    trained.pop("next/causal")
    assert "text/bits_per_byte" not in evaluate(model, trained, evaluation)[0]


def test_media_stay_in_the_corpus_and_little_waits_to_be_embedded(model, corpus, monkeypatch):
    source = Corpus(Config(f"{corpus}/validation-*.tar"))
    whole, calls = embed_corpus(model, source), []
    vectors = type(model).embed_sequences
    monkeypatch.setattr(embedding, "MAX_TOKENS", 40)
    monkeypatch.setattr(
        type(model),
        "embed_sequences",
        lambda self, modality, inputs: calls.append(inputs) or vectors(self, modality, inputs),
    )
    embedded = embed_corpus(model, source)
    assert embedded.field(0, "color") and not calls and not embedded.is_read, "nothing before somebody asks"
    assert (
        embedded.inputs
        and len(calls) == 9
        and all(sum(len(s) for own in inputs[:-1] for s in own) < 40 for inputs in calls)
    )
    for modality, inputs in whole.inputs.items():
        torch.testing.assert_close(embedded.inputs[modality].vectors, inputs.vectors, rtol=0, atol=1e-5)
        assert all((text is None) == (modality != "text") for text in inputs.texts)
    assert embedded.load(model, "image", 3) == {"jpg": samples(16, 100)[3]["jpg"]}
    assert embedded.load(model, "audio", 1) == {"flac": samples(16, 100)[1]["flac"]}
    assert embedded.load(model, "text", 2) == "a blue square number 102"


def test_a_gallery_holds_each_input_once_and_bad_parts_are_named(model, tmp_path):
    made = samples(8)
    made[4]["jpg"] = made[0]["jpg"]
    made[5]["jpg"] = b"<html>"
    shards.write(tmp_path / "a.tar", made)
    embedded = embed_corpus(model, Corpus(Config(str(tmp_path / "a.tar"))))
    assert len(embedded.inputs["image"].texts) == 6 and embedded.inputs["image"].samples[0] == [0, 4]
    assert len(embedded.inputs["audio"].texts) == 4, "tones of one color are one sound"
    assert [(r["key"], r["part"], r["reason"]) for r in embedded.skipped] == [("sample0005", "image", "decode")]


def test_a_trained_model_is_better_than_chance(run, model, corpus):
    figures, embedded = evaluate(
        model, objectives.load(run, model), Evaluation(f"{corpus}/validation-*.tar", group="color")
    )
    assert not [name for name in figures if name.startswith(("knn/", "probe/"))], "each class is one color"
    assert "no kNN and no probe: each of the 4 classes lies in one group of 'color'" in embedded.notes[0]
    for direction in ("text_to_image", "image_to_text", "audio_to_image", "text_to_audio"):
        one = figures[f"retrieval/{direction}/mrr"]
        assert one["value"] > 1.2 * one["chance"], direction
    figures, embedded = evaluate(model, objectives.load(run, model), Evaluation(f"{corpus}/validation-*.tar"))
    assert figures["probe/image/accuracy"]["value"] > 0.8 > figures["probe/image/accuracy"]["chance"]
    assert {"knn/image/accuracy", "knn/text/accuracy", "probe/text/accuracy"} <= figures.keys()
    bits = figures["text/bits_per_byte"]
    assert 0.1 < bits["value"] < 8 and bits["low"] <= bits["value"] <= bits["high"] and bits["chance"] is None


def test_the_commands(mmfm, run, corpus, tmp_path):
    shard = corpus / "validation-0.tar"
    fields = ("--group", "color", "--within", "language", "--labels", "color")
    done = mmfm("evaluate", run, "--on", shard, "--json", *fields)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert "no kNN and no probe" in done.stderr and "knn/image/accuracy" not in figures
    assert {"value", "low", "high", "chance", "n", "seed"} == figures["retrieval/text_to_image/r@10"].keys()
    kept = evaluations.read(run)[str(shard)]
    assert (kept["on"], kept["step"], kept["seed"]) == ([str(shard)], 60, 0) and kept["notes"]
    assert {name: {**figure, "seed": 0} for name, figure in kept["figures"].items()} == figures
    assert {"retrieval/audio_to_image/median_rank", "text/bits_per_byte"} <= figures.keys()
    done = mmfm("evaluate", run, "--on", shard, "--where", "language=en", "--modalities", "text", "image")
    assert "text → image" in done.stdout and "audio" not in done.stdout
    for words in (
        ("evaluate", run, "--on", shard, "--group", "nothing"),
        ("evaluate", run, "--on", shard, "--where", "x"),
        ("evaluate", run),
        ("evaluate", run, "--on", shard, "--modalities", "smell"),
    ):
        done = mmfm(*words)
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("mmfm: ")


def test_what_was_trained_on_is_said_beside_the_score(mmfm, run, model, corpus, tmp_path):
    folder = checkpoint.newest(run)
    trained = objectives.load(run, model)
    figures, embedded = evaluate(model, trained, Evaluation(f"{corpus}/train-1.tar", modalities=["text"]), folder)
    assert all(figure["trained_on"] for figure in figures.values())
    assert embedded.notes[-1].startswith(f"the model was trained on {corpus}/train-1.tar: these figures say nothing")
    evaluation = Evaluation(f"{corpus}/validation-*.tar", modalities=["text"])
    figures, embedded = evaluate(model, trained, evaluation, folder)
    assert not any("trained" in note for note in embedded.notes) and "trained_on" not in figures["text/bits_per_byte"]
    for name in ("train-0.tar", "train-1.tar"):  # moved: known by what they hold
        shutil.copy(corpus / name, tmp_path)
    assert len(find_trained_on(Corpus(Config(f"{tmp_path}/train-*.tar")), folder)) == 2
    done = mmfm("evaluate", run, "--on", corpus / "train-0.tar", "--modalities", "text")
    assert "note: the model was trained on" in done.stdout


def test_samples_that_training_left_out_were_not_trained_on(tmp_path):
    shards.write(tmp_path / "a.tar", [{"__key__": str(i), "json": {"role": "ab"[i % 2]}} for i in range(4)])
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source = {"shards": f"{tmp_path}/*.tar", "where": {"role": "a"}}
    (folder / "config.json").write_text(json.dumps({"sources": {"x": source}}))
    (folder / "state.json").write_text(json.dumps({"data": {"x": "?"}}))
    for where, seen in (({"role": "a"}, 1), ({"role": "b"}, 0), ({}, 1)):
        assert len(find_trained_on(Corpus(Config(f"{tmp_path}/a.tar", where=where)), folder)) == seen


def forge(run, folder, **changes):
    """A stranger's run: another's checkpoint with another config, whole by its manifest."""
    shutil.copytree(run, folder)
    newest = checkpoint.newest(folder)
    config = checkpoint.read_data(newest, "config") | changes
    (newest / "config.json").write_text(json.dumps(config))
    listing = json.loads((newest / "MANIFEST.json").read_text())
    data = (newest / "config.json").read_bytes()
    listing["config.json"] = {"bytes": len(data), "sha256": checkpoint._hash(newest / "config.json")}
    (newest / "MANIFEST.json").write_text(json.dumps(listing))
    assert not checkpoint.verify(newest)
    return folder


def test_a_strangers_config_names_nothing_that_is_read(mmfm, run, corpus, tmp_path, monkeypatch):
    shards.write(tmp_path / "private.tar", samples(12))
    (tmp_path / "theirs.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\nfrom multimodal_fm.evals.base import Evaluator"
    )
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = Evaluation(str(tmp_path / "private.tar"), modalities=["text", "image"], evaluators=["theirs"])
    stranger = forge(run, tmp_path / "stranger", evaluate={"x": dataclasses.asdict(evaluation)})
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in ("evaluate", "report"):
        done = mmfm(command, stranger)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not trained here by you" in done.stderr
        assert "--trust" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "no index, nothing imported"
    own = forge(run, tmp_path / "given")
    assert mmfm("evaluate", own, "--on", corpus / "validation-0.tar", "--modalities", "text").returncode == 0
    with pytest.raises(UserError, match="trust"):
        load_evaluations(checkpoint.newest(stranger))
    assert load_evaluations(checkpoint.newest(stranger), trusted=True) == {"x": evaluation}
    mmfm("evaluate", stranger, "--trust")
    assert (tmp_path / "imported").exists(), "it could have been imported"


def test_a_run_is_its_users_wherever_it_lies(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))
    evaluate_ = {"x": {"on": f"{corpus}/validation-0.tar", "modalities": ["text"]}}
    loop.pretrain(build({**tiny(corpus, steps=1, evaluate=evaluate_), "run_dir": str(tmp_path / "run")}))
    (tmp_path / "run").rename(tmp_path / "moved")
    newest = checkpoint.newest(tmp_path / "moved")
    assert load_evaluations(newest)["x"].modalities == ["text"]
    (key,) = (tmp_path / "cache").glob("key-*")
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)  # a key that others may know proves nothing
    with pytest.raises(UserError, match="trust"):
        load_evaluations(newest)
    key.chmod(0o600)
    assert load_evaluations(newest)
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "anothers"))
    with pytest.raises(UserError, match="trust"):
        load_evaluations(newest)


def test_an_evaluator_from_elsewhere(run, model, corpus, tmp_path, monkeypatch):
    """A file that nobody knows measures too; it is given the settings that its Config has."""
    (tmp_path / "my_evaluator.py").write_text(
        """
from dataclasses import dataclass
from multimodal_fm.evals import base

@dataclass
class Config:
    labels: str = ""

class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded, config, model, objectives):
        count = len(embedded.metadata)
        return {f"mine/{config.labels}/count": dict(value=count, low=count, high=count, chance=None, n=count)}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = Evaluation(f"{corpus}/validation-*.tar", labels="color", evaluators=["my_evaluator"])
    figures, _ = evaluate(model, objectives.load(run, model), evaluation)
    assert figures["mine/color/count"]["value"] == 16 and "probe/image/accuracy" in figures
    assert any("mine color count" in row for row in table(figures))
    with pytest.raises(UserError, match="no_such_evaluator"):
        evaluate(model, {}, dataclasses.replace(evaluation, evaluators=["no_such_evaluator"]))


def test_half_precision_changes_little(run, model, corpus, monkeypatch):
    """As on a GPU: the tensors that come back are float32, and near to those of float32."""
    source = Corpus(Config(f"{corpus}/validation-*.tar"))
    whole = embed_corpus(model, source)
    texts, objective = whole.inputs["text"].texts, objectives.load(run, model)["next/causal"]
    bits = bits_per_byte.measure_bits(model, objective, texts)[0]
    for module in (model_module, likelihood):
        monkeypatch.setattr(module, "autocast", lambda device, enabled: torch.autocast("cpu", torch.bfloat16))
    half = embed_corpus(model, source)
    for modality, inputs in half.inputs.items():
        assert inputs.vectors.dtype == inputs.features.dtype == torch.float32
        assert not torch.equal(inputs.vectors, whole.inputs[modality].vectors)
        torch.testing.assert_close(inputs.vectors, whole.inputs[modality].vectors, rtol=0, atol=0.05)
    half = bits_per_byte.measure_bits(model, objective, texts)[0]
    assert half == pytest.approx(bits, rel=0.05)


def test_the_settings_of_an_evaluation_need_no_torch():
    code = "import sys, multimodal_fm.evals.base; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


ESCAPE = "a \x1b[31mred\x1b[0m \x9b2J square\u202e \r\u200d"


def test_printable():
    assert printable(ESCAPE) == r"a \x1b[31mred\x1b[0m \x9b2J square\u202e \r" + "\u200d"
    assert printable("שלום, 日本 😀\n") == "שלום, 日本 😀\\n" and printable("\ud800") == "\\ud800"
