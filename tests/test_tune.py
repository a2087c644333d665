"""Adapting: every way learns, is resumed and written as promised; heads, adapters and losses against brute force."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import COLORS, jpeg, losses, samples, text_only, tiny, tone

import multimodal_fm as mmfm
from multimodal_fm import lora
from multimodal_fm.batch import Sample
from multimodal_fm.cli import app
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.evals import heads as head_predictions
from multimodal_fm.model import Model, merge_adapter, with_adapter, without_adapter
from multimodal_fm.objectives import supervised
from multimodal_fm.reports import tune as page
from multimodal_fm.run_dir import checkpoint, evaluations, predictions
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

QUICK = ["steps=8", "evaluate_every=4", "save_every=4", "num_workers=0", "threads=1"]
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    """A short pretraining run of all three modalities."""
    run = tmp_path_factory.mktemp("base") / "run"
    loop.pretrain(build(tiny(corpus, run_dir=str(run), steps=2)))
    return run


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Shards of colored pictures, tones and texts with the color as label, in three parts; one color is hostile."""
    folder = tmp_path_factory.mktemp("parts")
    for number, (name, count) in enumerate({"train": 24, "validation": 8, "test": 12}.items()):
        made = samples(count, 100 * number)
        for row in made:
            row["json"] = {"color": {"yellow": HOSTILE}.get(row["json"]["color"], row["json"]["color"])}
            row["json"]["hue"] = float(list(COLORS).index({HOSTILE: "yellow"}.get(*[row["json"]["color"]] * 2)))
        shards.write(folder / f"{name}.tar", made)
    return {name: str(folder / f"{name}.tar") for name in ("train", "validation", "test")}


def tuned(base, parts, run_dir, how, task="image-classification", label="color", overrides=QUICK, **settings):
    given = (parts["train"], task, how, parts["validation"], parts["test"])
    return mmfm.tune(base, *given, run_dir=str(run_dir), overrides=overrides, label=label, **settings)


@pytest.mark.parametrize("how", ["full", "lora", "prompt", "probe", "knn", "prototypes", "zero-shot"])
def test_every_way(base, parts, tmp_path, how):
    """The run says what was learned; its predictions, its figures and its page agree."""
    result = tuned(base, parts, tmp_path / "run", how)
    assert result["how"] == how and result["base_hash"] == lora.base_hash(mmfm.load(base).state_dict())
    accuracy = result["test"]["classify/accuracy"]
    rows = predictions.read(tmp_path / "run")["test"]
    assert accuracy["n"] == len(rows) == 12 and accuracy["chance"] == 0.25
    assert accuracy["value"] == pytest.approx(np.mean([row["label"] == row["predicted"] for row in rows]))
    assert evaluations.read(tmp_path / "run")["test"]["figures"].keys() == result["test"].keys()
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"{accuracy['value']:.3f}" in text and "<script" not in text and "&lt;script&gt;" in text
    wrong = sum(row["score"] < 1 for row in rows)
    assert text.count('<img src="data:image/jpeg;base64,') == min(wrong, page.SHOWN)
    if how in ("knn", "zero-shot"):
        assert result["parameters"] == 0 and not (tmp_path / "run" / "checkpoints").exists()
        return
    model = mmfm.load(tmp_path / "run")
    said = model.classify([jpeg((220, 30, 30))], modality="image")[0]
    assert said["label"] in said["probabilities"] and sum(said["probabilities"].values()) == pytest.approx(1)
    if how in ("prompt", "probe", "prototypes"):  # nothing of the base has changed
        own = model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in mmfm.load(base).state_dict().items())


def test_features_find_colors(base, parts, tmp_path):
    """Pictures of one color each are told apart by an untrained backbone: neighbors and probes are no guesses."""
    for how in ("knn", "probe"):
        assert tuned(base, parts, tmp_path / how, how)["test"]["classify/accuracy"]["value"] >= 0.75


def read_page(run) -> str:
    return (run / "report.html").read_text()


def write_jsonl(path, rows) -> str:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_tagging(base, tmp_path):
    names = ["Łukasz", "Ana", "李明", "<b>Bo</b>"]
    rows = [
        {"words": [names[i % 4], "naïve", f"lived{i}", "in", "Köln"], "tags": ["B-PER", "O", "O", "O", "B-LOC"]}
        for i in range(40)
    ]
    data = write_jsonl(tmp_path / "tags.jsonl", rows)
    result = mmfm.tune(base, data, "token-tagging", run_dir=str(tmp_path / "run"), overrides=QUICK)
    rows = predictions.read(tmp_path / "run")["test"]
    right = [a == b for row in rows for a, b in zip(row["label"], row["predicted"], strict=True)]  # all were read
    assert result["metric"] == "tag/token_accuracy"
    assert result["test"]["tag/token_accuracy"]["value"] == pytest.approx(np.mean(right))
    text = read_page(tmp_path / "run")
    assert all(right) or ('class="tagged"' in text and "Köln" in text)
    assert "<b>Bo" not in text and "confusion matrix" in text


def test_questions(base, tmp_path):
    rows = []
    for i in range(40):
        name, place = ["Ana", "Łukasz", "Bo <i>"][i % 3], ["Köln", "Rome"][i % 2]
        context, answer = f"In {1900 + i} {name} went to {place}.", {0: name, 1: place, 2: None}[i % 3]
        question = {0: "Who went?", 1: "Where to?", 2: "With whom?"}[i % 3]
        answers = {"text": [answer] if answer else [], "answer_start": [context.index(answer)] if answer else []}
        rows.append({"question": f"{question} {i}", "context": context, "answers": answers})
    data = write_jsonl(tmp_path / "questions.jsonl", rows)
    result = mmfm.tune(base, data, "question-answering", run_dir=str(tmp_path / "run"), overrides=QUICK)
    assert 24 < mmfm.load(tmp_path / "run").tokenizers["text"].config.max_tokens < 100  # all of each text is read
    assert result["metric"] == "span/f1" and 0 <= result["test"]["span/f1"]["value"] <= 1
    text = read_page(tmp_path / "run")
    assert "no answer" in text and '<mark class="' in text and "Bo <i>" not in text


def test_regression(base, parts, tmp_path):
    result = tuned(base, parts, tmp_path / "run", "full", "regression", "hue")
    rows = predictions.read(tmp_path / "run")["test"]
    errors = [abs(row["label"] - row["predicted"]) for row in rows]
    assert result["test"]["regress/mae"]["value"] == pytest.approx(np.mean(errors))
    text = read_page(tmp_path / "run")
    worst = max(zip(errors, (row["key"] for row in rows), strict=True))[1]
    assert 'id="scatter-title"' in text and text.index(worst) == min(text.index(row["key"]) for row in rows)


def test_pairs_are_read_as_one_sequence(base, parts, tmp_path):
    """A picture with its sentence: what the run said of the test part is what `classify` says of the same pairs."""
    result = tuned(base, parts, tmp_path / "run", "full", "pair-classification")
    assert result["data"]["modalities"] == ["image", "audio", "text"]
    model, rows = mmfm.load(tmp_path / "run"), predictions.read(tmp_path / "run")["test"]
    members = {"image": "jpg", "audio": "flac", "text": "txt"}
    pairs = [{name: sample[ending] for name, ending in members.items()} for sample in mmfm.samples(parts["test"])]
    said = model.classify([{**pair, "text": pair["text"].decode()} for pair in pairs])
    assert [one["label"] for one in said] == [row["predicted"] for row in rows]
    confidence = [one["probabilities"][one["label"]] for one in said]
    assert confidence == pytest.approx([row["confidence"] for row in rows], abs=1e-5)


def test_killed_and_resumed_is_the_same(base, parts, tmp_path, monkeypatch):
    """The same tensors and figures, bit for bit."""
    whole = tuned(base, parts, tmp_path / "whole", "full")
    finish_step = loop.Run.finish_step

    def killed(run, *given):
        if run.step == 5:
            raise KeyboardInterrupt
        finish_step(run, *given)

    monkeypatch.setattr(loop.Run, "finish_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(base, parts, tmp_path / "run", "full")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not (tmp_path / "run" / page.FILE).exists()
    with pytest.raises(UserError, match="has not finished"):
        page.write(tmp_path / "run")
    again = tuned(base, parts, tmp_path / "run", "full", resume=True)
    assert again["test"] == whole["test"] and again["best_step"] == whole["best_step"]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    folders = [checkpoint.newest(tmp_path / name) for name in ("whole", "run")]
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (checkpoint.read_tensors(folder, name) for folder in folders)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(UserError, match="holds a finished tune"):
        tuned(base, parts, tmp_path / "run", "full", resume=True)


def test_rehearsal_goes_on_from_what_the_base_learned(base, parts, tmp_path):
    """At a rate of almost nothing, the base's objectives stay what they are in its checkpoint."""
    overrides = [*QUICK, "steps=1", "optim.lr=1e-12", "optim.weight_decay=0", "evaluate_every=0", "best=''"]
    tuned(base, parts, tmp_path / "run", "full", rehearsal=0.5, overrides=overrides)
    before = checkpoint.read_tensors(checkpoint.newest(base), "ema_objectives")
    after = checkpoint.read_tensors(checkpoint.newest(tmp_path / "run"), "ema_objectives")
    assert before and before.keys() <= after.keys()
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())


def test_patience_ends_a_run_that_does_not_improve(base, parts, tmp_path):
    """With a rate of nothing all measurements are equal: none is a new best one, and the latest is kept."""
    quick = ["steps=40", "evaluate_every=2", "save_every=2", "patience=2", "optim.lr=1e-12", *QUICK[3:]]
    result = tuned(base, parts, tmp_path / "run", "full", overrides=quick)
    assert max(losses(tmp_path / "run")) == 6 and result["best_step"] == 6
    assert checkpoint.newest(tmp_path / "run").name == "step-00000006"


# Adapters and learned tokens


@pytest.fixture(scope="module")
def adapted(base, parts, tmp_path_factory):
    """The base after a tune by low-rank adapters, at a rate that moves its weights well away."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    return run, tuned(base, parts, run, "lora", overrides=[*QUICK, "optim.lr=0.02"])


def logits(model) -> torch.Tensor:
    pictures = [jpeg(color) for color in COLORS.values()]
    return torch.tensor([list(one["probabilities"].values()) for one in model.classify(pictures, modality="image")])


def test_an_adapter_on_its_base_is_the_model_that_was_tuned(base, adapted):
    run, result = adapted
    model, own = mmfm.load(base, adapter=run / "adapter"), mmfm.load(run)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(own))
    settings = [{m: vars(t.config) | {"file": ""} for m, t in one.tokenizers.items()} for one in (model, own)]
    assert settings[0] == settings[1]
    about, tensors = lora.read_adapter(run / "adapter")
    assert all("lora_" in name or name.startswith("heads.classify.") for name in tensors)
    assert result["parameters"] == about["parameters"] == sum(value.numel() for value in tensors.values())
    assert result["adapter_bytes"] < 4 * result["parameters"] + 8000  # floats, and their names
    assert f"{result['parameters']:,}" in read_page(run) and "adapter" in read_page(run)


def test_merged_is_unmerged(base, adapted):
    """The products added to the weights change nothing; taken away, the base's own features are back."""
    model = mmfm.load(adapted[0])
    merged = merge_adapter(model)
    assert not lora.adapted_layers(merged) and logits(merged) == pytest.approx(logits(model), abs=1e-5)
    picture = [jpeg((1, 200, 3))]
    with torch.no_grad():
        features = [one.features(image=picture)["image"] for one in (mmfm.load(base), without_adapter(model), model)]
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2], atol=1e-3)


def test_an_adapter_of_another_base_is_refused(base, adapted):
    other = mmfm.load(base)
    with torch.no_grad():
        other.backbone.norm_out.weight.add_(1e-3)
    with pytest.raises(UserError, match="was tuned on another base"):
        with_adapter(other, adapted[0] / "adapter")


def with_head(base, prompt: int = 0, **heads) -> Model:
    """The base with other heads and, where asked for, learned tokens; in training neither drops nor varies a thing."""
    from multimodal_fm.config import build as build_part
    from multimodal_fm.config import to_data
    from multimodal_fm.model import ModelConfig

    model = mmfm.load(base)
    data = to_data(model.config)
    data["heads"] = heads
    data["tokenizers"]["text"]["max_tokens"] = 80
    if prompt:
        data["tokenizers"]["prompt"] = {"tokenizer": "prompt", "count": prompt}
    torch.manual_seed(0)
    made = Model(build_part(ModelConfig, data, "test"))
    made.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.")}, strict=False)
    return made.eval()


def score(model: Model, head: str, rows: list[dict], modalities=("text",), field: str = "label"):
    """The objective's loss of samples, the head's parts of the batch, and the examples."""
    objective = supervised.Objective(supervised.Config(head=head, label=field, fuse=True), model, list(modalities))
    bound = objective.bind(objective.config, model.config.heads)
    examples = []
    for row in rows:
        raw = {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in row.items()}
        tokens = head_predictions.read_views(model, list(modalities), raw, False)[0]
        label = objective.read_label(bound, raw, tokens, model.tokenizers)
        examples.append(objective.arrange(bound, Sample(tokens, label=label)))
    counts = {"t": head_predictions.count_targets(examples, model.modalities)}
    batch = model.collate({"t": list(enumerate(examples))}, counts)
    with torch.no_grad():
        output = model(batch)
        loss, _ = objective.loss(output, batch.tasks["t"])
    order = batch.tasks["t"].sequence.tolist()
    vectors = [output.tokens.content[output.tokens.sequence == number].double() for number in order]
    return float(loss), vectors, objective


TEXTS = ["a red square", "blue", "Łukasz saw 日本 and a 🦜 there", "one two three four five six"]
WORDS = [text.split(" ") for text in TEXTS]


@pytest.mark.parametrize("pool", ["mean", "attention", "first"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_classes_by_hand(base, pool, multi_label):
    """Pooling and loss, each sequence by itself in float64."""
    settings = {"classes": ["x", "y", "z"], "pool": pool, "multi_label": multi_label, "label_smoothing": 0.1}
    model = with_head(base, own={"head": "classify", **settings})
    values = [["x"], ["y", "z"], [], ["z"]] if multi_label else ["x", "y", "z", "x"]
    rows = [{"txt": text.encode(), "json": {"label": value}} for text, value in zip(TEXTS, values, strict=True)]
    loss, vectors, _ = score(model, "own", rows)
    head, expected = model.heads["own"].double(), []
    for content, value in zip(vectors, values, strict=True):
        if pool == "mean":
            pooled = content.mean(0)
        elif pool == "first":
            pooled = content[0]
        else:
            weights = (content @ head.pool.query / content.shape[1] ** 0.5).softmax(0)
            pooled = head.pool.value(content).T @ weights
        made = head.logits(pooled)
        truth = torch.tensor([float(name in value) for name in "xyz"], dtype=torch.double)
        if multi_label:
            truth, p = truth * 0.9 + 0.05, made.sigmoid()
            expected.append(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean())
        else:
            expected.append(-((truth * 0.9 + 0.1 / 3) * made.log_softmax(0)).sum())
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("prompt", [0, 3])
def test_tags_by_hand(base, prompt):
    """The loss is of each word's first token, found by spelling the text byte by byte; learned tokens move nothing."""
    model = with_head(base, prompt, own={"head": "tag", "classes": ["A", "B", "C"]})
    tags = [["ABC"[(i + len(own)) % 3] for i in range(len(own))] for own in WORDS]
    rows = [{"txt": t.encode(), "json": {"words": w, "label": g}} for t, w, g in zip(TEXTS, WORDS, tags, strict=True)]
    loss, vectors, _ = score(model, "own", rows)
    tokenizer, head, expected = model.tokenizers["text"], model.heads["own"].double(), []
    for text, words, own, content in zip(TEXTS, WORDS, tags, vectors, strict=True):
        lengths = [0, *tokenizer.token_bytes(tokenizer.encode(text)), 0]  # begin and end spell nothing
        token_of_byte = [token for token, length in enumerate(lengths) for _ in range(length)]
        assert len(token_of_byte) == len(text.encode()) and len(content) == len(lengths) + prompt
        place = 0
        for word, tag in zip(words, own, strict=True):
            likelihood = head.logits(content[prompt + token_of_byte[place]]).log_softmax(0)
            expected.append(-likelihood["ABC".index(tag)])
            place += len(word.encode()) + 1
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("prompt", [0, 3])
def test_spans_by_hand(base, prompt):
    """The loss, and the answer that the head finds, by trying all pairs of tokens."""
    model = with_head(base, prompt, own={"head": "span", "max_answer_tokens": 5})
    contexts = [f"Who?\n{text} once" for text in TEXTS]
    answers = [None, *({"start": 5, "end": 5 + len(words[0])} for words in WORDS[1:])]
    rows = [{"txt": c.encode(), "json": {"label": a}} for c, a in zip(contexts, answers, strict=True)]
    loss, vectors, objective = score(model, "own", rows)
    bound = objective.bind(objective.config, model.config.heads)
    tokenizer, head, expected = model.tokenizers["text"], model.heads["own"], []
    for row, context, words, content in zip(rows, contexts, WORDS, vectors, strict=True):
        raw = {"txt": row["txt"], "json": json.dumps(row["json"]).encode()}
        tokens = head_predictions.read_views(model, ["text"], raw, False)[0]
        label = objective.read_label(bound, raw, tokens, model.tokenizers)
        example = objective.arrange(bound, Sample(tokens, label=label))
        answer = head_predictions.run_head(model, objective, [(0, example)])[0]
        begin, end = (content @ head.scores.weight.T.double() + head.scores.bias.double()).T
        first, last = [0, 0]
        if row["json"]["label"]:
            lengths = [0, *tokenizer.token_bytes(tokenizer.encode(context)), 0]
            token_of_byte = [token for token, length in enumerate(lengths) for _ in range(length)]
            first, last = token_of_byte[5], token_of_byte[4 + len(words[0].encode())]
        likelihoods = begin.log_softmax(0)[prompt + first], end.log_softmax(0)[prompt + last]
        expected.append(-(likelihoods[0] + likelihoods[1]) / 2)
        count = len(content) - prompt
        places = [(i, j) for i in range(1, count) for j in range(i, min(i + 5, count))]
        pairs = {(i, j): float(begin[prompt + i] + end[prompt + j]) for i, j in places}
        best = max(pairs, key=pairs.__getitem__)
        assert tuple(answer[0, :2].int().tolist()) == best
        none = float(begin[prompt] + end[prompt])
        assert float(answer[0, 2]) == pytest.approx(pairs[best] - none, abs=1e-5)
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_an_answer_comes_back_as_it_was_marked(base):
    """Every run of words of a text, to tokens and back: the same characters."""
    model = with_head(base, own={"head": "span", "max_answer_tokens": 50})
    head, tokenizer = model.heads["own"], model.tokenizers["text"].replace(max_tokens=200)
    for text in TEXTS:
        whole = f"Où ça?\n{text}"
        tokens = {"text": tokenizer.read(whole)[0]}
        view = supervised.view_text({"txt": whole.encode()}, tokens, {"text": tokenizer}, False)
        edges = [m.span() for m in re.finditer(r"\S+", whole)]
        for start, _ in edges:
            for _, end in edges:
                if start < end:
                    label, _ = head.encode(head.config, {"start": start, "end": end}, view)
                    found = head.decode(torch.cat([label[0].float(), torch.ones(1)])[None], view)
                    assert (found["start"], found["end"], found["answer"]) == (start, end, whole[start:end])
    for wrong in ({"start": 3, "end": 3}, {"start": 0, "end": 999}, {"start": "x", "end": 2}, "Ana"):
        with pytest.raises(mmfm.errors.SampleError, match="is no place in the text"):
            head.encode(head.config, wrong, view)


def test_numbers_by_hand(base):
    model = with_head(base, own={"head": "regress", "mean": 5.0, "std": 2.0})
    values = [1.0, 5.5, -3.0, 9.0]
    rows = [{"txt": text.encode(), "json": {"label": value}} for text, value in zip(TEXTS, values, strict=True)]
    loss, vectors, _ = score(model, "own", rows)
    head = model.heads["own"].double()
    said = [float(head.value(content.mean(0))) * 2 + 5 for content in vectors]
    assert loss == pytest.approx(np.mean([((a - b) / 2) ** 2 for a, b in zip(said, values, strict=True)]), rel=1e-5)


def test_a_fused_pair_after_learned_tokens(base):
    """Tokens, picture and text are one sequence in this order, and each of them counts."""
    model = with_head(base, 2, own={"head": "classify", "classes": ["x", "y"]})
    rows = [{"jpg": jpeg("red"), "txt": b"a red square", "json": {"label": "x"}}]
    loss, (content,), _ = score(model, "own", rows, ("image", "text"))
    sizes = [len(model.tokenizers[m].read(rows[0])[0]) for m in ("image", "text")]
    assert len(content) == 2 + sum(sizes)
    made = model.heads["own"].double().logits(content.mean(0))
    assert loss == pytest.approx(-float(made.log_softmax(0)[0]), rel=1e-5)
    for name, other in (("jpg", jpeg("blue")), ("txt", b"a blue square")):
        model.heads["own"].float()
        assert score(model, "own", [{**rows[0], name: other}], ("image", "text"))[0] != pytest.approx(loss, rel=1e-6)


# Regularization and rates


def test_rates_fall_with_depth(base):
    """timm's groups against the rule: the decay to the power of the layers above, of which the head is the last; the
    last norm goes with the last block."""
    from multimodal_fm.train import optim

    model = with_head(base, own={"head": "classify", "classes": ["x", "y"]})
    trained = torch.nn.ModuleDict({"model": model})
    (optimizer,) = optim.build(optim.Config(name="adamw", lr=1.0, layer_decay=0.5), trained, model.backbone)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    depth = len(model.backbone.blocks)
    for name, own in rates.items():
        block = re.match(r"backbone\.blocks\.(\d+)", name)
        above = depth - int(block[1]) if block else depth + 1
        above = {"backbone.norm_out.weight": 1}.get(name, 0 if name.startswith("heads") else above)
        assert own == pytest.approx(0.5**above), name


def test_drop_path_skips_whole_sequences_in_training_alone(base):
    model = with_head(base, own={"head": "classify", "classes": ["x", "y"]})
    plain = model.features(text=["a red square"] * 6)["text"]
    model.backbone.blocks[1].drop_path = 0.5
    assert torch.equal(model.features(text=["a red square"] * 6)["text"], plain)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.cat([model.features(text=["a red square"] * 6)["text"] for _ in range(8)])
    distinct = torch.unique((drawn * 1e4).round(), dim=0)
    assert 2 <= len(distinct) <= 4  # each of two branches is there, twice as strong, or not


def test_a_folded_probe_is_scikit_learns(base, parts, tmp_path):
    """The head on the raw features against scikit-learn's pipeline on standardized ones."""
    from sklearn.linear_model import LogisticRegression

    result = tuned(base, parts, tmp_path / "run", "probe")
    plain, model = mmfm.load(base), mmfm.load(tmp_path / "run")
    data = {name: list(mmfm.samples(parts[name])) for name in ("train", "test")}
    with torch.no_grad():
        x = {
            name: plain.features(image=[s["jpg"] for s in own])["image"].double().numpy() for name, own in data.items()
        }
    y = [json.loads(s["json"])["color"] for s in data["train"]]
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    probe = LogisticRegression(C=result["C"], max_iter=300).fit((x["train"] - mean) / std, y)
    expected = probe.predict_proba((x["test"] - mean) / std)
    said = model.classify([s["jpg"] for s in data["test"]], modality="image")
    found = np.array([[one["probabilities"][name] for name in probe.classes_] for one in said])
    assert np.abs(found - expected).max() < 2e-3
    rows = predictions.read(tmp_path / "run")["test"]
    assert [row["predicted"] for row in rows] == [one["label"] for one in said]


# Model.classify


def test_classify_by_names(base, tmp_path):
    """Without training: the classes' sentences, by cosines, as computed here by hand; whatever a thing is given as."""
    from PIL import Image

    model = mmfm.load(base)
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "a.flac").write_bytes(tone(440))
    pixels = np.array(Image.open(tmp_path / "a.jpg"))
    things = [str(tmp_path / "a.jpg"), tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg"), pixels, tmp_path / "a.flac",
              (np.sin(np.arange(8000) / 9), 16_000), "a red square"]  # fmt: skip
    labels = ["red", "dark_blue"]
    found = model.classify(things, labels=labels, templates=["{}", "a {} thing"])
    vectors = model.embed(text=["red", "a red thing", "dark blue", "a dark blue thing"])["text"].double().view(2, 2, -1)
    classes = torch.nn.functional.normalize(vectors.mean(1), dim=1)
    for thing, modality, one in zip(things, ["image"] * 4 + ["audio"] * 2 + ["text"], found, strict=True):
        own = model.embed(**{modality: [thing]})[modality].double()
        expected = (100 * own @ classes.T).softmax(1)[0].tolist()
        assert list(one["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
        assert one["label"] == labels[int(np.argmax(expected))]
    assert [one["probabilities"] for one in found[:4]] == [found[0]["probabilities"]] * 4


@pytest.mark.parametrize(
    "things, settings, said",
    [
        (["a text"], {}, "no head 'classify'"),
        (["a text"], {"labels": ["one"]}, "at least two different names"),
        (["a text"], {"labels": "cat"}, "at least two different names"),
        (["a text"], {"labels": ["x", "y"], "templates": ["no place"]}, "has no {}"),
        (["none.jpg"], {"labels": ["x", "y"]}, "there is no file 'none.jpg'"),
        ([3.5], {"labels": ["x", "y"]}, r"things\[0\] is a float"),
        ([{"image": b"no picture"}], {"labels": ["x", "y"]}, r"things\[0\]"),
        ([{"smell": "x"}], {"labels": ["x", "y"]}, "modality 'smell'"),
        ([{"image": b"", "text": "x"}], {"labels": ["x", "y"]}, "a pair needs a trained head"),
        ("a text", {"labels": ["x", "y"]}, "give a list of things"),
    ],
)
def test_what_classify_refuses(base, things, settings, said):
    with pytest.raises(UserError, match=said) as raised:
        mmfm.load(base).classify(things, **settings)
    assert "\n" not in str(raised.value)


def test_classify_on_the_command_line(base, adapted, tmp_path, capsys):
    picture = str(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    app(["classify", str(base), picture, "--labels", "red", "blue", "--json"], result_action="return_value")
    one = json.loads(capsys.readouterr().out)
    assert one["thing"] == picture and one["probabilities"].keys() == {"red", "blue"}
    app(["classify", str(adapted[0]), picture], result_action="return_value")
    assert re.fullmatch(r".*a\.jpg  \S.* [01]\.\d{3}\n", capsys.readouterr().out)


# The page


def test_the_page_without_its_shards_and_of_a_stranger(base, parts, tmp_path, capsys):
    import shutil

    folder = tmp_path / "own"
    folder.mkdir()
    own = {name: shutil.copy(path, folder) for name, path in parts.items()}
    tuned(base, own, tmp_path / "run", "zero-shot")
    before = read_page(tmp_path / "run")
    assert "<img" in before
    signature = tmp_path / "run" / "SIGNATURE"
    kept = signature.read_bytes()
    signature.write_text("0" * 64)
    app(["report", str(tmp_path / "run")], result_action="return_value")
    text = read_page(tmp_path / "run")
    assert "report.html" in capsys.readouterr().out and "<img" not in text and "--trust" in text
    app(["report", str(tmp_path / "run"), "--trust"], result_action="return_value")
    assert read_page(tmp_path / "run") == before
    signature.write_bytes(kept)
    shutil.rmtree(folder)
    app(["report", str(tmp_path / "run")], result_action="return_value")
    text = read_page(tmp_path / "run")
    assert "no file matches" in text and "<img" not in text and "sample0" in text


def test_the_command_of_a_page_does_the_same(base, parts, tmp_path, capsys):
    import shlex

    first = tuned(base, parts, tmp_path / "run", "probe", shots=3, seed=2)
    line = page.command(tmp_path / "run", page.read(tmp_path / "run"))
    words = shlex.split(line)
    words = words[words.index("tune") :]
    assert f"run_dir={tmp_path / 'run'}-again" in words and str(parts["validation"]) in words
    capsys.readouterr()
    app([*words, "--json"], result_action="return_value")
    again = json.loads(capsys.readouterr().out)
    assert again["test"] == first["test"] and again["run"] == f"{tmp_path / 'run'}-again"


def test_answers_are_marked_where_they_stand():
    words = "Who?\n" + "x" * 400 + " Ana met Bo. " + "y" * 400
    start = words.index("Ana")
    row = {"predicted": "met Bo", "label": "Ana met"}
    pieces = page.marked_answers(words, {"start": start, "end": start + 7}, row)
    assert [(text, kind) for text, kind in pieces if kind] == [
        ("Who?\n", "question"), ("Ana ", "right"), ("met", "both"), (" Bo", "said"),
    ]  # fmt: skip
    assert sum(len(text) for text, _ in pieces) < 400


def test_confusions_and_calibration():
    pairs = [("a", "a")] * 6 + [("a", "b")] * 2 + [("b", "a")] * 3 + [("10", "2")]
    assert page.order_classes(pairs) == ["a", "b", "2", "10"]
    assert page.confusions(pairs) == [("b", "a", 3, 1.0), ("a", "b", 2, 0.25), ("10", "2", 1, 1.0)]
    rows = page.matrix(pairs, ["a", "b"])
    assert [cell[:2] for cell in rows[0]["cells"]] == [(6, 0.75), (2, 0.25)]
    said = [{"confidence": c, "score": s} for c, s in ((0.9, 1), (1.0, 0), (0.2, 0))]
    shown = page.calibration("classify", said)
    assert shown and shown["said"] == "mean confidence 0.700, accuracy 0.333"


def test_what_a_tune_refuses_in_one_line(base, parts, tmp_path, corpus):
    def refused(said, run=base, task="image-classification", **settings):
        with pytest.raises(UserError, match=said) as error:
            given = (settings.pop("how", "full"), parts["validation"], parts["test"])
            mmfm.tune(run, parts["train"], task, *given, run_dir=str(tmp_path / "run"), label="color", **settings)
        assert "\n" not in str(error.value)

    text_alone = tmp_path / "text-alone"
    loop.pretrain(build(text_only(corpus, text_alone, steps=1)))
    refused("reads text, not image, which image-classification needs", run=text_alone)
    refused("--how names no way of adapting: 'lorra' .did you mean lora", how="lorra")
    refused("--task names no task", task="image-classificatoin")
    refused("--shots is a whole number", shots=3)
    refused("a random start needs --like RUN", run="none")
    refused("a random start has none", run="none", like=str(base), rehearsal=0.5)
    refused("--rehearsal is a share from 0 to 1", rehearsal=2.0)
    refused("--shots 99: class", how="prototypes", shots=99)
