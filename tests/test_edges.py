"""Small things that once went wrong: labels of several spellings, figures that are no number, sounds of bats.

Each is a sentence of what must hold; what belongs to a larger test stands there.
"""

import dataclasses
import io
import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from multimodal_fm import lora
from multimodal_fm.backbone import Backbone, RMSNorm
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import plan_reading
from multimodal_fm.corpus.fields import label_text, label_texts
from multimodal_fm.decoding.text import TextStream
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.evals import compare, task_metrics
from multimodal_fm.heads import classify
from multimodal_fm.objectives.pair import decode_after, find_starts
from multimodal_fm.pack.tables import _csv_rows
from multimodal_fm.reports.page import Media
from multimodal_fm.run_dir import codec, evaluations
from multimodal_fm.stream.mixture import Mixture, Source
from multimodal_fm.stream.quarantine import BadFraction
from multimodal_fm.tokenizers import image
from multimodal_fm.tokens import make_sequence

PIECES = ["[CLS]", "[SEP]", "hello", "big", "##ly", ".", "world"]


def spell(ids) -> str:
    """As a decoder of word pieces: a space before each, but before a continuation and a full stop."""
    text = ""
    for piece in (PIECES[i] for i in ids):
        text += piece[2:] if piece.startswith("##") else piece if piece == "." or not text else f" {piece}"
    return text


class WordPieces:
    decode = staticmethod(spell)


@pytest.mark.parametrize("value, text", [(1.0, "1"), (" cat ", "cat"), (math.nan, ""), (True, "True"), (2, "2")])
def test_a_label_is_spelled_in_one_way(value, text):
    assert label_text(value) == text
    if text:
        config = classify.Config(classes=["x", text])
        assert classify.Head.encode(config, value, None)[0].tolist() == [1]


def test_empty_labels_of_several_are_none():
    assert label_texts(["cat", "", 1.0]) == ["cat", "1"]


def test_a_figure_that_is_no_number_differs_from_nothing():
    one = {"value": math.nan, "low": math.nan, "high": math.nan}
    assert compare.difference_of_figures(one, {"value": 1.0, "low": 0.9, "high": 1.1})["verdict"] == "no difference"


def test_which_figures_are_better_where_they_are_lower():
    names = ["captions/bits_per_token", "classify/aurc", "text/perplexity", "all/reconstruction/image/perplexity"]
    assert [compare._sign(name) for name in names] == [-1, -1, -1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_intervals_of_biased_figures_hold_their_value(seed):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(10), 200)
    labels = np.array([generator.choice(10, p=p) for p in probabilities])
    figures = task_metrics.classification(probabilities, labels, [str(c) for c in range(10)])
    for name in ("ece", "macro_f1"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"], name


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,text\na,b,c\n")
    with pytest.raises(UserError, match="two columns are called 'text'"):
        list(_csv_rows(str(tmp_path / "a.csv")))


def _write(folder, number) -> None:
    figure = {"value": 1.0, "low": 0.0, "high": 2.0}
    evaluations.write(folder, f"one{number}", {"figures": {"x": figure}})


def test_evaluations_that_end_together_are_all_kept(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(evaluations.read(tmp_path)) == 8
    (tmp_path / evaluations.FILE).write_text(json.dumps({"a": {"figures": {"x": {"value": 1}}}}))
    with pytest.raises(UserError, match="not a map of evaluations"):
        evaluations.read(tmp_path)


def test_a_sound_of_bats_is_made_playable():
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, np.sin(np.arange(500_000) / 5), 250_000, format="WAV")
    media = Media(max_image=1000, max_audio=1000)
    kind, short = media._audio(data.getvalue())
    assert kind == "audio/ogg" and soundfile.info(io.BytesIO(short)).samplerate == 125_000


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-4])
def test_rms_norm_is_that_of_torch_whatever_the_scale(scale):
    torch.manual_seed(0)
    norm, x = RMSNorm(24), (torch.randn(7, 24) * scale).requires_grad_()
    (expected,) = torch.autograd.grad(F.rms_norm(x, (24,), norm.weight).sin().sum(), x)
    (found,) = torch.autograd.grad(norm(x).sin().sum(), x)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 / scale)


def test_a_reading_numbers_its_sequences_below_its_tokens():
    one = make_sequence(torch.arange(3), torch.zeros(3, 3)).replace(sequence=torch.tensor([64, 64, 90]))
    assert sorted(plan_reading(one, 1).tokens.sequence.tolist()) == [0, 0, 1]


def test_word_pieces_are_streamed_with_their_spaces():
    ids = [2, 3, 4, 6, 5, 2]
    stream = TextStream(spell)
    assert "".join([*map(stream.push, ids), stream.finish()]) == spell(ids)
    stream = TextStream(spell, ["ly world"])
    assert "".join(map(stream.push, ids)) == "hello big" and stream.stopped


def test_sentences_begin_where_word_pieces_say():
    ids = [0, 2, 3, 5, 6, 4, 1]
    pieces = [decode_after(WordPieces, *pair) for pair in zip([None, *ids], ids)]
    assert find_starts(pieces) == [4]


def test_a_codec_of_a_setting_is_not_fetched():
    with pytest.raises(UserError, match="not fetched"):
        codec.load_own("hf:somebody/codec")


def test_a_picture_by_its_path_is_that_of_its_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=70)
    data = (tmp_path / "a.jpg").read_bytes()
    tokenizer = image.Tokenizer(image.Config(patch=8, max_tokens=64))
    assert np.array_equal(tokenizer.view(str(tmp_path / "a.jpg")), tokenizer.view(data))
    small = image.Tokenizer(dataclasses.replace(tokenizer.config, max_bytes=100))
    with pytest.raises(SampleError, match="the limit is 100"):
        small.view(str(tmp_path / "a.jpg"))


def test_fill_bytes_before_a_segment_hide_no_orientation():
    picture, data = Image.new("RGB", (8, 4)), io.BytesIO()
    exif = picture.getexif()
    exif[image.ORIENTATION] = 6
    picture.save(data, "JPEG", exif=exif)
    plain = data.getvalue()
    assert image._jpeg_orientation(plain) == image._jpeg_orientation(plain[:2] + b"\xff\xff" + plain[2:]) == 6


@pytest.mark.parametrize("alpha, scaling", [(0.5, 0.125), (1.9, 0.475), (8.0, 2.0)])
def test_adapters_are_scaled_by_what_was_asked_for(alpha, scaling):
    pytest.importorskip("peft")
    backbone = Backbone(BackboneConfig(width=16, depth=1, num_heads=2), ["text"])
    lora.inject(backbone, lora.Config(rank=4, alpha=alpha))
    found = {value for layer in lora.adapted_layers(backbone).values() for value in layer.scaling.values()}
    assert found == {scaling}


def test_positions_before_the_first_phase_are_refused():
    mixture = Mixture(3, [Source("a", 100), Source("b", 50)], [(960, [0.5, 0.5])])
    with pytest.raises(ValueError, match="before the first phase"):
        mixture.draws(80, 96)


def test_bad_samples_of_a_source_that_is_gone_count_nowhere():
    rows = [{"step": 1, "source": name, "shard": "s", "key": "k"} for name in ("a", "gone")]
    assert {name: len(one) for name, one in BadFraction(0.05, {"a": None}, rows).bad.items()} == {"a": 1}
