"""Each evaluation against a second, independent computation: a library, or brute force."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny
from test_evaluate import by_hand

from multimodal_fm import load as load_model
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.evals import embedding_space, knn, probe, retrieval, subgroups, task_metrics, zero_shot
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.embed_corpus import EmbeddedCorpus, Scores
from multimodal_fm.evals.run import evaluate, load_suite
from multimodal_fm.run_dir import checkpoint, evaluations
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

SHAPE = (300, 4)


@pytest.fixture(scope="module")
def predictions():
    """Probabilities (N, C) that are right more often than not, and labels (N,)."""
    draw = np.random.default_rng(0)
    labels = draw.choice(SHAPE[1], SHAPE[0], p=[0.4, 0.3, 0.2, 0.1])
    scores = draw.normal(size=SHAPE) + 1.2 * np.eye(SHAPE[1])[labels]
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True), labels


def holds(figure: dict, value: float, tolerance: float = 1e-9) -> None:
    assert figure["value"] == pytest.approx(value, abs=tolerance)
    assert figure["low"] <= figure["value"] <= figure["high"]


def test_classification_is_what_the_libraries_say(predictions):
    from sklearn.metrics import f1_score, matthews_corrcoef
    from torchmetrics.classification import MulticlassCalibrationError

    probabilities, labels = predictions
    figures, said = task_metrics.classification(probabilities, labels, list("abcd")), probabilities.argmax(1)
    right = said == labels
    holds(figures["accuracy"], right.mean())
    holds(figures["macro_f1"], f1_score(labels, said, average="macro"))
    ece = MulticlassCalibrationError(4, n_bins=15)(torch.tensor(probabilities), torch.tensor(labels))
    assert figures["ece"]["value"] == pytest.approx(float(ece), abs=1e-6)
    order = np.argsort(-probabilities.max(1))
    holds(figures["selective_accuracy@80"], right[order[:240]].mean())
    holds(figures["aurc"], np.mean([1 - right[order[: n + 1]].mean() for n in range(len(order))]))
    assert figures["accuracy"]["chance"] == np.bincount(labels).max() / 300 and "mcc" not in figures
    constant = np.full(300, np.bincount(labels).argmax())
    assert figures["macro_f1"]["chance"] == pytest.approx(f1_score(labels, constant, average="macro"))
    two = probabilities[:, :2] / probabilities[:, :2].sum(1, keepdims=True)
    figures = task_metrics.classification(two, labels % 2, ["a", "b"])
    holds(figures["mcc"], matthews_corrcoef(labels % 2, two.argmax(1)))
    with pytest.raises(UserError, match="4 classes"):
        task_metrics.classification(probabilities, labels + 1, list("abcd"))


def test_intervals_are_those_of_a_loop_over_draws(predictions):
    """Of sums and of rows: the same as drawing clusters and asking the library each time, but for the draws' luck."""
    from sklearn.metrics import average_precision_score, f1_score

    probabilities, labels = predictions
    clusters, draw, said = np.arange(300) // 2, np.random.default_rng(1), probabilities.argmax(1)
    drawn = [np.concatenate([2 * c, 2 * c + 1]) for c in draw.integers(0, 150, (300, 150))]
    figure = task_metrics.classification(probabilities, labels, list("abcd"), clusters)["macro_f1"]
    low, high = np.percentile([f1_score(labels[r], said[r], average="macro") for r in drawn], [2.5, 97.5])
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=0.015)
    hot = np.eye(4)[labels]
    figure = task_metrics.multi_label(probabilities, hot, list("abcd"), clusters)["map"]
    found = [average_precision_score(hot[r], probabilities[r], average="macro") for r in drawn[:150]]
    low, high = np.percentile(found, [2.5, 97.5])
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=0.03)


def test_guesses_score_at_chance():
    """Predictions that know nothing: chance is within the interval, for figures whose chance a random guess gets."""
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 2, 400)
    figures = task_metrics.classification(draw.dirichlet([1, 1], 400), labels, ["a", "b"])
    hot = draw.random((400, 3)) < 0.3
    figures["map"] = task_metrics.multi_label(draw.random((400, 3)), hot, list("abc"))["map"]
    figures |= task_metrics.regression(draw.normal(size=400), draw.normal(size=400))
    for name in ("accuracy", "mcc", "selective_accuracy@80", "aurc", "pearson", "spearman"):
        one = figures[name]
        assert one["low"] <= one["chance"] <= one["high"], name
    assert figures["map"]["value"] == pytest.approx(figures["map"]["chance"], abs=0.05)


def test_multi_label_is_what_scikit_learn_says():
    from sklearn.metrics import average_precision_score, f1_score

    draw = np.random.default_rng(2)
    labels = draw.random((200, 3)) < [0.5, 0.2, 0.1]
    probabilities = (0.4 * labels + 0.8 * draw.random((200, 3))).round(1) / 1.2  # rounded: many are equal
    figures = task_metrics.multi_label(probabilities, labels, list("abc"))
    said = probabilities >= 0.5
    holds(figures["map"], average_precision_score(labels, probabilities, average="macro"))
    holds(figures["micro_f1"], f1_score(labels, said, average="micro"))
    holds(figures["macro_f1"], f1_score(labels, said, average="macro"))
    assert figures["micro_f1"]["chance"] == pytest.approx(f1_score(labels, np.ones_like(labels), average="micro"))
    with pytest.raises(UserError, match="do not fit"):
        task_metrics.multi_label(probabilities, labels[:, :2], ["a", "b"])


def entities_by_brute_force(tags: list[str]) -> set:
    """All stretches of one type that begin where conlleval has a chunk begin, and do not go on after them."""

    def begins(i: int) -> bool:
        return tags[i] != "O" and (tags[i][0] == "B" or i == 0 or tags[i - 1] == "O" or tags[i - 1][2:] != tags[i][2:])

    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            whole = all(tags[i] != "O" and (i == start or not begins(i)) for i in range(start, end))
            if begins(start) and whole and (end == len(tags) or tags[end] == "O" or begins(end)):
                found.add((tags[start][2:], start, end))
    return found


def test_tagging_counts_as_conlleval_does():
    draw = np.random.default_rng(0)
    kinds = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    tags = [[kinds[k] for k in draw.choice(5, 9, p=[0.4, 0.15, 0.15, 0.15, 0.15])] for _ in range(60)]
    said = [[tag if draw.random() < 0.8 else kinds[draw.integers(5)] for tag in own] for own in tags]
    found, wanted = ([entities_by_brute_force(own) for own in side] for side in (said, tags))
    assert [task_metrics.entities(own) for own in tags] == wanted
    hits = sum(len(a & b) for a, b in zip(found, wanted))
    figures = task_metrics.tagging(said, tags)
    holds(figures["entity_f1"], 2 * hits / (sum(map(len, found)) + sum(map(len, wanted))))
    assert figures["entity_f1"]["chance"] == 0 and figures["entity_f1"]["n"] == 60
    holds(figures["token_accuracy"], np.mean([a == b for p, t in zip(said, tags) for a, b in zip(p, t)]))
    # the example of CoNLL-2003: a wrong type and a wrong end are no hits
    assert task_metrics.entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == {
        ("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("PER", 5, 6),
    }  # fmt: skip


def test_plain_tags_are_scored_as_classes():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(1)
    tags = [list(draw.choice(["NOUN", "VERB", "DET"], 7)) for _ in range(40)]
    said = [[tag if draw.random() < 0.7 else "NOUN" for tag in own] for own in tags]
    flat = [[tag for own in side for tag in own] for side in (tags, said)]
    figures = task_metrics.tagging(said, tags)
    holds(figures["macro_f1"], f1_score(*flat, average="macro"))
    with pytest.raises(UserError, match="sentence 0: 2 predicted tags for 7 words"):
        task_metrics.tagging([["DET", "DET"], *said[1:]], tags)


def test_spans_are_scored_as_squad_does():
    from torchmetrics.text import SQuAD

    right = ["the red bus", "a cat, black", "in 1990", "Paris"]
    said = ["red bus", "a black dog", "1990", "London"]
    figures = task_metrics.spans(said, right)
    score = SQuAD()(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(said)],
        [{"id": str(i), "answers": {"text": [text], "answer_start": [0]}} for i, text in enumerate(right)],
    )
    assert figures["exact_match"]["value"] == pytest.approx(float(score["exact_match"]) / 100)
    assert figures["f1"]["value"] == pytest.approx(float(score["f1"]) / 100)
    mixed = task_metrics.spans([None, "x", "bus", None], [None, None, ["a bus", "car"], "dog"])
    assert mixed["exact_match"]["value"] == mixed["f1"]["value"] == mixed["f1"]["chance"] == 0.5
    assert mixed["no_answer/accuracy"]["value"] == mixed["has_answer/f1"]["value"] == 0.5


def test_regression_is_what_the_libraries_say():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score

    draw = np.random.default_rng(0)
    values = draw.normal(1000, 1, 200).round(1)
    predicted = values + draw.normal(size=200).round(1)
    figures = task_metrics.regression(predicted, values)
    holds(figures["pearson"], pearsonr(predicted, values)[0])
    holds(figures["spearman"], spearmanr(predicted, values)[0])
    holds(figures["mae"], mean_absolute_error(values, predicted))
    holds(figures["r2"], r2_score(values, predicted))
    assert figures["mae"]["chance"] == pytest.approx(mean_absolute_error(values, np.full(200, np.median(values))))
    with pytest.raises(UserError, match="finite"):
        task_metrics.regression([np.nan], [1.0])


def test_captions_are_scored_by_sacrebleu():
    from sacrebleu.metrics.bleu import BLEU

    colors = ["red", "green", "blue", "black", "yellow"]
    right = [[f"a {c} bus in the street of {c} town", f"the {c} bus stands there"] for c in colors]
    said = [f"a {c} bus stands in the street" for c in [*colors[:4], "white"]]
    figures = task_metrics.captions(said, right)
    streams = [list(stream) for stream in zip(*right)]
    holds(figures["bleu"], BLEU().corpus_score(said, streams).score, 1e-6)
    assert figures["bleu"]["value"] > figures["bleu"]["chance"] > 0
    assert figures["chrf"]["value"] > figures["chrf"]["chance"]


def random_corpus(tmp_path, count: int = 200, classes: int = 4, modalities=("text", "image")) -> EmbeddedCorpus:
    """Vectors that know nothing, each sample with one input of each modality and a class."""
    draw = np.random.default_rng(5)
    rows = [{"label": "abcd"[i % classes], "half": "xy"[i // classes % 2]} for i in range(count)]
    vectors = {modality: draw.normal(size=(count, 16)).tolist() for modality in modalities}
    return by_hand(vectors, [{modality: [i] for modality in modalities} for i in range(count)], rows, tmp_path)


class Speaker:
    """A model that says a vector for each text, by hand."""

    modalities = ("text", "image")

    def __init__(self, vectors: dict[str, list[float]]):
        self.vectors = vectors

    def embed(self, text):
        return {"text": torch.nn.functional.normalize(torch.tensor([self.vectors[t] for t in text]), dim=-1)}


def test_vectors_that_know_nothing_score_at_chance(tmp_path):
    embedded, draw = random_corpus(tmp_path), np.random.default_rng(6)
    names = {name: draw.normal(size=16).tolist() for name in "abcd"}
    settings = {"labels": "label"}
    figures = retrieval.Evaluator().run(embedded, retrieval.Config())
    figures |= knn.Evaluator().run(embedded, knn.Config(**settings))
    figures |= probe.Evaluator().run(embedded, probe.Config(**settings))
    zero = zero_shot.Config(**settings, templates={"image": ["{}"]})
    figures |= zero_shot.Evaluator().run(embedded, zero, Speaker(names))
    found = subgroups.Evaluator().run(embedded, subgroups.Config(["half"]))
    figures |= {name: found[f"subgroups/half/{part}/knn/image/accuracy"] for part in "xy" for name in (part,)}
    assert {"retrieval/text_to_image/r@10", "knn/image/accuracy", "probe/text/accuracy"} <= figures.keys()
    assert {"zero_shot/image/accuracy", "zero_shot/image/macro_recall", "x", "y"} <= figures.keys()
    for name, one in figures.items():
        slack = 0.02 if "/r@" in name or "mrr" in name else 0.1  # where an interval of rare hits is too narrow
        assert one["low"] - slack <= one["chance"] <= one["high"] + slack or "median" in name, (name, one)
    assert found["subgroups/half/largest_difference/knn/image/accuracy"]["low"] < 0.15


def test_zero_shot_by_brute_force(tmp_path):
    """Accuracy and recall of an argmax over class vectors that are averaged over two templates."""
    from sklearn.metrics import balanced_accuracy_score

    embedded, draw = random_corpus(tmp_path, 90, 3), np.random.default_rng(7)
    sentences = {f"{start}{name}": draw.normal(size=16) for name in "abc" for start in ("", "some ")}
    config = zero_shot.Config("label", templates={"image": ["{}", "some {}"]})
    figures = zero_shot.Evaluator().run(embedded, config, Speaker({k: v.tolist() for k, v in sentences.items()}))
    unit = {k: v / np.linalg.norm(v) for k, v in sentences.items()}
    classes = np.stack([unit[name] + unit[f"some {name}"] for name in "abc"])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    said = (embedded.inputs["image"].vectors.double().numpy() @ classes.T).argmax(1)
    labels = np.arange(90) % 3
    holds(figures["zero_shot/image/accuracy"], (said == labels).mean())
    holds(figures["zero_shot/image/macro_recall"], balanced_accuracy_score(labels, said))
    assert "zero_shot/text/accuracy" not in figures
    with pytest.raises(UserError, match="has no {}"):
        zero_shot.Evaluator().run(embedded, zero_shot.Config("label", templates={"image": ["x"]}), Speaker({}))


def test_classes_get_their_names(tmp_path):
    made = [{"__key__": f"k{i}", "cls": str(i % 11), "json": {"label": f"thing_{i % 11}"}} for i in range(22)]
    shards.write(tmp_path / "a.tar", made)
    rows = [one["json"] for one in made]
    embedded = EmbeddedCorpus(Corpus(Config(str(tmp_path / "a.tar"))), {}, rows, [{}] * 22)
    labels = [(str(i % 11), i) for i in range(22)]
    names = zero_shot.name_classes(embedded, labels, [])
    assert list(names.items())[:2] == [("0", "thing 0"), ("1", "thing 1")] and list(names)[-1] == "10"
    assert zero_shot.name_classes(embedded, labels, list("abcdefghijk"))["10"] == "k"
    with pytest.raises(UserError, match="2 names"):
        zero_shot.name_classes(embedded, labels, ["a", "b"])
    rows[:] = [{} for _ in rows]
    assert zero_shot.name_classes(embedded, labels, []) is None


def test_embedding_space_by_brute_force(tmp_path):
    embedded = random_corpus(tmp_path, 40)
    figures = embedding_space.Evaluator().run(embedded, embedding_space.Config())
    image, text = (embedded.inputs[modality].vectors.double() for modality in ("image", "text"))
    holds(figures["space/image/uniformity"], float(torch.pdist(image).square().mul(-2).exp().mean().log()), 1e-6)
    holds(figures["space/text_image/alignment"], float((text - image).norm(dim=1).square().mean()), 1e-6)
    gap = figures["space/text_image/modality_gap"]["value"]
    assert gap == pytest.approx(float((text.mean(0) - image.mean(0)).norm()), abs=1e-6)
    one = figures["space/text_image/alignment"]
    assert one["low"] <= one["chance"] <= one["high"], "pairs that know nothing of each other"
    values = torch.linalg.svdvals(image)
    share = values / values.sum()
    holds(figures["space/image/effective_rank"], float(torch.exp(-(share * share.log()).sum())), 1e-4)
    assert embedding_space.effective_rank(np.eye(5)) == pytest.approx(5)
    assert embedding_space.effective_rank(np.ones((9, 3))) == pytest.approx(1)


def test_subgroups_by_hand():
    """Two thirds right against one third; and a corpus where the values make no difference."""
    draw = np.random.default_rng(0)
    part = np.repeat([0, 1], 150)
    values = (draw.random(300) < np.where(part, 0.3, 0.7)).astype(float)
    scores = Scores(values, np.arange(300), np.arange(300), np.full(300, 0.5))
    one = subgroups.largest_difference(scores, part, 2)
    means = [values[part == p].mean() for p in (0, 1)]
    holds(one, means[0] - means[1])
    error = np.sqrt(sum(m * (1 - m) / 150 for m in means))
    assert one["low"] == pytest.approx(one["value"] - 1.96 * error, abs=0.02) and one["low"] > one["chance"]
    alike = subgroups.largest_difference(scores, draw.integers(0, 6, 300), 6)
    assert 0.5 * alike["value"] < alike["chance"] < 2 * alike["value"], "six parts by chance differ by as much"


@pytest.mark.parametrize("evaluator", [knn, probe])
def test_fitted_on_other_shards(evaluator, tmp_path):
    """As scikit-learn fitted on the one and tested on the other; groups and classes of one side are left out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    draw = np.random.default_rng(0)

    def corpus(name: str, count: int, labels: list[str], groups: list[str]) -> EmbeddedCorpus:
        (tmp_path / name).mkdir()
        features = draw.normal(size=(count, 6)) + 1.5 * np.eye(6)[["abz".index(label) for label in labels]]
        rows = [{"label": label, "g": group} for label, group in zip(labels, groups)]
        return by_hand({"image": features.tolist()}, [{"image": [i]} for i in range(count)], rows, tmp_path / name)

    embedded = corpus("on", 62, ["a", "b"] * 30 + ["z", "z"], [f"on {i}" for i in range(62)])
    embedded.train = corpus("train", 44, ["a", "b"] * 22, [f"train {i}" for i in range(40)] + ["on 0"] * 4)
    figures = evaluator.Evaluator().run(embedded, evaluator.Config(labels="label", group="g"))
    (figure,) = figures.values()
    x, y = (one.inputs["image"].features.double().numpy() for one in (embedded.train, embedded))
    x, y, seen, wanted = x[:40], y[:60], np.arange(40) % 2, np.arange(60) % 2
    if evaluator is probe:
        scaler = StandardScaler().fit(x)
        fitted = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(x), seen)
        said = fitted.predict(scaler.transform(y))
    else:
        x, y = (rows - x.mean(0) for rows in (x, y))
        cosine = y @ x.T / np.linalg.norm(y, axis=1)[:, None] / np.linalg.norm(x, axis=1)
        near = np.argsort(-cosine, 1)[:, :10]
        weight = np.exp(np.take_along_axis(cosine, near, 1) / 0.1)
        said = np.array([np.bincount(seen[own], w, 2).argmax() for own, w in zip(near, weight)])
    holds(figure, (said == wanted).mean())
    assert figure["n"] == 60 and figure["chance"] == 0.5
    assert any("leave out 2 of 62 inputs, of classes that `train` has not" in note for note in embedded.notes)


@pytest.fixture(scope="module")
def headless(tmp_path_factory, corpus):
    """A run of a model without a retrieval head, with two evaluations in its config."""
    folder = tmp_path_factory.mktemp("run") / "run"
    data = tiny(corpus, steps=2, save_every=2, heads={}, run_dir=str(folder))
    data["tasks"] = {name: data["tasks"][name] for name in ("next", "looks")}
    on = {"on": f"{corpus}/validation-*.tar", "labels": "color"}
    data["evaluate"] = {"held": {**on, "subgroups": ["language"], "modalities": ["image"]}, "texts": on}
    loop.pretrain(build(data))
    return folder


def test_a_model_without_vectors_is_measured_by_its_features(headless, corpus):
    evaluation = Evaluation(f"{corpus}/validation-*.tar", train=f"{corpus}/train-*.tar", measure=["knn", "retrieval"])
    figures, embedded = evaluate(load_model(headless), {}, evaluation, checkpoint.newest(headless))
    assert figures["knn/image/accuracy"]["n"] == 16 and embedded.inputs["image"].vectors.shape == (16, 0)
    assert any(note.startswith("no retrieval: this model has no retrieval head") for note in embedded.notes)
    with pytest.raises(UserError, match="evaluate.x.measure there is no evaluator kn"):
        build(tiny(corpus, evaluate={"x": {"on": "x.tar", "measure": ["kn"]}}))
    with pytest.raises(UserError, match="no evaluator 'kn'; there are bits_per_byte, captions, denoise"):
        evaluate(load_model(headless), {}, Evaluation(f"{corpus}/validation-*.tar", measure=["kn"]))


def test_what_needs_no_embedding_pays_for_none(headless, corpus, monkeypatch):
    model = load_model(headless)
    monkeypatch.setattr(model, "embed_sequences", None)
    _, embedded = evaluate(model, {}, Evaluation(f"{corpus}/validation-*.tar", measure=["bits_per_byte"]))
    assert not embedded.is_read and not embedded.skipped


def test_suites(mmfm, headless, corpus, tmp_path):
    folder = checkpoint.newest(headless)
    quick, full = (load_suite(name, folder) for name in ("quick", "full"))
    assert list(quick) == list(full) == ["held", "texts"]
    assert set(quick["held"].measure) < set(full["held"].measure) >= {"zero_shot", "embedding_space", "subgroups"}
    assert quick["held"].subgroups == ["language"]
    suite = {
        "mine": {"on": f"{corpus}/validation-*.tar", "labels": "color", "measure": ["knn"], "modalities": ["image"]}
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    done = mmfm("evaluate", headless, "--suite", tmp_path / "suite.yaml", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert list(figures) == ["mine/knn/image/accuracy"] and figures["mine/knn/image/accuracy"]["seed"] == 0
    assert evaluations.read(headless)["mine"]["figures"]["knn/image/accuracy"]["n"] == 16
    suite["mine"]["measures"] = suite["mine"].pop("measure")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    for name, said in ((tmp_path / "suite.yaml", "did you mean"), ("quikc", "neither `quick` nor `full`, nor a file")):
        with pytest.raises(UserError, match=said):
            load_suite(str(name), folder)


def test_evaluations_are_kept_where_they_may_be(headless, tmp_path, monkeypatch):
    entry = {"on": ["x"], "seed": 0, "figures": {}, "notes": []}
    assert evaluations.read(tmp_path) == {}
    evaluations.write(tmp_path, "a", entry)
    evaluations.write(tmp_path, "b", entry)
    evaluations.write(tmp_path, "a", {**entry, "seed": 1})
    assert {name: one["seed"] for name, one in evaluations.read(tmp_path).items()} == {"a": 1, "b": 0}
    (tmp_path / evaluations.FILE).write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        evaluations.read(tmp_path)
    folder = checkpoint.newest(headless)
    assert evaluations.keep(folder, "kept", entry) == "" and evaluations.read(headless)["kept"]["step"] == 2

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(evaluations, "write_atomic", refuse)
    assert "not kept" in evaluations.keep(folder, "kept", entry), "a folder that is only read is no error"
    monkeypatch.setattr(evaluations.trust, "is_own", lambda *_: False)
    assert "not trained here by you" in evaluations.keep(folder, "kept", entry)
