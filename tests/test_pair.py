"""Whether two parts belong together: how texts are cut, where the other part comes from, and the loss."""

import collections

import pytest
import torch
from conftest import dataset_of, text_only, tiny
from test_latent import MODALITIES, make_model, make_sample
from test_train import fit

from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Example, Sample, collate, count_targets
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import masked, pair
from multimodal_fm.tokenizers import text as text_tokenizer
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train.config import build

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "pieces, starts",
    [
        (["", "It", " rains", ".", " We", " stay", ".", ""], [4]),
        (["", "Is", " it", "?", '"', " No", "!", "\n", "Yes", ""], [5, 8]),
        (["", "no", " sent", "ence", " here", ""], [2, 4]),  # then words
        (["", "One", ". ", "Two", ""], [3]),
        (["", "3", ".", "5", " kg", ""], [4]),  # a point within a number ends nothing
        (["", "word", ""], []),
        (["", " word", "\n", ""], []),
    ],
)
def test_sentences_begin_where_one_ends(pieces, starts):
    assert pair.find_starts(pieces) == starts


def text(ids: list[int]):
    position = torch.zeros(len(ids), 3)
    position[:, 0] = torch.arange(len(ids))
    return make_sequence(torch.tensor(ids), position)


def test_segments_are_one_sequence_whose_second_stands_in_a_row_of_its_own():
    own, other = text([0, 10, 11, 12, 13, 14, 1]), text([0, 20, 21, 22, 23, 24, 25, 26, 27, 1])
    same = pair.join_segments(own, 3, own, 3)
    assert same.content.tolist() == [0, 10, 11, 1, 12, 13, 14, 1]
    assert same.position[:, 0].tolist() == list(range(8)) and same.position[:, 1].tolist() == [0] * 4 + [1] * 4
    mixed = pair.join_segments(own, 3, other, 2)
    assert mixed.content.tolist() == [0, 10, 11, 1, 21, 22, 23, 1]  # no longer than what it stands for
    short = pair.join_segments(own, 3, text([0, 20, 21, 1]), 2)
    assert short.content.tolist() == [0, 10, 11, 1, 21, 1]
    assert set(mixed.order.tolist()) == set(mixed.sequence.tolist()) == {0}


def test_segments_of_a_causal_text_are_causal():
    own = text([0, 10, 11, 12, 1])
    joined = pair.join_segments(own.replace(order=torch.arange(5)), 2, own, 2)
    assert joined.order.tolist() == list(range(len(joined)))


@pytest.mark.parametrize(
    "positions, said",
    [
        ({"max_positions": 17}, r"set backbone.grid=\[2, 1\]"),
        ({"max_positions": 17, "grid": [1, 4]}, r"set backbone.grid=\[2, 1\]"),
        ({"max_positions": 16, "grid": [2, 1]}, "set backbone.max_positions=17"),
    ],
)
def test_learned_positions_must_have_some_for_the_second_segment(positions, said):
    def make(**backbone):
        config = BackboneConfig(width=16, depth=1, num_heads=2, block="classic", **backbone)
        model = Model(ModelConfig({"text": text_tokenizer.Tokenizer(text_tokenizer.Config(max_tokens=16))}, config))
        return model, pair.Objective(pair.Config(), model, ["text"])

    with pytest.raises(ValueError, match=said):
        make(**positions)
    model, _ = make(max_positions=17, grid=[2, 1])
    whole = text([0, *range(10, 24), 1])
    joined = pair.join_segments(whole, 8, whole, 8)
    assert len(joined) == 17, "one END more than the longest text"
    with torch.no_grad():
        both, one = (
            model(model.collate({"t": [(0, Example([tokens], [None]))]}, {"t": {}})).tokens.content
            for tokens in (joined, joined.replace(position=joined.position * torch.tensor([1.0, 0.0, 0.0])))
        )
    assert not torch.allclose(both, one), "the segments are told apart"


def make_stories(folder, count: int = 40) -> str:
    """Texts of three sentences, each of which names its story: `amber 7 a. amber 7 b. amber 7 c.`"""
    made = []
    for i in range(count):
        name = f"{WORDS[i % 8]} {i}"
        made.append({"__key__": f"story{i:03d}", "txt": " ".join(f"{name} {part}." for part in "abc")})
    shards.write(folder / "stories.tar", made)
    return str(folder / "stories.tar")


@pytest.fixture
def next_sentences(tmp_path, corpus):
    """A stream of stories for BERT's two tasks, and their tokenizer."""
    data = text_only(corpus, tmp_path, microbatches=2)
    data["sources"] = {"all": {"shards": make_stories(tmp_path)}}
    objectives = {"masked": {"mask_ratio": 0.15}, "pair": {}}
    bert = {"objectives": objectives, "modalities": ["text"], "batch_size": 16, "sources": ["all"]}
    data["tasks"] = {"bert": bert}
    data["model"]["tokenizers"]["text"]["max_tokens"] = 64
    config, corpora = fit(data, tmp_path)
    return dataset_of(config, corpora), config.model.tokenizers["text"]


def sequences(batch, task: str):
    """(match, original ids, segment by row) of each sequence; what is hidden is read from the targets."""
    content = batch.content["text"][batch.tokens.content].clone()
    targets = batch.tasks[task]
    content[targets.rows["text"]] = targets.tokens["text"].content
    for number, match in zip(targets.sequence.tolist(), targets.match.tolist(), strict=True):
        own = batch.tokens.sequence == number
        yield match, content[own].tolist(), batch.tokens.position[own, 1].tolist()


def test_half_of_the_second_segments_are_of_another_sample(next_sentences):
    stream, tokenizer = next_sentences
    met = collections.Counter()
    for step in range(12):
        data = stream[step]
        assert data.counts["bert"][""] == 16 and len(data.batches) == 2
        for batch in data.batches:
            for match, ids, rows in sequences(batch, "bert"):
                cut = rows.index(1.0)
                first, second = tokenizer.decode(ids[:cut]).split(), tokenizer.decode(ids[cut:]).split()
                assert (first[:2] == second[:2]) == bool(match) and ids.count(1) == 2 and ids[0] == 0
                if match:  # the second goes on where the first ends
                    assert first[0::3] + second[0::3] == first[:1] * 3
                    assert "".join(first[2::3] + second[2::3]) == "a.b.c."
                met[match] += 1
    assert sum(met.values()) == 192 and 75 < met[1] < 117


def test_the_same_step_reads_the_same_second_samples(next_sentences):
    stream, _ = next_sentences
    one, again, next_one = ([list(sequences(b, "bert")) for b in stream[step].batches] for step in (3, 3, 4))
    assert one == again and one != next_one


def test_matching_takes_one_modality_of_another_sample(tmp_path, corpus):
    data = tiny(corpus, run_dir=str(tmp_path))
    data["sources"]["all"].pop("group")
    task = {"modalities": ["image", "text"], "batch_size": 16, "sources": ["all"]}
    data["tasks"] = {"match": {"objectives": {"masked": {"fuse": True}, "pair": {"kind": "matching"}}, **task}}
    data["tasks"] |= {"plain": {"objectives": {"pair": {"kind": "matching"}}, **task}}
    config, corpora = fit(data, tmp_path)
    stream, found = dataset_of(config, corpora), collections.Counter()
    texts = {
        f"all/sample{i:04d}": f"a {['red', 'green', 'blue', 'yellow'][i % 4]} square number {i}" for i in range(32)
    }
    for step in range(4):
        data = stream[step]
        names = {(task, position): name for task, position, name in data.samples}
        for task in ("match", "plain"):
            targets = data.batches[0].tasks[task]
            content = data.batches[0].content["text"][
                data.batches[0].tokens.content.clamp(max=len(data.batches[0].content["text"]) - 1)
            ]
            if task == "match":
                content[targets.rows["text"]] = targets.tokens["text"].content
            for number, match, position in zip(targets.sequence, targets.match.tolist(), targets.table.sample.tolist()):
                rows = (data.batches[0].tokens.sequence == number) & (data.batches[0].tokens.modality == 0)
                said = config.model.tokenizers["text"].decode(content[rows].tolist())
                assert texts[names[task, position]].startswith(said) == bool(match)
                found[task, match] += 1
    assert all(18 < count < 46 for count in found.values()) and len(found) == 4


def test_a_sample_without_another_one_is_lost_and_named(tmp_path, corpus):
    """Samples of one group, which says that they mean the same, are no two."""
    data = text_only(corpus, tmp_path)
    stories = [{"__key__": f"s{i}", "txt": f"part {i}. more.", "json": {"story": "one"}} for i in range(4)]
    shards.write(tmp_path / "one.tar", stories)
    data["sources"] = {"all": {"shards": str(tmp_path / "one.tar"), "group": "story"}}
    data["tasks"]["words"]["objectives"]["pair"] = {}
    config, corpora = fit(data, tmp_path)
    step = dataset_of(config, corpora)[0]
    assert not step.samples and {row["reason"] for row in step.errors} == {"alone"}


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_the_loss_is_the_formula(pool):
    model = make_model(0)
    objective = pair.Objective(
        pair.Config(pool=pool, kind="matching", modality="text"), model, ["text", "audio"]
    ).double()
    examples = []
    for i in range(7):
        sample = Sample(make_sample(audio=4 + i, text=3).tokens, other=make_sample(text=5 + i))
        sample = objective.prepare(objective.config, sample, seeded(i)) if i else sample  # the first is not asked
        example = masked.Objective.arrange(masked.Config(fuse=True), sample, seeded(i))
        examples.append(type(example)(**{**vars(example), "match": sample.match}))
    counts = count_targets(examples, MODALITIES)
    batch = collate({"task": list(enumerate(examples))}, MODALITIES, {"task": counts}, round_to=16)
    output, targets = model(batch), batch.tasks["task"]
    loss, figures = objective.loss(output, targets)
    assert targets.num_matches == 6 and set(targets.counts) == {"text", "audio"}
    losses, right = [], 0
    for number, example in enumerate(examples):
        rows = output.tokens.content[batch.tokens.sequence == number]
        if example.match >= 0:
            vector = rows[0] if pool == "first" else rows.mean(0)
            logits = objective.classifier(vector)
            losses.append(torch.logsumexp(logits, 0) - logits[example.match])
            right += int(logits.argmax()) == example.match
    assert float(loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), abs=1e-9)
    assert float(figures["accuracy"]) == pytest.approx(right / 6) and {e.match for e in examples} == {-1, 0, 1}


def test_a_text_of_one_word_is_read_and_not_asked():
    sample = Sample(make_sample(text=3).tokens, label=[], other=make_sample(text=4))
    assert pair.Objective.prepare(pair.Config(), sample, seeded(0)) is sample


def problems(corpus, objectives: dict, modalities: list[str]) -> str:
    data = tiny(corpus)
    data["tasks"] = {"t": {"objectives": objectives, "modalities": modalities, "batch_size": 4, "sources": ["all"]}}
    with pytest.raises(UserError) as caught:
        build(data)
    return str(caught.value)


@pytest.mark.parametrize(
    "objectives, modalities, said",
    [
        ({"pair": {}}, ["text", "image"], "tasks.t.objectives.pair.modality must be all that the task reads"),
        ({"pair": {"kind": "matching"}}, ["text"], "tasks.t.modalities must be at least two"),
        ({"masked": {}, "pair": {"kind": "matching"}}, ["text", "image"], "needs all modalities of a sample in one"),
        (
            {"pair": {"kind": "matching", "modality": "audio"}},
            ["text", "image"],
            "modality names no modality of the task",
        ),
        ({"contrastive": {"views": 2}, "latent": {}}, ["text"], "tasks.t.objectives.latent must stand first"),
        ({"masked": {}, "contrastive": {"views": 2}}, ["text"], "objectives.contrastive.views must be 1 where masked"),
        ({"latent": {"num_masks": 2}, "contrastive": {}}, ["text", "image"], "needs a sequence for each modality"),
        ({"supervised": {"head": "x"}, "pair": {}}, ["text"], "can have only one that reads labels"),
        ({"latent": {"mask_ratio": {"speech": 0.5}}}, ["text"], "mask_ratio names no modality of the task: speech"),
        ({"latent": {"num_masks": 0}}, ["text"], "num_masks, mask_block and keep_block are at least 1"),
        ({"contrastive": {"views": 3}}, ["text"], "views is 1 or 2"),
    ],
)
def test_settings_that_do_not_fit_are_named(corpus, objectives, modalities, said):
    assert said in problems(corpus, objectives, modalities)
