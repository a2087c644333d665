"""Few-shot classification in context: likelihoods against a plain computation, examples, controls, calibration."""

import numpy as np
import pytest
import torch
from conftest import jpeg, tiny
from test_train import fit

from multimodal_fm.batch import Sample, count_targets
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.evals import few_shot
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.embed_corpus import EmbeddedCorpus
from multimodal_fm.evals.few_shot import Config, Prompter, calibrate, change_labels, draw_contexts
from multimodal_fm.evals.run import evaluate
from multimodal_fm.model import Model
from multimodal_fm.objectives import build as build_objectives

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Texts and pictures of three classes: a color is named, and the label is an animal."""
    folder, made = tmp_path_factory.mktemp("labeled"), []
    for number in range(60):
        name, color = list(COLORS.items())[number % 3]
        animal = {"red": "cat", "green": "dog", "blue": "owl"}[name]
        made.append({"__key__": f"{number:03d}", "txt": f"{name} {number}", "jpg": jpeg(color, (16, 16)),
                     "cls": str(number % 3), "json": {"label": animal, "pair": number // 2}})  # fmt: skip
    shards.write(folder / "train-0.tar", made)
    return folder


@pytest.fixture(scope="module")
def model(labeled, tmp_path_factory):
    """A random model with a causal objective of text, and one of captions, and the objectives."""
    data = tiny(
        labeled, tokenizers={"text": {"vocab_size": 260, "max_tokens": 120}, "image": {"patch": 8, "max_tokens": 4}}
    )
    task = {"batch_size": 2, "sources": {"all": 1}}
    data["sources"]["all"].pop("group")
    data["tasks"] = {
        "next": {"objectives": {"causal": {}}, "modalities": ["text"], **task},
        "captions": {
            "objectives": {"causal": {"fuse": True, "prefix": ["image"]}},
            "modalities": ["image", "text"],
            **task,
        },
    }
    folder = tmp_path_factory.mktemp("model")
    config, _ = fit({**data, "run_dir": str(folder)}, folder)
    torch.manual_seed(0)
    model = Model(config.model)
    plugins, modalities = zip(*(((n, t.objectives), (n, t.modalities)) for n, t in config.tasks.items()))
    objectives = build_objectives(dict(plugins), dict(modalities), model)
    return model.eval(), dict(objectives.items())


def nats_of(model, objective, sample: Sample, last: int) -> float:
    """The nats of the last so many text tokens of a sample, arranged as in training."""
    example = objective.arrange(objective.config, sample)
    batch = model.collate({"t": [(0, example)]}, {"t": count_targets([example], model.modalities)})
    return float(objective.score(model(batch), batch.tasks["t"], "text")[-last:].double().sum())


@torch.no_grad()
def test_the_likelihood_of_a_label_is_that_of_its_tokens_in_one_run_of_text(model):
    model, objectives = model
    objective, text = objectives["next/causal"], model.tokenizers["text"]
    prompter = Prompter(model, objective, "text", Config(templates={"text": ["say {}: "]}), ["cat", "dog"])
    queries = [text.encode("red 1"), text.encode("a longer text, blue")]
    found = prompter.score([(queries[0], [], []), (queries[1], [text.encode("green 2")], ["dog"])])
    for row, context in enumerate(("say red 1: ", "say green 2: dog\n\nsay a longer text, blue: ")):
        for column, name in enumerate(("cat", "dog")):
            whole = text.read(f"{context}{name}\n\n")[0]
            whole = whole.select(torch.arange(len(whole) - 1))  # END is not scored
            assert found[row, column] == pytest.approx(
                -nats_of(model, objective, Sample({"text": whole}), len(name) + 2), rel=1e-4
            )


@torch.no_grad()
def test_a_picture_without_examples_is_scored_as_captions_are(model):
    """And with examples each picture is a block that is read as a whole, in the order in which they stand."""
    model, objectives = model
    objective, text = objectives["captions/causal"], model.tokenizers["text"]
    prompter = Prompter(model, objective, "image", Config(), ["cat", "owl"])
    picture, other = (
        model.tokenizers["image"].read({"jpg": jpeg(color, (16, 16))})[0] for color in COLORS.values() if color[0] < 200
    )
    picture, other = (
        p.replace(modality=torch.full_like(p.modality, model.modalities.index("image"))) for p in (picture, other)
    )
    found = prompter.score([(picture, [], []), (picture, [other], ["owl"])])
    caption = text.read("owl")[0]
    sample = Sample({"image": picture, "text": caption.replace(modality=torch.full_like(caption.modality, 0))})
    assert found[0, 1] == pytest.approx(-nats_of(model, objective, sample, 4), rel=1e-4)
    (example, _) = prompter._arrange(picture, [other], ["owl"])
    orders = torch.cat([piece.order for piece in example.inputs]).tolist()
    assert orders == [0] * 4 + [1, 2, 3, 4, 5] + [6] * 4 + [7] + [8, 9, 10, 11]
    times = torch.cat([piece.position[:, 0] for piece in example.inputs])
    assert (times.diff() >= 0).all() and times[-1] == 11
    assert example.rows[0].tolist() == [len(orders) - 5 + i for i in range(4)] and abs(found[1, 1] - found[0, 1]) > 1e-3


def oracle(prompter, prompts):
    """The label that the context gives to the query's color, if any: what a perfect reader of the context answers."""
    text, scores = prompter.model.tokenizers["text"], np.zeros((len(prompts), len(prompter.classes)))
    for row, (query, examples, names) in enumerate(prompts):
        for example, name in zip(examples, names, strict=True):
            if text.decode(example).split()[0] == text.decode(query).split()[0]:
                scores[row, prompter.classes.index(name)] += 1
    return scores


def test_accuracy_rises_with_examples_and_falls_to_chance_with_wrong_labels(model, labeled, monkeypatch):
    model, objectives = model
    monkeypatch.setattr(Prompter, "score", oracle)
    settings = {"measure": ["few_shot"], "modalities": ["text"], "shots": [0, 1, 4, 16]}
    figures, _ = evaluate(model, objectives, Evaluation(f"{labeled}/train-*.tar", **settings))
    value = {name: figure["value"] for name, figure in figures.items()}
    assert value["few_shot/text/0_shot"] == pytest.approx(1 / 3) == figures["few_shot/text/0_shot"]["chance"]
    assert value["few_shot/text/1_shot"] < value["few_shot/text/4_shot"] < value["few_shot/text/16_shot"] > 0.95
    for control in ("shuffled_labels", "random_labels"):
        figure = figures[f"few_shot/text/16_shot_{control}"]
        assert figure["low"] < 0.45 and figure["value"] < 0.6 < value["few_shot/text/16_shot"]
    assert "few_shot/text/0_shot_shuffled_labels" not in figures and "few_shot/text/4_shot_calibrated" in figures


def test_the_real_thing_runs_over_texts_and_pictures(model, labeled, monkeypatch):
    model, objectives = model
    monkeypatch.setattr(few_shot, "MOST_QUERIES", 6)
    evaluation = Evaluation(f"{labeled}/train-*.tar", measure=["few_shot"], shots=[0, 2], group="pair")
    figures, embedded = evaluate(model, objectives, evaluation)
    assert {name.split("/")[1] for name in figures} == {"text", "image"} and not embedded.is_read
    assert all(figure["n"] == 6 and 0 <= figure["value"] <= 1 for figure in figures.values())
    with pytest.raises(UserError, match="do not fit"):
        evaluate(model, objectives, Evaluation(f"{labeled}/train-*.tar", measure=["few_shot"], shots=[40]))
    with pytest.raises(UserError, match="has no {}"):
        evaluate(
            model, objectives, Evaluation(f"{labeled}/train-*.tar", measure=["few_shot"], templates={"text": ["x"]})
        )
    with pytest.raises(UserError, match="2 names, but there is a class 2"):
        evaluate(model, objectives, Evaluation(f"{labeled}/train-*.tar", measure=["few_shot"], class_names=["a", "b"]))


def test_an_example_is_never_the_query_nor_of_its_group(model, labeled):
    corpus = EmbeddedCorpus(Corpus(shards.Config(f"{labeled}/train-*.tar"), "on"))
    found = few_shot.read_labeled(model[0], corpus, "text", Config(group="pair"))
    rows, contexts = draw_contexts(found, found, 16)
    for row, own in zip(rows, contexts, strict=True):
        assert len(own) == len(set(own)) == 16
        assert all(found.groups[i] != found.groups[row] for i in own)


def test_the_controls_keep_what_they_should():
    prompts = [("q", ["e"] * 8, list("aabbbccc"))] * 50
    assert change_labels(prompts, ["a", "b", "c"], "") == prompts
    shuffled = change_labels(prompts, ["a", "b", "c"], "shuffled_labels")
    assert all(sorted(names) == list("aabbbccc") for *_, names in shuffled) and shuffled[0] != prompts[0]
    drawn = [name for *_, names in change_labels(prompts, ["a", "b", "c"], "random_labels") for name in names]
    assert all(0.25 < drawn.count(name) / 400 < 0.42 for name in "abc")


def test_calibration_takes_off_what_every_query_prefers():
    draw = np.random.default_rng(0)
    truth = draw.integers(3, size=300)
    scores = np.eye(3)[truth] + 0.3 * draw.standard_normal((300, 3)) + np.array([0, 5.0, 0])
    assert (scores.argmax(1) == 1).all() and (calibrate(scores).argmax(1) == truth).mean() > 0.9
    mean = np.exp(calibrate(scores)).mean(0)
    assert mean == pytest.approx(np.ones(3)), "of each class the mean posterior is the same"
