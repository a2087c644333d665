"""Generation against slow and obvious recomputation: every token from a reading of its own, every choice by hand."""

import itertools
import json
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import jpeg, output, samples, tiny, tone
from PIL import Image
from plugins import tiny_codes
from torch import nn

import multimodal_fm
from multimodal_fm import generate
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Example, Sample, count_targets
from multimodal_fm.corpus import shards
from multimodal_fm.decoding.logits import choose, guide, make_generator, penalize, truncate
from multimodal_fm.decoding.parallel import Canvas, fill
from multimodal_fm.decoding.settings import Settings
from multimodal_fm.decoding.text import TextStream
from multimodal_fm.decoding.writer import Reader
from multimodal_fm.errors import UserError, printable
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import causal, masked
from multimodal_fm.tokenizers import audio, base, image, prompt, text
from multimodal_fm.tokens import constant, make_sequence
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

WORDS = "a red square and more; le carré rouge, encore"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text tokenizer that has learned."""
    folder = tmp_path_factory.mktemp("words")
    settings = text.Config(vocab_size=280, max_tokens=90)
    return text.Tokenizer(settings).fit([{"txt": WORDS.encode()}], folder / "text")


def make_model(tokenizers, width=32, **settings) -> Model:
    torch.manual_seed(0)
    backbone = BackboneConfig(width=width, depth=2, num_heads=2, **settings)
    return Model(ModelConfig(tokenizers=tokenizers, backbone=backbone)).eval()


def make_objective(module, model, modalities, **settings):
    """An objective whose predictions are far from uniform."""
    torch.manual_seed(1)
    objective = module.Objective(module.Config(**settings), model, modalities)
    for predictor in objective.predictors.values():
        nn.init.normal_(predictor.logits.weight, std=0.5)
    return objective.eval()


def captioner(words, learned=False, **settings):
    """A model of three modalities and an objective that writes text after pictures and sounds."""
    tokenizers = {
        "image": image.Tokenizer(image.Config(patch=8, max_tokens=12)),
        "audio": audio.Tokenizer(audio.Config(patch_frames=8, n_mels=32, patch_mels=32, max_tokens=8)),
        "text": words,
    }
    tokenizers |= {"cls": prompt.Tokenizer(prompt.Config(count=3))} if learned else {}
    model = make_model(tokenizers, **settings)
    objective = make_objective(causal, model, ["image", "audio", "text"], fuse=True, prefix=["image", "audio"])
    return model, objective


def read(model, modality, raw):
    tokens = model.tokenizers[modality].read(raw)[0]
    return tokens.replace(modality=constant(model.modalities.index(modality), len(tokens)))


def picture(seed, size=(40, 30)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def sound(seed, seconds=0.4):
    return np.random.default_rng(seed).standard_normal(int(16_000 * seconds)).astype(np.float32) * 0.1, 16_000


@torch.no_grad()
def uncached(model, objective, target, prefix, ids):
    """The logits of the token that follows `ids`, from all tokens, read anew."""
    generation = model.tokenizers[target].generation()
    tokens = make_sequence(torch.tensor(ids), generation.positions[: len(ids)], model.modalities.index(target))
    given = {m: prefix[m] for m in objective.modalities if m in prefix} | {target: tokens}
    example = objective.arrange(objective.config, Sample(given))
    batch = model.collate({"x": [(0, example)]}, {"x": count_targets([example], model.modalities)})
    return objective.predictors[target].logits(model(batch).tokens.content[-1])


def write(model, objective, target, prompts, candidates=1, **settings):
    fit = generate.Fit("test", objective, parallel=False)
    return generate.write_prompts(model, fit, target, prompts, candidates, Settings(**settings))


def mixed_prompts(model, words):
    """Prompts of different lengths and modalities."""
    images, sounds = (
        (read(model, "image", picture(i)) for i in range(2)),
        (read(model, "audio", sound(i, 0.2 + 0.2 * i)) for i in range(2)),
    )
    first, second, third, fourth = *images, *sounds
    start = [0]
    return [
        generate.Prompt({"image": first}, start),
        generate.Prompt({"image": second, "audio": third}, [0, *words.encode("a red")]),
        generate.Prompt({}, [0, *words.encode("a red square and more")]),
        generate.Prompt({"audio": fourth}, start),
        generate.Prompt({"audio": fourth}, [0, *words.encode("le")]),
    ]


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned tokens"])
@pytest.mark.parametrize("experts", [False, True], ids=["", "experts"])
def test_cached_equals_uncached(words, learned, experts):
    """Greedy, for prompts of different lengths and modalities; those that are finished leave before the others."""
    model, objective = captioner(words, learned, experts=experts)
    prompts = mixed_prompts(model, words)
    with torch.no_grad():
        objective.predictors["text"].logits.bias[1] = 6 if learned else 4  # so that they end at different times
    made = write(model, objective, "text", prompts, temperature=0, min_new_tokens=5)
    assert len({len(generated.ids) for (generated,) in made}) > 2
    for given, (generated,) in zip(prompts, made, strict=True):
        assert generated.ids[: len(given.start)] == given.start
        total = 0.0
        for count in range(len(given.start), len(generated.ids)):
            logits = uncached(model, objective, "text", given.prefix, generated.ids[:count])
            logits[0] = -torch.inf
            if count < 5 + len(given.start):
                logits[1] = -torch.inf
            assert generated.ids[count] == int(logits.argmax())
            total += float(logits.log_softmax(0).max())
        assert generated.log_likelihood == pytest.approx(total, rel=1e-3)
        assert generated.stopped == ("end" if generated.ids[-1] == 1 else "length")


def test_logits_of_a_cache_are_those_of_a_reading(words):
    """Token by token, while sequences leave, come twice and change places."""
    model, objective = captioner(words, learned=True)
    prompts = mixed_prompts(model, words)
    pairs = [(objective.arrange_prefix(p.prefix, "text"), p.start) for p in prompts]
    reader, draw = Reader(model, objective, "text", pairs), np.random.default_rng(0)
    state = [(p.prefix, list(p.start)) for p in prompts]
    for step in range(75):
        if step in (3, 40, 66):
            which = {3: [4, 0, 0, 2, 1], 40: [1, 3, 0], 66: [2, 0]}[step]
            reader.keep(which)
            state = [(state[i][0], list(state[i][1])) for i in which]
        if step % 8 == 0 or step in (1, 41, 64, 65, 67):
            right = torch.stack([uncached(model, objective, "text", *one) for one in state])
            torch.testing.assert_close(reader.logits, right, atol=2e-3, rtol=1e-4)
        ids = draw.integers(2, 280, len(state)).tolist()
        for (_, own), token in zip(state, ids, strict=True):
            own.append(token)
        reader.append(torch.tensor(ids))


def test_a_text_longer_than_the_window_goes_on_from_its_last_half(words):
    words = words.replace(max_tokens=16)
    model, objective = captioner(words)
    prefix = {"image": read(model, "image", picture(0))}
    prompts = [generate.Prompt(prefix, [0, *range(38, 38 + n)]) for n in (0, 4)]  # windows slide at different times
    made = write(model, objective, "text", prompts, temperature=0, max_new_tokens=40, min_new_tokens=40)
    for given, (generated,) in zip(prompts, made, strict=True):
        ids, total = generated.ids[: len(given.start)], 0.0
        window = list(ids)
        while len(ids) < len(given.start) + 40:
            if len(window) == 16 and len(ids) >= 16:
                logits = uncached(model, objective, "text", given.prefix, window)
                window = [0, *window[16 - 7 :]]  # and the next token makes it half a window and one
            else:
                logits = uncached(model, objective, "text", given.prefix, window)
            logits[[0, 1]] = -torch.inf
            ids.append(int(logits.argmax()))
            window.append(ids[-1])
            total += float(logits.log_softmax(0).max())
        assert generated.ids == ids and generated.log_likelihood == pytest.approx(total, abs=1e-3)


def test_the_batch_changes_nothing(words):
    """Sampled with one seed: alone, beside others, among candidates; other seeds and candidates are others."""
    model, objective = captioner(words)
    prompts = mixed_prompts(model, words)
    settings = {"temperature": 1.3, "top_p": 0.95, "max_new_tokens": 12, "seed": 5}
    together = write(model, objective, "text", prompts, 3, **settings)
    for given, own in zip(prompts, together, strict=True):
        assert [one.ids for one in write(model, objective, "text", [given], 3, **settings)[0]] == [o.ids for o in own]
        assert len({tuple(one.ids) for one in own}) == 3
    reversed_ = write(model, objective, "text", prompts[::-1], 3, **settings)[::-1]
    assert [[o.ids for o in own] for own in reversed_] == [[o.ids for o in own] for own in together]
    fit = generate.Fit("test", objective, parallel=False)
    started = generate.start_sequences(model, fit, "text", prompts, [0] * 5, Settings(), False)
    assert len({sequence.generator.initial_seed() for sequence in started}) == 5, "prompts share no random numbers"
    other = write(model, objective, "text", prompts, **{**settings, "seed": 6})
    assert all(a[0].ids != b[0].ids for a, b in zip(together, other, strict=True))


def brute_force(logits, settings):
    """The probabilities (V,) of what may be drawn, one rule after the other, in float64."""
    values = [float(v) / settings.temperature for v in logits]
    allowed = set(range(len(values)))

    def probabilities():
        most = max(values[i] for i in allowed)
        weights = {i: math.exp(values[i] - most) for i in allowed}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    if settings.top_k:
        allowed = set(sorted(allowed, key=lambda i: -values[i])[: settings.top_k])
    if settings.top_p < 1:
        p, total, kept = probabilities(), 0.0, set()
        for i in sorted(allowed, key=lambda i: -values[i]):
            if total >= settings.top_p:
                break
            kept.add(i)
            total += p[i]
        allowed = kept
    if settings.min_p:
        p = probabilities()
        allowed = {i for i in allowed if p[i] >= settings.min_p * max(p.values())}
    p = probabilities()
    return np.array([p.get(i, 0.0) for i in range(len(values))])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_the_distribution_of_what_is_drawn(settings):
    """Truncation by brute force, and 20,000 draws against the exact probabilities (chi-square)."""
    settings = Settings(**settings)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    right = brute_force(logits, settings)
    kept = truncate((logits / settings.temperature)[None], settings)
    np.testing.assert_allclose(kept.double().softmax(1)[0].numpy(), right, atol=1e-6)
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(count, -1), settings, [generator] * count)
    seen = np.bincount(drawn.numpy(), minlength=12)
    assert not seen[right == 0].any()
    expected = right[right > 0] * count
    statistic = ((seen[right > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 1e-9


def test_ids_of_probability_zero_are_never_drawn():
    """Even where the uniform number is 0, or so near 1 that the sum of the probabilities is reached."""

    class Extreme:
        def __init__(self, value):
            self.value = value

    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    for value, right in ((0.0, 1), (1 - 1e-16, 3)):
        import multimodal_fm.decoding.logits as module

        original = module.torch.rand
        module.torch.rand = lambda *_, value=value, **__: torch.tensor([value], dtype=torch.double)
        try:
            assert choose(logits, Settings(), [Extreme(value)]).tolist() == [right]
        finally:
            module.torch.rand = original


def test_penalty_and_guidance_in_writing(words):
    """The logits of each step are recomputed from two readings, with and without the prefix."""
    model, objective = captioner(words)
    prefix = {"image": read(model, "image", picture(0))}
    start = [0, *words.encode("a")]
    settings = {"temperature": 0, "guidance_scale": 2.5, "repetition_penalty": 1.4, "max_new_tokens": 12}
    prompts = [generate.Prompt(prefix, start), generate.Prompt(prefix | {"audio": read(model, "audio", sound(0))}, [0])]
    changed = 0
    for given, (made,) in zip(prompts, write(model, objective, "text", prompts, **settings), strict=True):
        for count in range(len(given.start), len(made.ids)):
            ids = made.ids[:count]
            guided, alone = (uncached(model, objective, "text", p, ids).double() for p in (given.prefix, {}))
            logits = alone + 2.5 * (guided - alone)
            for i in set(ids):
                logits[i] = logits[i] / 1.4 if logits[i] > 0 else logits[i] * 1.4
            logits[0] = -torch.inf
            assert made.ids[count] == int(logits.argmax())
            changed += int(logits.argmax()) != int(guided.argmax())
    assert changed
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert penalize(logits, torch.tensor([[True, True, False]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]
    assert guide(logits, logits * 0, 3.0).tolist() == (3 * logits).tolist()


class Letters(base.Tokenizer):
    """Two letters between two marks, at most six tokens: all sequences can be listed."""

    @dataclass
    class Config:
        pass

    extensions = ()

    def read(self, raw, generator=None):
        ids = [0, *("ab".index(letter) + 2 for letter in raw), 1]
        return [make_sequence(torch.tensor(ids), self.generation().positions[: len(ids)])]

    def generation(self):
        return base.Generation((0,), 1, 6, F.pad(torch.arange(6.0)[:, None], (0, 2)))

    def decode(self, ids):
        return "".join("ab"[i - 2] for i in ids if i > 1)

    def embedder(self, width):
        return nn.Embedding(4, width)

    def predictor(self, width):
        return base.PredictIds(4, width)


@pytest.fixture(scope="module")
def spelled():
    """A model that writes letters, prompts, and for each the log-likelihoods of all sequences: finished, and others."""
    model = make_model({"image": image.Tokenizer(image.Config(patch=8, max_tokens=12)), "letters": Letters()})
    objective = make_objective(causal, model, ["image", "letters"], fuse=True, prefix=["image"])
    with torch.no_grad():
        objective.predictors["letters"].logits.weight.mul_(0.3)
    prompts = [generate.Prompt({"image": read(model, "image", picture(i))}, [0]) for i in range(3)]
    tables = []
    for given in prompts:
        done, others, waiting = {}, {(0,): 0.0}, [(0,)]
        while waiting:
            ids = waiting.pop()
            logits = uncached(model, objective, "letters", given.prefix, list(ids)).double()
            logits[0] = -torch.inf
            for letter, value in list(enumerate(logits.log_softmax(0).tolist()))[1:]:
                longer = (*ids, letter)
                ends = letter == 1 or len(ids) == 5
                (done if ends else others)[longer] = others[ids] + value
                waiting += [] if ends else [longer]
        assert len(done) == 31 + 32
        tables.append((done, others))
    return model, objective, prompts, tables


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_beam_search_against_all_sequences(spelled, length_penalty):
    """As many beams as there are sequences find the best; two beams what two beams without an early end find."""
    model, objective, prompts, tables = spelled
    wide = write(model, objective, "letters", prompts, 5, length_penalty=length_penalty, num_beams=40)
    narrow = write(model, objective, "letters", prompts, 1, length_penalty=length_penalty, num_beams=2)
    for (totals, others), own, (beam,) in zip(tables, wide, narrow, strict=True):
        scores = {ids: total / (len(ids) - 1) ** length_penalty for ids, total in totals.items()}
        best = sorted(scores, key=lambda ids: -scores[ids])[:5]
        assert [tuple(one.ids) for one in own] == best
        assert [one.log_likelihood for one in own] == pytest.approx([totals[ids] for ids in best], abs=1e-4)
        beams, done = [(0,)], []
        while beams:
            longer = [(*ids, letter) for ids in beams for letter in (1, 2, 3)]
            longer = sorted(longer, key=lambda ids: -{**totals, **others}[ids])[:4]
            done += [ids for ids in longer if ids in totals]
            beams = [ids for ids in longer if ids in others][:2]
        assert tuple(beam.ids) == max(done, key=scores.__getitem__)


def painter(words, **settings):
    """A model of text and codes, and an objective that fills in codes beside a text."""
    model = make_model({"text": words, "image_codes": tiny_codes.Tokenizer()})
    return model, make_objective(masked, model, ["text", "image_codes"], fuse=True, **settings)


def fill_codes(model, objective, prefix, candidates=1, **settings):
    fit = generate.Fit("test", objective, parallel=True)
    ids, hidden = [tiny_codes.BEGIN, *[0] * 9], [False, *[True] * 9]
    given = [generate.Prompt(prefix, ids, hidden)]
    return generate.write_prompts(model, fit, "image_codes", given, candidates, Settings(**settings))[0]


@torch.no_grad()
def predict_hidden(model, objective, prefix, ids, hidden):
    """The log-probabilities (M, V) of the hidden tokens, by a sample that is arranged and hidden by hand."""
    codes = make_sequence(torch.tensor(ids), tiny_codes.Tokenizer().generation().positions, 1)
    offset = float(prefix["text"].position[:, 0].max()) + 1 if prefix else 0.0
    codes = codes.replace(position=codes.position + torch.tensor([offset, 0.0, 0.0]))
    inputs = [*prefix.values(), codes]
    example = Example(inputs, [None] * len(prefix) + [torch.tensor(hidden)])
    output = model(model.collate({"x": [(0, example)]}, {"x": {}})).tokens.content[-len(ids) :]
    return objective.predictors["image_codes"].logits(output[torch.tensor(hidden)]).log_softmax(1)


def test_parallel_decoding_in_one_step_is_the_likeliest_of_each(words):
    model, objective = painter(words)
    for prefix in ({}, {"text": read(model, "text", "a red square")}):
        (made,) = fill_codes(model, objective, prefix, temperature=0, steps=1)
        right = predict_hidden(model, objective, prefix, [8, *[0] * 9], [False, *[True] * 9])
        assert made.ids == [8, *right.argmax(1).tolist()]
        assert made.log_likelihood == pytest.approx(float(right.amax(1).sum()), abs=1e-4)
        assert made.value.shape == (24, 24, 3)


@pytest.mark.parametrize("steps", [2, 4, 9, 30])
def test_parallel_decoding_step_by_step(words, steps):
    """Greedy: each reading keeps the surest, as many as the cosine says; what stands is never changed."""
    model, objective = painter(words)
    prefix = {"text": read(model, "text", "a red square")}
    start = make_sequence(torch.tensor([8, *[0] * 9]), tiny_codes.Tokenizer().generation().positions, 1)
    canvas = Canvas(prefix, start, torch.tensor([False, *[True] * 9]))
    ids, hidden, readings = [8, *[0] * 9], [False, *[True] * 9], 0
    for share in fill(model, objective, "image_codes", [canvas], Settings(temperature=0, steps=steps)):
        readings += 1
        left = min(math.floor(9 * math.cos(math.pi / 2 * readings / steps)), sum(hidden) - 1)
        best = predict_hidden(model, objective, prefix, ids, hidden).max(1)
        rows = [i for i in range(10) if hidden[i]]
        ranked = sorted(range(len(rows)), key=lambda i: -float(best.values[i]))
        for i in ranked[: len(rows) - max(left, 0)]:
            ids[rows[i]], hidden[rows[i]] = int(best.indices[i]), False
        shown = [i for i in range(10) if not hidden[i]]
        assert canvas.hidden.tolist() == hidden and share == pytest.approx(1 - sum(hidden) / 9)
        assert [int(canvas.tokens.content[i]) for i in shown] == [ids[i] for i in shown]
    assert not any(hidden) and readings == min(steps, 9)


def test_parallel_decoding_draws_by_its_seed(words):
    model, objective = painter(words)
    prefix = {"text": read(model, "text", "a red square")}
    settings = {"steps": 4, "temperature": 5.0}
    made = [[o.ids for o in fill_codes(model, objective, prefix, 3, seed=s, **settings)] for s in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and len({tuple(ids) for ids in made[0]}) == 3
    guided = fill_codes(model, objective, prefix, temperature=0, steps=1, guidance_scale=3)[0].ids
    both = [predict_hidden(model, objective, p, [8, *[0] * 9], [False, *[True] * 9]) for p in (prefix, {})]
    right = (both[1] + 3 * (both[0] - both[1]))[:, :8].argmax(1)
    assert guided == [8, *right.tolist()]


def test_holes_are_filled_and_nothing_else_is_touched(words):
    model = make_model({"text": words})
    objective = make_objective(masked, model, ["text"])
    ids, hidden = generate.read_holes(model, "text", "a [MASK][MASK] square and[MASK]")
    assert [i for i, hide in zip(ids, hidden, strict=True) if not hide] == [
        0, *words.encode("a"), *words.encode(" square and"), 1
    ]  # fmt: skip
    assert sum(hidden) == 3 and hidden[-2]
    (made,) = model.generate(fill=["a [MASK][MASK] square and[MASK]"], objectives={"m": objective}, temperature=0)
    known = [i for i, hide in enumerate(hidden) if not hide]
    assert [made.ids[i] for i in known] == [ids[i] for i in known] and len(made.ids) == len(ids)
    assert not {0, 1} & {made.ids[i] for i in range(len(ids)) if hidden[i]}
    assert made.value.startswith("a") and " square and" in made.value


def test_streams_never_split_a_character():
    """Every cut of the bytes into tokens, with damaged bytes between: the same text as all bytes decoded at once."""
    sent = "aé€😀\u200d x".encode() + b"\xff\xf0\x9f" + "ü".encode() + b"\xe2\x82"
    draw = np.random.default_rng(0)
    for _ in range(200):
        cuts = sorted({0, len(sent), *draw.integers(0, len(sent), 8).tolist()})
        tokens = [sent[a:b] for a, b in itertools.pairwise(cuts)]
        stream = TextStream(lambda ids, tokens=tokens: b"".join(tokens[i] for i in ids).decode(errors="replace"))
        pieces = [stream.push(i) for i in range(len(tokens))]
        for piece in pieces[:3]:
            assert "\ufffd" not in piece or sent.decode(errors="replace").find(piece) >= 0
        assert "".join(pieces) + stream.finish() == sent.decode(errors="replace") == stream.text
    whole = "aé€😀".encode()
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    assert [stream.push(byte) for byte in whole] == ["a", "", "é", "", "", "€", "", "", "", "😀"]


def test_stop_strings_against_find():
    draw = np.random.default_rng(1)
    for _ in range(300):
        letters = "".join(draw.choice(list("ab\n"), 30))
        stops = ["".join(draw.choice(list("ab\n"), n)) for n in draw.integers(1, 5, 2)]
        stream, sent = TextStream(lambda ids, letters=letters: "".join(letters[i] for i in ids), stops), ""
        for i in range(len(letters)):
            sent += stream.push(i)
            assert not any(stop in sent for stop in stops)
            if stream.stopped:
                break
        sent += stream.finish()
        ends = [at + len(stop) for stop in stops if (at := letters.find(stop)) >= 0]
        if ends:  # the string that is complete first; of two that end at once the longer
            seen = letters[: min(ends)]
            assert stream.stopped and sent == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
        else:
            assert not stream.stopped and sent == letters


class Restorer(causal.Objective):
    """Reads a text with holes, all of it at once, and writes it anew: as a denoising objective does."""

    def writes(self):
        return {"text": ["text"]}

    def restores(self):
        return ["text"]

    def arrange_prefix(self, prefix, target, holes=None):
        source = prefix[target]
        return causal.base.Prefix(
            [source], 1, float(source.position[:, 0].max()) + 1, [holes] if holes is not None else []
        )


def test_a_text_with_holes_is_written_anew(words):
    """By an objective that restores: each token from a reading of the source, whose holes are mask tokens."""
    model = make_model({"text": words})
    objective = make_objective(SimpleNamespace(Objective=Restorer, Config=causal.Config), model, ["text"])
    (made,) = model.generate(
        fill=["a [MASK] square"], objectives={"r": objective}, temperature=0, max_new_tokens=6, min_new_tokens=6
    )
    source = [0, *words.encode("a"), 5, *words.encode(" square"), 1]
    hole = source.index(5)
    assert made.ids[0] == 0 and len(made.ids) == 7
    ids = source + made.ids
    position = F.pad(torch.arange(float(len(ids)))[:, None], (0, 2))
    order = torch.tensor([0] * len(source) + list(range(1, 8)))
    whole = make_sequence(torch.tensor(ids), position).replace(order=order)
    example = Example([whole], [torch.arange(len(ids)) == hole])
    with torch.no_grad():
        output = model(model.collate({"x": [(0, example)]}, {"x": {}})).tokens.content
        logits = objective.predictors["text"].logits(output[len(source) : -1])
    logits[:, :2] = -torch.inf
    assert made.ids[1:] == logits.argmax(1).tolist()


def test_what_is_given_beside_holes_is_never_left_unread(words):
    """An objective over texts alone fills no holes after a picture, nor is a second text dropped."""
    model = make_model({"text": words, "image": image.Tokenizer()})
    objective = make_objective(SimpleNamespace(Objective=Restorer, Config=causal.Config), model, ["text"])
    for given in ({"image": [picture(0)]}, {"text": ["a red square"]}):
        with pytest.raises(UserError, match=f"can fill holes in text after {next(iter(given))}"):
            model.generate(fill=["a [MASK] square"], objectives={"r": objective}, **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run that writes text, draws codes, fills holes and compares pictures with texts."""
    folder = tmp_path_factory.mktemp("generate")
    shards.write(folder / "train-0.tar", samples(16))
    (folder / "horn.flac").write_bytes(tone(300))
    (folder / "red.jpg").write_bytes(jpeg((220, 30, 30)))
    data = tiny(folder, run_dir=str(folder / "run"), steps=3)
    common = {"batch_size": 4, "sources": {"all": 1}}
    data["tasks"] = {
        "caption": {
            "objectives": {"causal": {"fuse": True, "prefix": ["image"]}}, "modalities": ["image", "text"], **common
        },
        "draw": {"objectives": {"causal": {"fuse": True}}, "modalities": ["text", "image_codes"], **common},
        "paint": {"objectives": {"masked": {"fuse": True}}, "modalities": ["text", "image_codes"], **common},
        "pairs": {"objectives": {"contrastive": {}}, "modalities": ["text", "image"], **common},
    }  # fmt: skip
    tokenizers = data["model"]["tokenizers"]
    tokenizers |= {"image_codes": {"tokenizer": "plugins.tiny_codes"}}
    tokenizers["text"]["fields"] = ["txt"]
    loop.pretrain(build(data))
    return folder


def test_the_command_line(mmfm, run, tmp_path):
    def generate(*words) -> str:
        return output(mmfm("generate", run / "run", "--trust", *words))

    said = generate("a red", "--max-new-tokens", 6, "--temperature", 0.8)
    assert said == generate("a red", "--max-new-tokens", 6, "--temperature", 0.8)
    model = multimodal_fm.load(run / "run", plugins=True)
    (same,) = model.generate(text=["a red"], max_new_tokens=6, temperature=0.8)
    assert said == "\n".join(printable(line) for line in same.value.split("\n")) + "\n" and said.startswith("a red")
    drawn = tmp_path / "drawn.png"
    lines = generate("a red square", "--to", "image", "--out", drawn, "--candidates", 5, "--rerank", "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 5 and rows[0]["file"] == str(drawn) and rows[0]["modality"] == "image_codes"
    similarities = [row["similarity"] for row in rows]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] > similarities[-1]
    pixels = np.asarray(Image.open(drawn))
    assert (pixels == model.tokenizers["image_codes"].decode(rows[0]["ids"])).all()
    vectors = model.embed(text=["a red square"], image=[model.tokenizers["image_codes"].decode(r["ids"]) for r in rows])
    assert similarities == pytest.approx((vectors["image"] @ vectors["text"][0]).tolist(), abs=1e-4)
    caption = json.loads(generate("--image", run / "red.jpg", "--num-beams", 3, "--json", "--max-new-tokens", 5))
    assert caption["stopped"] in ("end", "length") and isinstance(caption["text"], str)
    filled = json.loads(generate("--fill", "a [MASK] square", "--json"))
    assert filled["stopped"] == "filled" and filled["text"].endswith(" square")
    generate("a red square", "--to", "image_codes", "--steps", 4, "--out", drawn)
    generate("a red square", "--to", "image", "--guidance-scale", 2, "--out", drawn, "--objective", "draw")


@pytest.mark.parametrize(
    "words, message",
    [
        (("x", "--to", "audio"), "cannot write 'audio': its modalities of discrete tokens are text, image_codes"),
        (("x", "--to", "image"), "name the file to write: --out FILE, as in --out made.png"),
        (
            ("--audio", "horn.flac"),
            "no objective of this run can write text after audio; it can write text after image",
        ),
        (("x", "--objective", "drew"), "no objective 'drew' \\(caption/causal, draw/causal"),
        (("x", "--temperature", "-1"), "temperature is a number from 0 up"),
        (("x", "--temperature", "0", "--candidates", "2"), "equal candidates at temperature 0"),
        (("--fill", "no hole"), "has no hole; write \\[MASK\\]"),
        (("a " * 99,), "text\\[0\\]: is too long|tokens, and a sequence at most 24"),
        (("x", "--rerank", "--max-new-tokens", "2"), "nothing to rerank by: .* over text and text"),
        (("x", "--to", "image", "--out", "{}/x.unknown"), "cannot be written"),
        (("x", "--to", "image", "--out", "y.png", "--max-new-tokens", "3"), "a sequence of image_codes has 10 tokens"),
        (("--image", "nowhere.jpg"), "nowhere.jpg"),
        (("x", "--num-beams", "2", "--candidates", "3"), "at most as many candidates"),
    ],
)
def test_what_is_wrong_is_one_line(mmfm, run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(run)
    done = mmfm("generate", "run", "--trust", *[str(w).replace("{}", str(tmp_path)) for w in words])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_python(run):
    """Many prompts at once, text that appears piece by piece, and a model that knows no run."""
    model = multimodal_fm.load(run / "run", plugins=True)
    made = model.generate(image=[picture(0), picture(1)], text=["a", "a red square"], max_new_tokens=4, candidates=2)
    assert [one.value.startswith(t) for one, t in zip(made, ("a", "a red square"), strict=True)] == [True, True]
    assert [len(one.others) for one in made] == [1, 1]
    pieces = list(model.stream_text(text=["a red"], max_new_tokens=8))
    assert len(pieces) > 1 and "".join(pieces) == model.generate(text=["a red"], max_new_tokens=8)[0].value
    seen = []
    (made,) = model.generate("image", text=["a blue square"], progress=lambda done, of: seen.append((done, of)))
    assert made.stopped == "length" and len(made.ids) == 10 and seen == sorted(seen) and seen[-1] == (100, 100)
    (stopped,) = model.generate(text=["a"], stop_strings=["e", " ", "a"], max_new_tokens=20, temperature=2.0, seed=3)
    assert not set("e a") & set(stopped.value[1:])
    with pytest.raises(UserError, match="was not loaded from a run"):
        Model(model.config).generate(text=["a"])
    with pytest.raises(UserError, match="neither a setting nor a modality"):
        model.generate(text=["a"], temprature=1)
    with pytest.raises(UserError, match="as many inputs"):
        model.generate(text=["a", "b"], image=[picture(0)])


def test_generators_depend_on_seed_and_prompt_alone():
    first, same, other = (make_generator(s, torch.tensor([1, 2]), 0).initial_seed() for s in (1, 1, 2))
    assert first == same != other
    assert (
        make_generator(1, torch.tensor([1, 3]), 0).initial_seed() != first != make_generator(1, torch.tensor([1, 2]), 1)
    )
