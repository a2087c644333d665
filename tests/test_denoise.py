"""BART, T5 and UL2: what the noises take out against the papers' formulas, the way back, the loss, the order tables;
the tokenizer's sentinels, blocks of documents, and tasks as text."""

import collections
import io
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import jpeg, records, samples, text_only, tone

from multimodal_fm import config as configuration
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Sample, collate, count_targets
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config as Source
from multimodal_fm.corpus.shards import Corpus
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.evals import text_to_text as ranking
from multimodal_fm.evals.embed_corpus import embed_corpus
from multimodal_fm.inspect.orders import arrange, format_table
from multimodal_fm.inspect.run import inspect
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import denoise, masked, text_to_text
from multimodal_fm.objectives.denoise import MASK, Bound, Config, Noise, Objective
from multimodal_fm.pack.run import pack
from multimodal_fm.pack.settings import Settings
from multimodal_fm.tokenizers import base, text
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train.config import build, load
from multimodal_fm.train.loop import pretrain

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))
STORY = "The red fox ran. It saw a hen! Was it a good hen? It was the best hen of all, and the fox went home. " * 3
BART = {"infilling": Noise("infilling", 0.3, permute_sentences=True)}
UL2 = {
    "r": Noise("spans", 0.15, 3, prefix="[R]", weight=2),
    "x": Noise("spans", 0.5, 8, prefix="[X]", weight=1),
    "s": Noise("prefix", 0.25, prefix="[S]", weight=1),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Text with a few merges and 40 sentinels."""
    made = text.Tokenizer(text.Config(vocab_size=340, max_tokens=96, sentinels=40))
    return made.fit([{"txt": STORY.encode()}] * 4, tmp_path_factory.mktemp("merges") / "text")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def read(tokenizer, written=STORY, seed=0):
    return tokenizer.read(written, random.Random(seed))[0]


def noisy(tokenizer, noises, seed=0, written=STORY):
    """An example, and the raw sequence that it is of."""
    tokens = read(tokenizer, written, seed)
    bound = Bound(Config(noises=noises), {"text": tokenizer})
    return Objective.arrange(bound, Sample({"text": tokens}), seeded(seed)), tokens.content.tolist()


def source_of(example):
    """The ids that the source shows, -1 where it is hidden."""
    ids = []
    for piece, hidden in zip(example.inputs[:-1], example.hidden[:-1], strict=True):
        hide = torch.zeros(len(piece), dtype=torch.bool) if hidden is None else hidden
        ids += torch.where(hide, -1, piece.content).tolist()
    return ids


def t5_counts(length, density, mean):
    """`random_spans_noise_mask` of T5's preprocessors: how many tokens and how many spans it takes out."""
    length = max(length, 2)
    noise = min(max(round(float(length) * density), 1), length - 1)
    return noise, max(round(float(noise) / mean), 1)


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.15, 64.0)])
def test_spans_are_as_many_and_as_long_as_t5_takes_out(density, mean):
    noise = Noise("spans", density, mean)
    for length in (2, 3, 7, 20, 64, 512):
        mask = denoise.mask_spans(noise, length, seeded(length))
        count, spans = t5_counts(length, density, mean)
        starts = mask & ~F.pad(mask, (1, 0))[:-1]
        assert len(mask) == length and int(mask.sum()) == count and int(starts.sum()) == min(spans, length - count)
        assert not mask[0] and mask[-1], "a kept span comes first, a taken one last"
    assert denoise.mask_spans(noise, 1, seeded()).tolist() == [False]


def test_each_way_to_cut_into_spans_is_equally_likely():
    """T5's `_random_segmentation`: of 7 tokens taken from 12 in 3 spans, all 15 lengths come equally often."""
    noise, generator = Noise("spans", 7 / 12, 7 / 3), seeded()
    found = collections.Counter()
    for _ in range(1500):
        mask = denoise.mask_spans(noise, 12, generator)
        found[tuple(len(list(own)) for taken, own in itertools.groupby(mask.tolist()) if taken)] += 1
    assert len(found) == math.comb(6, 2) and all(sum(lengths) == 7 for lengths in found)
    chi_square = sum((count - 100) ** 2 / 100 for count in found.values())
    assert chi_square < 36.1  # 14 degrees of freedom, p = 0.001


def restore(source, target, sentinels):
    """The text of a source in which each sentinel is replaced by what follows it in the target."""
    spans, current = {}, None
    for one in target:
        if one in sentinels:
            current = one
            assert one not in spans, "a sentinel stands once in the target"
            spans[one] = []
        else:
            spans[current].append(one)
    restored = []
    for one in source:
        restored += spans[one] if one in sentinels else [one]
    return restored, list(spans)


@pytest.mark.parametrize("noise", [Noise(), Noise("spans", 0.5, 3), Noise("spans", 0.15, 64)])
def test_the_inverse_restores_the_text(tokenizer, noise):
    for seed in range(20):
        example, original = noisy(tokenizer, {"spans": noise}, seed)
        sentinels = list(tokenizer.sentinels)
        [target] = example.targets
        assert target.content[-1] == text.END
        restored, used = restore(source_of(example), target.content[:-1].tolist(), set(sentinels))
        assert restored == original
        assert used == sentinels[: len(used)] and target.content[-2] == used[-1], "in order, and the last one closes"
        assert tokenizer.decode(restored) == tokenizer.decode(original) != tokenizer.decode(source_of(example))
        assert [one for one in source_of(example) if one in sentinels] == used[:-1]


def test_infilling_is_barts():
    """30 % of the tokens go, in spans of Poisson(3) tokens that are one mask each; empty spans insert one."""
    noise, generator, lengths = Noise("infilling", 0.3), seeded(), []
    for _ in range(200):
        rows = denoise.infill(noise, 200, generator)
        kept = rows[rows >= 0]
        assert len(kept) == 140 and (kept.diff() > 0).all()
        gaps = collections.Counter()  # masks that stand before each kept token, and tokens that are missing there
        at = torch.cat([torch.tensor([-1]), kept, torch.tensor([200])])
        missing = (at.diff() - 1).tolist()
        place = 0
        for row in rows.tolist():
            gaps[place] += row == MASK
            place += row != MASK
        for place, lost in enumerate(missing):
            assert bool(lost) <= gaps[place], "each span is one mask token"
            lengths += [lost] * bool(lost) + [0] * (gaps[place] - bool(lost))
    share = np.bincount(lengths, minlength=16) / len(lengths)
    poisson = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(16)])
    assert np.abs(share[:8] - poisson[:8]).max() < 0.02  # the last span of each text is cut to fit
    assert np.mean(lengths) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("ratio, length", [(1.0, 30), (0.95, 30), (0.3, 1), (0.0, 5), (0.3, 2)])
def test_infilling_at_the_edges(ratio, length):
    for seed in range(20):
        rows = denoise.infill(Noise("infilling", ratio), length, seeded(seed))
        assert (rows >= 0).sum() == length - round(ratio * length)
        assert ((rows == MASK).any()) == (round(ratio * length) > 0)


def test_barts_target_is_the_original_and_its_sentences_are_permuted(tokenizer):
    """Without infilling the source has the same sentences, each whole, in any order."""
    orders = set()
    for seed in range(30):
        only = {"permute": Noise("infilling", 0.0, permute_sentences=True)}
        example, original = noisy(tokenizer, only, seed, STORY[:100])
        assert example.targets[0].content.tolist() == original[1:]
        shown = source_of(example)
        assert shown[0] == text.BEGIN and shown[-1] == text.END and sorted(shown) == sorted(original)
        whole = tokenizer.decode(original)
        sentences = [sentence for sentence in whole.replace("!", ".").replace("?", ".").split(".") if sentence]
        found = tokenizer.decode(shown).replace("!", ".").replace("?", ".")
        assert all(sentence in found for sentence in sentences) and len(sentences) == 4
        orders.add(tuple(sorted(range(4), key=lambda i: found.index(sentences[i]))))
        example, original = noisy(tokenizer, BART, seed)
        assert example.targets[0].content.tolist() == original[1:] and -1 in source_of(example)
        assert not set(source_of(example)) & set(tokenizer.sentinels)
    assert len(orders) > 10


def test_sentences_are_moved_whole():
    """A sentence closes with the token that ends it; each order of three comes."""
    ends = torch.tensor([False, True, False, False, True, False])
    found = {tuple(denoise.permute_sentences(ends, seeded(seed)).tolist()) for seed in range(60)}
    assert found == {sum(order, ()) for order in itertools.permutations([(0, 1), (2, 3, 4), (5,)])}


def test_sentences_end_where_they_do(tokenizer):
    ids = tokenizer.encode('He said "no." Then? 3.5 km!')
    ends = tokenizer.sentence_ends(torch.tensor([*ids, text.END, tokenizer.sentinels[0]])).tolist()
    words = [tokenizer.decode([i]) for i in ids]
    assert "".join(words[: ends.index(True) + 1]).startswith('He said "no.') and ends[-2:] == [True, False]
    assert sum(ends) >= 4


def test_the_prefix_denoiser_goes_on_where_the_source_was_cut(tokenizer):
    shares = []
    for seed in range(200):
        example, original = noisy(tokenizer, {"s": Noise("prefix", 0.25)}, seed)
        shown, target = source_of(example), example.targets[0].content.tolist()
        assert shown + target == original and shown[0] == text.BEGIN and len(shown) > 1 and len(target) > 1
        shares.append((len(target) - 1) / (len(original) - 2))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02) and max(shares) < 0.52 and min(shares) < 0.03


def test_a_mixture_of_denoisers_draws_by_weight(tokenizer):
    """UL2: each sample is opened by its denoiser's mode token and made noisy as that one says."""
    found, sentinels = collections.Counter(), set(tokenizer.sentinels)
    for seed in range(200):
        example, original = noisy(tokenizer, UL2, seed)
        shown = source_of(example)
        mode = tokenizer.decode(shown)[1]
        found[mode] += 1
        prefix = [text.BEGIN, *tokenizer.encode(f"[{mode}]")]
        assert shown[: len(prefix)] == prefix
        rest, target, length = shown[len(prefix) :], example.targets[0].content.tolist(), len(original) - 2
        if mode == "S":
            assert rest + target == original[1:]
            continue
        restored, used = restore(rest, target[:-1], sentinels)
        assert restored == original[1:]
        count, spans = t5_counts(length, *((0.15, 3) if mode == "R" else (0.5, 8)))
        assert len(used) == spans + 1 and len(target) == count + spans + 2
    assert found["R"] == pytest.approx(100, abs=28) and found["S"] == pytest.approx(50, abs=25)


def make_model(tokenizer, **backbone) -> Model:
    torch.manual_seed(0)
    config = ModelConfig({"text": tokenizer}, BackboneConfig(**{"width": 24, "depth": 2, "num_heads": 2, **backbone}))
    return Model(config)


def make_batch(examples, tokenizer):
    return collate({"task": list(enumerate(examples))}, ["text"], {"task": count_targets(examples, ["text"])})


def recompute(model, objective, example):
    """The negative log-likelihood (L,) of each target token in float64: one reading for each of them, of the source and
    of the target so far alone, token by token, so that nothing later can be seen."""
    *source, target = example.inputs
    nats = []
    for i, answer in enumerate(example.targets[0].content.tolist()):
        seen = target.select(torch.arange(i + 1))
        hidden = [*example.hidden[:-1], None]
        part = type(example)([*source, seen], hidden)
        batch = collate({"task": [(0, part)]}, ["text"], {"task": {}})
        output = model(batch)
        [row] = ((output.tokens.order == i + 1).nonzero()[:, 0]).tolist()
        layer = objective.predictors["text"].logits
        logits = (layer.weight.detach() @ output.tokens.content[row].detach() + layer.bias.detach()).tolist()
        most = max(logits)
        nats.append(math.log(math.fsum(math.exp(one - most) for one in logits)) + most - logits[answer])
    return nats


@pytest.mark.parametrize("noises", [{"spans": Noise()}, BART, UL2], ids=["t5", "bart", "ul2"])
@torch.no_grad()
def test_the_loss_equals_a_slow_recomputation(tokenizer, noises):
    model = make_model(tokenizer).double()
    objective = Objective(Config(noises=noises), model, ["text"]).double()
    examples = [noisy(tokenizer, noises, seed, STORY[seed : seed + 30 + 9 * seed])[0] for seed in range(3)]
    loss, figures = objective.loss(
        model(make_batch(examples, tokenizer)), make_batch(examples, tokenizer).tasks["task"]
    )
    nats = [recompute(model, objective, example) for example in examples]
    expected = sum(map(sum, nats)) / sum(map(len, nats))
    assert float(loss) == pytest.approx(expected, abs=1e-9) and float(figures["text"]) == float(loss)
    assert not objective.has_likelihood("text"), "the target's, given a source, is no likelihood of a text"


def test_a_predicted_token_is_not_seen_and_the_source_is(tokenizer):
    model = make_model(tokenizer)
    example, _ = noisy(tokenizer, {"spans": Noise()})

    def answers(piece, row):
        """The rows that answer, after another id stands in a row of a piece of the inputs."""
        inputs = [one.replace(content=one.content.clone()) for one in example.inputs]
        inputs[piece].content[row] = (inputs[piece].content[row] + 1) % 300
        changed = type(example)(inputs, example.hidden, example.targets, example.rows)
        batch = make_batch([changed], tokenizer)
        return model(batch).tokens.content.index_select(0, batch.tasks["task"].rows["text"])

    before = answers(1, 5)
    after = answers(1, 6)
    moved = (before - after).abs().amax(1)
    assert (moved[:5] == 0).all() and (moved[5:] > 1e-6).all()
    assert ((before - answers(0, 3)).abs().amax(1) > 1e-6).all()


def test_the_order_table_is_that_of_a_prefix_language_model(tokenizer):
    for noises in ({"spans": Noise()}, BART, UL2):
        example, _ = noisy(tokenizer, noises, 3)
        *source, target = example.inputs
        assert all(not piece.order.any() for piece in source)
        assert target.order.tolist() == list(range(1, len(target) + 1))
        assert target.content[0] == text.BEGIN and example.hidden[-1] is None
        times = torch.cat([piece.position[:, 0] for piece in example.inputs])
        assert times.tolist() == list(range(len(times))), "time goes on from the source to the target"
        assert target.content[1:].tolist() == example.targets[0].content[:-1].tolist()
        assert example.rows[0].tolist() == list(range(len(times) - len(target), len(times)))


def test_the_target_comes_after_a_source_that_is_causal_too(tokenizer):
    """Texts of GPT-2 and CLIP have orders of their own: all of the source stays readable from the target."""
    causal = tokenizer.replace(causal=True)
    examples = [noisy(causal, {"only": noise}, 3)[0] for noise in (Noise(), Noise("prefix", 0.5), *BART.values())]
    label = (causal.read("how far?")[0], causal.read("NUM")[0])
    examples.append(text_to_text.Objective.arrange(text_to_text.Config(), Sample({"text": label[0]}, label=label)))
    for example in examples:
        *source, target = example.inputs
        first = 1 + max(int(piece.order.max()) for piece in source)
        assert first > 2 and target.order.tolist() == list(range(first, first + len(target)))


def as_sequence(tokenizer, ids):
    position = torch.zeros(len(ids), 3)
    position[:, 0] = torch.arange(len(ids))
    return make_sequence(torch.tensor(ids), position)


def assert_prefix_is_the_source(objective, given, holes, example):
    """What is read before the first token is written, as in training; the token itself would be the next row."""
    prefix = objective.arrange_prefix({"text": given}, "text", holes)
    *source, target = example.inputs
    for name in ("position", "order", "modality", "sequence"):
        read, trained = (torch.cat([getattr(piece, name) for piece in own]) for own in (prefix.inputs, source))
        assert torch.equal(read, trained)
    for own, hidden, trained, hide in zip(prefix.inputs, prefix.hidden, source, example.hidden[:-1], strict=True):
        assert (hidden is None) == (hide is None) and (hide is None or torch.equal(hidden, hide))
        shown = slice(None) if hide is None else ~hide
        assert torch.equal(own.content[shown], trained.content[shown])
    assert prefix.order == int(target.order[0]) and prefix.time == float(target.position[0, 0])


def test_generation_reads_what_training_reads(tokenizer):
    """BART writes a text with holes anew, UL2 goes on after a text, T5's spans alone are no text."""
    model = make_model(tokenizer)
    holes_of = {"infilling": Noise("infilling", 0.3)}
    for seed in range(5):
        objective = Objective(Config(noises=holes_of), model, ["text"])
        example, _ = noisy(tokenizer, holes_of, seed)
        ids = torch.tensor(source_of(example))
        given = as_sequence(tokenizer, ids.clamp(min=0).tolist())
        assert_prefix_is_the_source(objective, given, ids < 0, example)
        assert objective.writes() == {"text": ["text"]} and objective.restores() == ["text"]
        objective = Objective(Config(noises=UL2), model, ["text"])
        example, _ = noisy(tokenizer, {"s": UL2["s"]}, seed)
        rest = source_of(example)[1 + len(tokenizer.encode("[S]")) :]
        given = as_sequence(tokenizer, [text.BEGIN, *rest, text.END])
        assert_prefix_is_the_source(objective, given, None, example)
        assert objective.writes() == {"text": ["text"]} and not objective.restores()
    assert not Objective(Config(), model, ["text"]).writes()


class Codes(base.Tokenizer):
    """A picture of 4 x 4 codes, without first and last ids."""

    Config, extensions = text.Config, ("npy",)

    def generation(self):
        return base.Generation((), None, 16, grid(16))

    @property
    def sentinels(self):
        return range(299, 289, -1)

    def embedder(self, width):
        return base.EmbedIds(300, width)

    def predictor(self, width):
        return base.PredictIds(300, width)


def grid(count):
    number = torch.arange(count)
    return torch.stack([torch.zeros(count), number // 4, number % 4], 1).float()


@pytest.mark.parametrize("noise", [Noise("infilling", 0.3), Noise("spans", 0.3), Noise("prefix", 0.5)])
def test_codes_keep_their_places_and_start_with_a_mask(noise):
    codes = Codes()
    tokens = make_sequence(torch.arange(16) + 100, grid(16))
    bound = Bound(Config(noises={"one": noise}), {"image": codes})
    for seed in range(10):
        example = Objective.arrange(bound, Sample({"image": tokens}), seeded(seed))
        source, target = example.inputs
        hidden = example.hidden[1]
        assert hidden[0] and not hidden[1:].any() and target.position[0, 0] != source.position[0, 0]
        shown = torch.zeros(len(source)) if example.hidden[0] is None else example.hidden[0]
        for piece, skip in ((source, shown), (target, hidden), (example.targets[0], [])):
            for i, one in enumerate(piece.content.tolist()):
                if one < 200 and not (len(skip) and skip[i]):
                    assert piece.position[i, 1:].tolist() == grid(16)[one - 100, 1:].tolist()
    model = Model(ModelConfig({"image": codes}, BackboneConfig(width=24, depth=1, num_heads=2)))
    objective = Objective(bound.config, model, ["image"])
    assert list(objective.predictors) == ["image"]
    if noise.kind == "infilling":
        prefix = objective.arrange_prefix({"image": tokens}, "image", torch.arange(16) == 3)
        opening = prefix.inputs[-1]
        assert prefix.order == 2 and opening.order.tolist() == [1] and prefix.hidden[-1].tolist() == [True]
        assert prefix.time == opening.position[0, 0] == target.position[1, 0]


def test_what_a_noise_needs_is_said_in_a_line(tokenizer, tmp_path):
    def problem(error, noises, modality="text", **changes):
        tokenizers = {
            "text": tokenizer.replace(**changes),
            "image": configuration.build(ModelConfig, {"tokenizers": {"image": {}}}).tokenizers["image"],
            "codes": Codes(),
        }
        with pytest.raises(error) as caught:
            denoise.check_noises(Config(noises=noises), modality, tokenizers[modality])
        return str(caught.value)

    count = t5_counts(94, 0.15, 3)[1] + 1
    said = problem(UserError, {"spans": Noise()}, sentinels=2)
    assert f"needs {count} sentinels, text has 2: set model.tokenizers.text.sentinels={count}" in said
    denoise.check_noises(Config(), "text", tokenizer.replace(sentinels=count))
    assert "raw patches" in problem(ValueError, {"spans": Noise()}, "image")
    assert "no sentences" in problem(ValueError, BART, "codes")
    with pytest.raises(ValueError, match="goes with kind: infilling"):
        Noise("spans", permute_sentences=True)
    with pytest.raises(ValueError, match="above 0"):
        Config(noises={"one": Noise(weight=0)})
    assert dict(Objective.problems(Config(noises=UL2), ["text", "image"])).keys() == {"noises"}


# ------------------------------------------------------------------------------------------------------ the tokenizer


def test_sentinels_are_the_top_of_the_vocabulary_and_no_text_spells_them(tokenizer):
    merges = text.load_merges(tokenizer.file)
    assert merges.n_vocab + 2 <= 300 and list(tokenizer.sentinels) == list(range(339, 299, -1))
    ids = tokenizer.encode(STORY)
    marked = [text.BEGIN, *ids, 339, 305, text.END]
    assert max(ids) < 300 and tokenizer.decode(marked) == STORY
    assert tokenizer.count_bytes(marked) == len(STORY) == sum(tokenizer.token_bytes(marked))
    assert tokenizer.token_bytes([339, text.END]) == [0, 0]
    tokenizer.check()
    with pytest.raises(UserError, match=r"with 40 sentinels: set tokenizers\.text\.vocab_size"):
        tokenizer.replace(vocab_size=299).check()
    with pytest.raises(ValueError, match="and the sentinels"):
        text.Config(vocab_size=300, sentinels=43)


def test_characters_are_bytes_where_nothing_is_merged(corpus, tmp_path):
    """`vocab_size: 258`, nanoGPT's setting for ASCII, from learning to bits per byte."""
    settings = {"text": {"vocab_size": 258, "max_tokens": 24}}
    task = {"objectives": {"causal": {}}, "modalities": ["text"], "batch_size": 4, "sources": {"all": 1}}
    config = build(text_only(corpus, tmp_path / "run", tokenizers=settings, tasks={"next": task}, steps=3))
    pretrain(config)
    learned = text.Tokenizer(text.Config(258, file=str(tmp_path / "run" / "tokenizer-text.json")))
    learned.check()
    for written in ("To be, or not to be", "naïve — 日本", "\x00\n\t"):
        ids = learned.encode(written)
        assert len(ids) == len(written.encode()) and learned.decode(ids) == written
        assert learned.token_bytes(ids) == [1] * len(ids) and set(ids) <= set(range(2, 258))
    rows = records(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_documents_of_a_block_are_one_sequence(tokenizer):
    texts = ["A hen.", "  ", "The red fox ran home.", "日本 It was!"]
    block = {"json": json.dumps({"documents": texts, "keys": ["a", "b", "c", "d"]}).encode()}
    kept = [one for one in texts if one.strip()]
    [whole] = tokenizer.replace(max_tokens=200).read(block)
    documents = [[text.BEGIN, *tokenizer.encode(one), text.END] for one in kept]
    assert whole.content.tolist() == list(itertools.chain(*documents))
    assert tokenizer.split_inputs(block) == kept and tokenizer.describe(block) == kept[0]
    short, inner = tokenizer.replace(max_tokens=12), whole.content.tolist()[1:-1]
    windows = [window.content.tolist() for window in short.read(block)]
    assert list(itertools.chain(*(window[1:-1] for window in windows))) == inner
    starts = set()
    for seed in range(200):
        [drawn] = short.read(block, random.Random(seed))
        ids = drawn.content.tolist()
        assert len(ids) == 12 and ids[0] == text.BEGIN and ids[-1] == text.END
        starts |= {i for i in range(len(inner)) if inner[i : i + 10] == ids[1:-1]}
    assert starts == set(range(len(inner) - 9)), "each window comes"
    both = {"json": json.dumps({"documents": texts, "text": "alone"}).encode()}
    assert tokenizer.split_inputs(both) == ["alone"]
    long = {"json": json.dumps({"documents": [f"{i} fox. " * 30 for i in range(40)]}).encode()}
    assert all(len(short.read(long, random.Random(seed))[0]) == 12 for seed in range(20))


def rows_of(pattern):
    corpus = Corpus(Source(str(pattern)), "packed")
    return [corpus.raw(number) for number in range(len(corpus))]


def test_pack_joins_texts_to_blocks_and_loses_none(tmp_path):
    """Each text is in one block, of texts of one split and at most so many bytes; what is no text alone stays."""
    texts = [f"Text number {i}, " + "and more of it " * (i % 7) for i in range(60)]
    long = " ".join(map(str, range(400)))
    lines = [json.dumps({"text": one, "number": i}) for i, one in enumerate([*texts, long])]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "texts.jsonl").write_text("\n".join(lines))
    shards.write(tmp_path / "in" / "media.tar", samples(2))
    facts = pack(Settings([str(tmp_path / "in")], split=[0.7, 0.3], text_block=400), tmp_path / "out", 0)
    split_of, sizes, pieces, media = {}, [], [], 0
    for split in ("train", "validation"):
        for raw in rows_of(tmp_path / "out" / f"{split}-*.tar"):
            if "jpg" in raw:
                media += 1
                continue
            row = json.loads(raw["json"])
            assert row.keys() == {"documents", "keys"} and len(row["documents"]) == len(set(row["keys"]))
            assert sum(len(document.encode()) for document in row["documents"]) <= 400
            sizes.append(len(row["documents"]))
            for document in row["documents"]:
                assert document not in split_of
                split_of[document] = split
                pieces += [(document, split)] * (document not in texts)
    assert media == 2 and set(texts) <= split_of.keys() and max(sizes) > 2
    assert "".join(piece for piece, _ in pieces) == long and len({split for _, split in pieces}) == 1
    assert "joined to blocks of at most 400 bytes" in (tmp_path / "out" / "card.md").read_text()
    assert facts["sources"][f"{tmp_path}/in/texts.jsonl"]["samples"] == 60 + len(pieces)
    with pytest.raises(UserError, match="text-block"):
        Settings(["x"], text_block=3)


# ------------------------------------------------------------------------------------------------------ tasks as text


def test_a_task_is_written_as_text(tokenizer):
    config = text_to_text.Config(source="trec {kind.name}: {text}", target="{label}")
    raw = {"json": json.dumps({"text": "How far?", "label": "NUM", "kind": {"name": 6}}).encode()}
    tokens = {"text": tokenizer.read(raw)[0]}
    label = text_to_text.Objective.read_label(config, raw, tokens, {"text": tokenizer})
    assert [tokenizer.decode(one.content.tolist()) for one in label] == ["trec 6: How far?", "NUM"]
    example = text_to_text.Objective.arrange(config, Sample(tokens, label=label))
    source, target = example.inputs
    assert not source.order.any() and target.order.tolist() == list(range(1, len(target) + 1))
    assert example.targets[0].content.tolist() == [*tokenizer.encode("NUM"), text.END]
    assert target.position[0, 0] == source.position[:, 0].max() + 1
    objective = text_to_text.Objective(config, make_model(tokenizer), ["text"])
    prefix = objective.arrange_prefix({"text": label[0]}, "text")
    assert torch.equal(prefix.inputs[0].position, source.position) and prefix.time == target.position[0, 0]
    assert prefix.order == 1 and objective.writes() == {"text": ["text"]}
    for broken, why in (({"text": "x"}, "'label'"), ({"text": "x", "label": ["a"]}, "'label'")):
        with pytest.raises(SampleError, match=why):
            text_to_text.Objective.read_label(
                config, {"json": json.dumps({"kind": {"name": 1}, **broken}).encode()}, tokens, {"text": tokenizer}
            )
    long = {"json": json.dumps({"text": "x", "label": STORY, "kind": {"name": 1}}).encode()}
    with pytest.raises(SampleError, match="more than 96 tokens"):
        text_to_text.Objective.read_label(config, long, tokens, {"text": tokenizer})
    with pytest.raises(ValueError, match="names a field"):
        text_to_text.Config(target="label")


def test_another_modality_may_be_part_of_the_source(tokenizer):
    config = text_to_text.Config(source="what color?", target="{color}")
    raw = {"json": b'{"color": "red"}', "txt": b"x"}
    tokens = {"image": make_sequence(torch.zeros(4, 12), grid(4), 0), "text": tokenizer.read("x")[0]}
    tokens["text"] = tokens["text"].replace(modality=torch.ones(len(tokens["text"]), dtype=torch.long))
    label = text_to_text.Objective.read_label(config, raw, tokens, {"text": tokenizer})
    example = text_to_text.Objective.arrange(config, Sample(tokens, label=label))
    image, source, target = example.inputs
    assert not image.order.any() and not source.order.any() and target.order[0] == 1
    assert source.position[0, 0] == 1 and set(source.modality.tolist()) == {1}
    assert example.rows[0].tolist() == list(range(4 + len(source), 4 + len(source) + len(target)))


def test_labels_are_ranked_by_the_likelihood_of_their_text(tokenizer, tmp_path):
    rows = [{"text": f"fox {i} ran", "label": ("hen", "the best fox", "NUM")[i % 3]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = make_model(tokenizer)
    objective = text_to_text.Objective(text_to_text.Config(source="t: {text}"), model, ["text"])
    embedded = embed_corpus(model, Corpus(Source(str(tmp_path / "rows.jsonl")), "rows"))
    figures = ranking.Evaluator().run(embedded, ranking.Config(), model, {"t/text_to_text": objective})
    numbers, samples = ranking.read_samples(model, objective, embedded)
    targets = {row["label"]: sample.label[1] for row, sample in zip(rows, samples, strict=True)}
    nats = ranking.rank(model, objective, samples, list(targets.values()))
    for i, sample in enumerate(samples):
        for j, target in enumerate(targets.values()):
            example = objective.arrange(objective.config, Sample(sample.tokens, label=(sample.label[0], target)))
            assert float(nats[i, j]) == pytest.approx(sum(recompute(model, objective, example)), abs=1e-4)
    labels = list(targets)
    right = [labels[int(own.argmin())] == row["label"] for own, row in zip(nats, rows, strict=True)]
    assert numbers == [0, 1, 2, 3] and len(targets) == 3
    [(name, figure)] = figures.items()
    assert name == "text_to_text/t/accuracy" and figure["n"] == 4 and figure["chance"] == 0.5
    assert figure["value"] == pytest.approx(np.mean(right)) and not embedded.is_read, "nothing is embedded for it"


# --------------------------------------------------------------------------------------------------------- the systems


def test_berts_masks_are_80_10_10():
    """Of 15 % of the tokens 80 % are hidden, 10 % replaced by another token and 10 % stay as they are."""
    tokens = make_sequence(torch.arange(40_000), torch.zeros(40_000, 3))
    example = masked.Objective.arrange(masked.Config(mask_ratio=0.15), Sample({"text": tokens}), seeded())
    [rows], [hidden], [shown] = example.rows, example.hidden, example.inputs
    assert len(rows) == 6000 and torch.equal(example.targets[0].content, rows)
    replaced = (shown.content != tokens.content) & ~hidden
    share = [float(which[rows].float().mean()) for which in (hidden, replaced)]
    error = 4 * math.sqrt(0.8 * 0.2 / 6000)
    assert share[0] == pytest.approx(0.8, abs=error) and share[1] == pytest.approx(0.1, abs=error)
    assert int(hidden.sum() + replaced.sum()) == int((hidden | replaced)[rows].sum()), "others are left alone"


def array(values) -> bytes:
    np.save(buffer := io.BytesIO(), values)
    return buffer.getvalue()


RAW = {
    "codes.npy": array(np.arange(64, dtype=np.uint16).reshape(8, 8)),
    "npy": array(np.ones((6, 5), np.float32)),
    "txt": STORY.encode(),
    "jpg": jpeg((200, 30, 30), (64, 64)),
    "flac": tone(440.0, 1.0),
    "json": json.dumps(
        {"text": STORY, "caption": STORY, "label": "positive", "documents": [STORY, "A hen."], "second": STORY}
    ).encode(),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_order_table_of_each_config(path, tmp_path):
    """For each task of each config: who reads whom is as the table of the documents says, and no answer is seen."""
    config, tokenizers = load(path), {}
    for name, one in config.model.tokenizers.items():
        tokenizers[name] = one.fit([RAW] * 3, tmp_path / name) if one.learns and name == "text" else one
    for task in config.tasks.values():
        first = next(iter(task.objectives.values()))
        example = arrange(task, tokenizers, config.model.heads, RAW)
        if first.name not in ORDERS:
            continue
        assert example is not None
        ORDERS[first.name](first.config, example)
        lines = format_table(example, tokenizers)
        assert lines[0].split() == ["sequence", "order", "time", "row", "column", "modality", "reads", "predicts"]
        assert len(lines) > len(example.inputs)


def all_equal(config, example):
    assert all(not piece.order.any() for piece in example.inputs)


def rising(config, example):
    orders = torch.cat([piece.order for piece in example.inputs])
    if not config.fuse:
        assert all(piece.order.tolist() == list(range(len(piece))) for piece in example.inputs)
    elif not config.prefix:
        assert orders.tolist() == list(range(len(orders)))
    for rows, target in zip(example.rows, example.targets, strict=True):
        flat = torch.cat([piece.position for piece in example.inputs])
        assert all(not torch.equal(flat[row], place) for row, place in zip(rows, target.position, strict=True))


def prefix_model(config, example):
    *source, target = example.inputs
    assert source and all(not piece.order.any() for piece in source)
    assert target.order.tolist() == list(range(1, len(target) + 1))
    assert target.content[1:].tolist() == example.targets[-1].content[:-1].tolist()


ORDERS = {
    "masked": all_equal,
    "contrastive": all_equal,
    "supervised": all_equal,
    "causal": rising,
    "denoise": prefix_model,
    "text_to_text": prefix_model,
}


def test_mmfm_inspect_prints_the_order_table(tmp_path, corpus, capsys):
    path = tmp_path / "t5.yaml"
    settings = text_only(corpus, tmp_path / "run", tokenizers={"text": {"vocab_size": 300, "sentinels": 8}})
    task = {"objectives": {"denoise": {}}, "modalities": ["text"], "batch_size": 4, "sources": {"all": 1}}
    path.write_text(json.dumps({**settings, "tasks": {"t5": task}}))
    config = load(path)
    [shard] = corpus.glob("validation-0.tar")
    assert inspect([str(shard)], str(path), tasks=config.tasks, heads=config.model.heads) == 0
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title == "t5: denoise of text" and header.startswith("sequence  order")
    rows = [line.split() for line in lines if not line.startswith("...")]
    orders = [int(row[1]) for row in rows]
    target = [order for order in orders if order]
    assert orders == [0] * (len(orders) - len(target)) + target and target == list(range(1, len(target) + 1))
    assert any("<299>" in line for line in lines), "a sentinel is seen"


@pytest.mark.parametrize("noise", [Noise("infilling", 0.3), UL2["r"], UL2["s"]], ids=["bart", "t5", "rest"])
def test_what_a_denoiser_writes_is_measured(tokenizer, tmp_path, noise):
    from multimodal_fm.evals.denoise import Evaluator, copy_source, restore
    from multimodal_fm.evals.embed_corpus import EmbeddedCorpus

    torch.manual_seed(0)
    model = Model(ModelConfig({"text": tokenizer}, BackboneConfig(width=24, depth=1, num_heads=2))).eval()
    objective = Objective(Config(noises={"own": noise}), model, ["text"])
    torch.nn.init.normal_(objective.predictors["text"].logits.weight)
    bound = Bound(objective.config, objective.tokenizers)
    written = ["The red fox ran.", "It saw a hen! Was it a good hen?"]
    examples = [Objective.arrange(bound, Sample({"text": read(tokenizer, one)}), seeded(3)) for one in written]

    def likeliest(example):  # all is read anew for each token
        *source, target = example.inputs
        ids = [int(target.content[0])]
        while len(ids) < tokenizer.generation().length and ids[-1] != tokenizer.generation().end:
            position = torch.zeros(len(ids), 3)
            position[:, 0] = torch.arange(len(ids)) + target.position[0, 0]
            own = make_sequence(torch.tensor(ids), position, 0).replace(order=torch.arange(len(ids)) + target.order[0])
            row = sum(map(len, source)) + len(ids) - 1
            read_so_far = type(example)([*source, own], [*example.hidden[:-1], None])
            batch = collate({"a": [(0, read_so_far)]}, ["text"], {"a": {}})
            logits = objective.predictors["text"].logits(model(batch).tokens.content[row])
            logits[list(tokenizer.generation().first)] = -math.inf
            ids.append(int(logits.argmax()))
        return ids[1:]

    with torch.no_grad():
        assert restore(model, objective, examples) == [likeliest(example) for example in examples]
    kept = [i for one in examples[0].inputs[:-1] for i in one.content.tolist()]
    assert set(copy_source(model, examples[0])) <= {*kept, tokenizer.generation().end}
    assert not {*tokenizer.sentinels, *tokenizer.generation().first} & set(copy_source(model, examples[0]))

    shards.write(tmp_path / "a.tar", [{"__key__": str(n), "txt": one} for n, one in enumerate(written)])
    embedded = embed_corpus(model, Corpus(Source(str(tmp_path / "a.tar")), "a"))
    assert isinstance(embedded, EmbeddedCorpus)
    figures = Evaluator().run(embedded, Evaluator.Config(), model, {"own/denoise": objective})
    exact = figures["denoise/own/exact"]
    assert (exact["value"], exact["chance"], exact["n"]) == (0.0, 0.0, 2)
    nothing = Objective(Config(noises={"own": Noise("infilling", 0.0)}), model, ["text"])  # to copy is right then
    nothing.predictors.load_state_dict(objective.predictors.state_dict())
    figures = Evaluator().run(embedded, Evaluator.Config(), model, {"own/denoise": nothing})
    assert figures["denoise/own/exact"]["chance"] == 1.0 and figures["denoise/own/chrf"]["chance"] == 100.0
    assert figures["denoise/own/bits_per_token"]["value"] > 0
