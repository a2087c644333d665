"""Learned codes: quantizers, the codec and its training, members `codes.npy`, packing, decoding, what is measured."""

import dataclasses
import io
import itertools
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import losses, samples, tiny
from PIL import Image
from test_train import fit, make_stream

import multimodal_fm
from multimodal_fm import config
from multimodal_fm.batch import Sample, collate, count_targets, with_counts
from multimodal_fm.cli import app
from multimodal_fm.corpus import shards
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.evals.base import Evaluation
from multimodal_fm.evals.run import evaluate
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import autoencode, causal
from multimodal_fm.pack.run import pack
from multimodal_fm.pack.settings import Settings
from multimodal_fm.run_dir import checkpoint, codec
from multimodal_fm.tokenizers import audio, codes, image
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train import ema, loop
from multimodal_fm.train.config import build
from multimodal_fm.train.train_step import TrainStep

DECODER = {"width": 32, "depth": 1, "num_heads": 2}
FSQ = {"levels": [4, 3, 3], "decoder": DECODER}
VQ = {"quantizer": "vq", "codes": 24, "code_dim": 3, "decay": 0.8, "threshold_ema_dead_code": 0.3, "decoder": DECODER}
IMAGE = {"image": {"patch": 8, "max_tokens": 12, "min_crop_scale": 0.6}}
AUDIO = {"audio": {"patch_frames": 4, "n_mels": 32, "patch_mels": 32, "max_tokens": 6}}


def codec_config(corpus, run_dir, head=None, tokenizers=None, **changes) -> dict:
    tokenizers = tokenizers or IMAGE
    (modality,) = tokenizers
    task = {"objectives": {"autoencode": {}}, "modalities": [modality], "batch_size": 8, "sources": {"all": 1}}
    return tiny(
        corpus,
        run_dir=str(run_dir),
        tasks={"give": task},
        tokenizers=tokenizers,
        backbone={"width": 32, "depth": 1, "num_heads": 2},
        heads={"codes": head or FSQ},
        optim={"lr": 5e-3, "warmup_steps": 2},
        **{"ema_decay": 0.8, **changes},
    )


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Runs of tiny codecs: of pictures, and of sounds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("codecs")
    loop.pretrain(build(codec_config(corpus, folder / "image", steps=30, save_every=30)))
    loop.pretrain(build(codec_config(corpus, folder / "audio", tokenizers=AUDIO, steps=10, save_every=10)))
    return folder


def make_model(head=None, tokenizers=None) -> Model:
    torch.manual_seed(0)
    data = {"tokenizers": tokenizers or IMAGE, "backbone": {"width": 32, "depth": 1, "num_heads": 2}}
    return Model(config.build(ModelConfig, data | {"heads": {"codes": head or FSQ}}))


def picture(rows=3, columns=4, seed=0):
    content = torch.randint(0, 256, (rows * columns, 192), dtype=torch.uint8, generator=torch.manual_seed(seed))
    position = torch.zeros(rows, columns, 3)
    position[..., 1], position[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return make_sequence(content, position.flatten(0, 1))


def npy(array, **settings) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **settings)
    return data.getvalue()


# ----------------------------------------------------------------------------------------------------------- quantizers


def test_fsq_rounds_each_dimension_to_its_levels():
    """Against the formula of the paper, in float64: bounded by tanh, rounded, numbered in mixed radix."""
    head = make_model().heads["codes"]
    vectors = torch.randn(2000, 3, generator=torch.manual_seed(1)) * 2
    quantized, numbers = head.quantize(vectors)
    expected = np.zeros(2000, int)
    for dimension, (levels, basis) in enumerate(zip((4, 3, 3), (1, 4, 12), strict=True)):
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = 0.5 if levels % 2 == 0 else 0.0
        bounded = np.tanh(vectors[:, dimension].double().numpy() + np.arctanh(offset / half)) * half - offset
        level = np.round(bounded)
        assert np.allclose(quantized[:, dimension].numpy(), level / (levels // 2), atol=1e-6)
        expected += ((level + levels // 2) * basis).astype(int)
    assert numbers.tolist() == expected.tolist()
    assert len(set(expected)) == 36 == head.config.codebook_size
    assert torch.allclose(head.lookup(numbers), quantized, atol=1e-6)


def test_vq_takes_the_nearest_code():
    head = make_model(VQ).heads["codes"]
    head.quantizer.codebook = torch.randn(24, 3, generator=torch.manual_seed(1))
    vectors = torch.randn(200, 3, generator=torch.manual_seed(2), requires_grad=True)
    quantized, numbers = head.quantize(vectors)
    distance = (vectors.detach().double()[:, None] - head.quantizer.codebook.double()).square().sum(2)
    assert numbers.tolist() == distance.argmin(1).tolist()
    assert torch.allclose(quantized, head.lookup(numbers), atol=1e-5)
    quantized.sum().backward()
    assert vectors.grad.abs().sum() > 0, "gradients go past the rounding"


def test_the_codebook_follows_as_the_formulas_say():
    """Moving averages of counts and sums with Laplace smoothing (van den Oord et al. 2017), in float64."""
    head = make_model({**VQ, "threshold_ema_dead_code": 0}).heads["codes"]
    start = torch.randn(24, 3, generator=torch.manual_seed(1))
    head.quantizer.codebook = start
    state = head.quantizer.state_dict()
    sums = next(value for name, value in state.items() if name.endswith("embed_avg"))[0].double()
    sizes = np.ones(24)
    for seed in range(3):
        vectors = torch.randn(50, 3, generator=torch.manual_seed(seed))
        numbers = head.quantize(vectors)[1]
        head.update_codebook(vectors, numbers)
        hot = F.one_hot(numbers, 24).double()
        sizes = 0.8 * sizes + 0.2 * hot.sum(0).numpy()
        sums = 0.8 * sums + 0.2 * hot.T @ vectors.double()
        smooth = (sizes + 1e-5) / (sizes.sum() + 24e-5) * sizes.sum()
        assert np.allclose(head.quantizer.codebook.numpy(), sums.numpy() / smooth[:, None], atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_dead_codes_are_revived_where_they_are_looked_for(threshold):
    """All but two codes are planted far from the data; without the guard they stay dead for good."""
    head = make_model({**VQ, "threshold_ema_dead_code": threshold}).heads["codes"]
    far = torch.full((24, 3), 50.0) + torch.arange(24.0)[:, None]
    far[:2] = torch.tensor([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]])
    buffers = {name: buffer for name, buffer in head.quantizer.named_buffers()}
    for name in ("embed", "embed_avg"):
        next(b for n, b in buffers.items() if n.endswith(f".{name}")).copy_(far[None])
    generator = torch.manual_seed(3)
    for _ in range(30):
        vectors = torch.randn(100, 3, generator=generator)
        numbers = head.quantize(vectors)[1]
        head.update_codebook(vectors, numbers)
    used = len(set(head.quantize(torch.randn(2000, 3, generator=generator))[1].tolist()))
    assert used >= 22 if threshold else used == 2


# ------------------------------------------------------------------------------------------------------------ objective


def collated(objective, examples, modalities):
    counts = count_targets(examples, modalities)
    plan = {"task": lambda batch, targets: objective.plan(objective.config, batch, targets)}
    return collate({"task": list(enumerate(examples))}, modalities, {"task": counts}, plan)


@pytest.mark.parametrize(("head", "l1"), [(FSQ, 0.0), (FSQ, 0.5), (VQ, 0.0)])
def test_the_loss_is_the_error_of_each_picture_read_alone(head, l1):
    """Pictures of several sizes in one batch against each picture's own encoding and decoding, added up in float64."""
    model = make_model(head)
    objective = autoencode.Objective(autoencode.Config(l1=l1, commitment=0.7), model, ["image"])
    if head is VQ:
        model.heads["codes"].quantizer.codebook = torch.randn(24, 3, generator=torch.manual_seed(1))
    pictures = [picture(3, 4), picture(2, 2, 1), picture(3, 4, 2), picture(1, 5, 3)]
    batch = collated(
        objective, [objective.arrange(objective.config, Sample({"image": p})) for p in pictures], ["image"]
    )
    loss, figures = objective.loss(model(batch), batch.tasks["task"])
    model.eval()
    one, total, decibels, seen = codec.Codec(model), 0.0, 0.0, []
    for own in pictures:
        numbers = one.encode([own])
        seen += numbers.tolist()
        vectors = one.head.lookup(numbers)
        code = collated(objective, [objective.arrange(objective.config, Sample({"image": own}))], ["image"])
        outputs = model(code).tokens.content
        values = one.head.decode(vectors, code.tokens, code.attention, code.by_modality).detach().double()
        target = (own.content.double() - 127.5) / 64
        squares = (values - target).square()
        total += float(squares.mean(1).sum() + l1 * (values - target).abs().mean(1).sum())
        if head is VQ:
            total += 0.7 * float((one.head.project(outputs) - vectors).detach().double().square().mean(1).sum())
        decibels += len(own) * 10 * np.log10((255 / 64) ** 2 / float(squares.mean()))
    count = sum(map(len, pictures))
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(figures["psnr"]) == pytest.approx(decibels / count, rel=1e-5)
    size = one.codebook_size
    assert float(figures["codebook_use"]) == pytest.approx(len(set(seen)) / size)
    shares = np.bincount(seen) / len(seen)
    entropy = -sum(p * np.log(p) for p in shares if p)
    assert float(figures["perplexity"]) == pytest.approx(np.exp(entropy), rel=1e-5)


def train_step(corpus, tmp_path, **changes):
    """A train step of a VQ codec, and a function that reads a step's microbatches."""
    settings, corpora = fit(codec_config(corpus, tmp_path / "run", VQ, **changes), tmp_path)
    stream = make_stream(settings, corpora)

    def read(number):
        data = stream[number]
        return [with_counts(batch, data.counts) for batch in data.batches]

    return TrainStep(settings, torch.device("cpu")), read


def test_a_step_that_is_not_finite_leaves_the_codebook_as_it_was(corpus, tmp_path):
    results = []
    for bad in (False, True):
        step, read = train_step(corpus, tmp_path)
        step(0, read(0))
        if bad:
            weights, step.weights = step.weights, dict.fromkeys(step.weights, float("nan"))
            assert step(1, read(1))["skipped"] == 1
            step.weights = weights
        step(2, read(2))
        results.append(step.tensors())
    for file, tensors in results[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, results[1][file][name]), (file, name)


def test_the_codebook_follows_the_step_however_it_is_dealt(corpus, tmp_path):
    """One microbatch or four, and ranks that each have a part: the same vectors in another order."""
    books = []
    for microbatches in (1, 4):
        step, read = train_step(corpus, tmp_path, microbatches=microbatches)
        step(0, read(0))
        quantizer = step.model.heads["codes"].quantizer
        books.append(torch.cat([b.float().flatten().sort().values for b in quantizer.buffers()]))
    assert torch.allclose(*books, atol=2e-4)

    heads = [make_model(VQ).heads["codes"] for _ in range(2)]
    vectors = torch.randn(40, 3, generator=torch.manual_seed(5))
    numbers = heads[0].quantize(vectors)[1]
    torch.manual_seed(0)
    heads[0].update_codebook(vectors, numbers)
    model = make_model(VQ)
    objective = autoencode.Objective(autoencode.Config(), model, ["image"])
    objective.seen = [(vectors[:15], numbers[:15])]  # of the first rank; the second has the others
    others = iter((vectors[15:], numbers[15:]))
    torch.manual_seed(0)
    objective.update_statistics(torch.zeros(()), lambda own: [own, next(others)])
    assert torch.equal(model.heads["codes"].quantizer.codebook, heads[0].quantizer.codebook)
    assert not objective.seen


def test_the_averaged_model_has_an_averaged_codebook():
    old, new = make_model(VQ), make_model(VQ)
    before = old.heads["codes"].quantizer.codebook.clone()
    new.heads["codes"].quantizer.codebook = before + 1
    ema.update(old, new, 1000, 0.9, torch.zeros(()))
    assert torch.allclose(old.heads["codes"].quantizer.codebook, before + 0.1, atol=1e-6)
    ema.update(old, new, 1000, 0.9, torch.ones(()))
    assert torch.allclose(old.heads["codes"].quantizer.codebook, before + 0.1, atol=1e-6)


def test_an_interrupted_run_is_an_uninterrupted_one(corpus, tmp_path):
    """With a learned codebook that revives codes: all tensors, those of the averages too, bit for bit."""
    whole = loop.pretrain(build(codec_config(corpus, tmp_path / "whole", VQ, steps=8, save_every=4)))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(checkpoint.newest(tmp_path / "parts"))
    again = loop.pretrain(build(codec_config(corpus, tmp_path / "parts", VQ, steps=8, save_every=4)), resume=True)
    for name in ("model", "ema", "optimizer"):
        expected, found = checkpoint.read_tensors(whole, name), checkpoint.read_tensors(again, name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    moved = [checkpoint.read_tensors(checkpoint.folder_of(tmp_path / "whole", step), "model") for step in (4, 8)]
    names = [key for key in moved[0] if key.endswith(".embed")]
    assert names and not torch.equal(moved[0][names[0]], moved[1][names[0]]), "the codebook has learned"


def test_training_gives_content_back_better_and_better(trained):
    rows = list(losses(trained / "image").values())
    assert rows[-1]["loss/give/autoencode/psnr"] > rows[0]["loss/give/autoencode/psnr"] + 3
    assert 0 < rows[-1]["loss/give/autoencode/codebook_use"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"codes": {"levels": [2, 5]}}}, "levels are whole numbers from 3 up"),
        ({"heads": {"codes": {"quantizer": "vq", "decay": 1.0}}}, "decay is from 0 to below 1"),
        ({"heads": {"codes": {"modality": "audio"}}}, "the model has no modality 'audio'"),
        ({"heads": {"retrieval": {}}}, "the model has no head 'codes'"),
        ({"heads": {"codes": {"head": "retrieval"}}}, "the head 'codes' makes no codes"),
        ({"tokenizers": {"text": {"vocab_size": 300}, **IMAGE}}, "the raw content of text is no values"),
    ],
)
def test_settings_that_do_not_fit_are_named(corpus, tmp_path, change, message):
    data = codec_config(corpus, tmp_path)
    data["model"] |= change
    with pytest.raises(UserError, match=message):
        TrainStep(build(data), torch.device("cpu"))


def test_without_the_library_one_line_says_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(UserError, match=r"pip install multimodal_fm\[codes\]"):
        TrainStep(build(codec_config(corpus, tmp_path)), torch.device("cpu"))


# --------------------------------------------------------------------------------------------------- members, tokenizer


def make_tokenizer(**settings) -> codes.Tokenizer:
    return codes.Tokenizer(codes.Config(**{"codebook_size": 36, "rows": 3, "columns": 4, **settings}))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_codes_are_read_as_numpy_wrote_them(kind, order):
    array = np.asarray(np.arange(12).reshape(3, 4), kind, order=order)
    (tokens,) = make_tokenizer().read({"codes.npy": npy(array)})
    assert tokens.content.tolist() == [36, *range(12)] and tokens.content.dtype == torch.long
    assert tokens.position[0].tolist() == [0, 0, 0]
    assert tokens.position[1:].tolist() == [[1, row, column] for row in range(3) for column in range(4)]
    assert make_tokenizer().measure(npy(array), 0) == (3, 4)
    assert make_tokenizer().read({"jpg": b""}) == []


def test_codes_of_a_sound_are_read_in_windows():
    import random

    tokenizer, array = make_tokenizer(length=5, member="audio.codes.npy"), np.arange(12, dtype=np.uint16)
    windows = tokenizer.read({"audio.codes.npy": npy(array)})
    assert [w.content.tolist() for w in windows] == [[36, *range(5)], [36, *range(5, 10)], [36, 10, 11]]
    assert windows[0].position.tolist() == [[t, 0, 0] for t in range(6)]
    drawn = {tuple(tokenizer.read(npy(array), random.Random(i))[0].content.tolist()[1:]) for i in range(200)}
    assert drawn == {tuple(range(start, start + 5)) for start in range(8)}
    assert tokenizer.read({"codes.npy": npy(array)}) == [], "another member"


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no array"),
        (b"not an array at all", "no array"),
        (npy(np.array([{}], object), allow_pickle=True), "no array of numbers"),
        (npy(np.ones((3, 4))), "whole numbers"),
        (npy(np.arange(12)), r"\(rows, columns\)"),
        (npy(np.zeros((4, 4), int)), "more than 3 x 4"),
        (npy(np.full((3, 4), 36)), "code 36 of a codebook of 36"),
        (npy(np.full((3, 4), -1)), "code -1"),
        (npy(np.zeros((3, 4), int))[:-1], "are no array"),
        (npy(np.zeros((3, 4), int)) + b"x", "are no array"),
        (npy(np.zeros((0, 4), int)), "no codes"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 1000000)}\n"), "are no array"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, -8)}\n"), "array"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (True, 'x')}\n"), "no array"),
        (header("[" * 900 + "\n"), "no array"),
        (header("__import__('os').system('true')\n"), "no array"),
        (b"\x93NUMPY\x09\x00" + b"\x00" * 40, "no array"),
        (bytes(1001), "the limit is 1000"),
    ],
)
def test_what_is_no_array_of_codes_is_refused(data, what):
    with pytest.raises(SampleError, match=what):
        make_tokenizer(max_bytes=1000).read({"codes.npy": data})


def test_the_members_name_is_checked():
    for member in ("codes.txt", ".codes.npy", "Image.codes.npy"):
        with pytest.raises(ValueError, match="member is codes.npy"):
            codes.Config(member=member)
    with pytest.raises(UserError, match="--codes-member"):
        Settings(["x"], codes_member="a/codes.npy")


def test_the_predictor_is_a_cross_entropy_of_codes_alone():
    torch.manual_seed(0)
    predictor = make_tokenizer().predictor(8)
    vectors, ids = torch.randn(6, 8), torch.tensor([36, 0, 5, 35, 7, 36])
    logits = predictor.logits(vectors)
    assert logits.shape == (6, 36)
    expected = torch.logsumexp(logits.double(), 1) - logits.double().gather(1, ids.clamp(max=35)[:, None])[:, 0]
    assert torch.allclose(predictor(vectors, ids).double(), expected * (ids < 36), atol=1e-6)
    generation = make_tokenizer().generation()
    (tokens,) = make_tokenizer().read(np.arange(12).reshape(3, 4))
    assert generation.first == (36,) and generation.end is None and generation.length == 13
    assert torch.equal(generation.positions, tokens.position)


# ------------------------------------------------------------------------------------------------ codec, decoding, file


def test_pictures_and_their_patches_are_each_others_inverse():
    tokenizer = image.Tokenizer(image.Config(patch=8, max_tokens=20))
    given = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (tokens,) = tokenizer.read(given)
    shuffled = torch.randperm(len(tokens), generator=torch.manual_seed(0))
    assert np.array_equal(np.asarray(tokenizer.render(tokens.content[shuffled], tokens.position[shuffled])), given)
    made = tokenizer.reconstructor(16)
    assert torch.equal(made.content(made.target(tokens.content)), tokens.content)


@pytest.mark.parametrize("patch_mels", [64, 32])
def test_a_sound_that_is_decoded_has_the_log_mel_that_it_was_made_of(patch_mels):
    """A gliding voice by Griffin-Lim: what the tokenizer reads of the result is what it was given."""
    time = np.arange(16_000) / 16_000
    voice = sum(np.sin(2 * np.pi * k * (150 + 30 * time) * time) / k for k in range(1, 20))
    wave = 0.1 * voice * (1 + np.sin(6 * np.pi * time)) + 0.003 * np.random.default_rng(0).standard_normal(16_000)
    tokenizer = audio.Tokenizer(audio.Config(patch_mels=patch_mels))
    (tokens,) = tokenizer.read((wave, 16_000))
    made, rate = tokenizer.render(tokens.content, tokens.position)
    assert rate == 16_000 and float(made.abs().max()) == pytest.approx(0.5)
    (again,) = tokenizer.read((made, rate))
    assert again.content.shape == tokens.content.shape
    snr = 10 * torch.log10(tokens.content.square().mean() / (again.content - tokens.content).square().mean())
    assert snr > 10, snr
    noise = lambda power, rate: torch.randn(power.shape[1] * 160, generator=torch.manual_seed(0))  # noqa: E731
    (other,) = tokenizer.read(tokenizer.render(tokens.content, tokens.position, noise))
    assert (other.content - tokens.content).square().mean() > 5 * (again.content - tokens.content).square().mean()


def test_a_codec_codes_each_input_as_if_it_were_alone(trained):
    one = codec.load_own(str(trained / "image"))
    pictures = [picture(3, 4), picture(2, 2, 1), picture(1, 5, 3)]
    together, positions = one.encode(pictures), [own.position for own in pictures]
    content = one.decode(together, positions).split([12, 4, 5])
    for own, numbers, made in zip(pictures, together.split([12, 4, 5]), content, strict=True):
        assert torch.equal(one.encode([own]), numbers)
        assert (one.decode(numbers, [own.position]).int() - made.int()).abs().max() <= 1
    assert [one.grid([own]) for own in pictures] == [(3, 4), (2, 2), (1, 5)]


def test_a_codec_lies_in_one_file_and_is_the_same(trained, tmp_path):
    codec.export(trained / "image", tmp_path / "codec.safetensors")
    one, own = codec.load(str(tmp_path / "codec.safetensors")), codec.load_own(str(trained / "image"))
    assert torch.equal(one.encode([picture()]), own.encode([picture()]))
    assert codec.serialize(trained / "image") == (tmp_path / "codec.safetensors").read_bytes()
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    for file in ("broken.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match="not a codec's file"):
            codec.load(str(tmp_path / file))


def test_what_a_stranger_trained_is_not_opened(trained, tmp_path):
    shutil.copytree(trained / "image", tmp_path / "run")
    next((tmp_path / "run").rglob("SIGNATURE")).write_text("somebody else's")
    with pytest.raises(UserError, match="was not trained here by you"):
        make_tokenizer(codec=str(tmp_path / "run")).decode([0] * 12)


def test_decoding_gives_a_picture_or_a_sound(trained):
    tokenizer = make_tokenizer(codec=str(trained / "image"))
    numbers = list(range(12))
    made = tokenizer.decode([36, *numbers])
    assert isinstance(made, Image.Image) and made.size == (32, 24)
    assert np.array_equal(np.asarray(made), np.asarray(tokenizer.decode(numbers)))
    for wrong in (numbers[:5], [*numbers[:11], 99], []):
        with pytest.raises(ValueError, match="codes"):
            tokenizer.decode(wrong)
    with pytest.raises(UserError, match="cannot be decoded without a codec"):
        make_tokenizer().decode(numbers)
    tokenizer = make_tokenizer(codec=str(trained / "audio"), length=15)
    wave, rate = tokenizer.decode(list(range(15)))
    assert wave.shape == (15 * 4 * 160,) and rate == 16_000 and torch.isfinite(wave).all()
    tokenizer.vocoder = lambda power, rate: torch.ones(power.shape[1])
    assert len(tokenizer.decode(list(range(15)))[0]) == 60


# -------------------------------------------------------------------------------------------------------------- packing


def members(folder) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{m.name}": tar.extractfile(m).read() for m in tar}
    return found


def test_pack_writes_codes_beside_what_is_there(trained, corpus, tmp_path):
    sources, split = [str(corpus / "train-0.tar"), str(corpus / "train-1.tar")], [0.5, 0.5]
    plain = Settings(sources, split=split, dedup="none")
    coded = dataclasses.replace(plain, codes=str(trained / "image"))
    facts = pack(coded, tmp_path / "a", workers=0)
    assert pack(coded, tmp_path / "a", workers=0) == facts, "already there"
    pack(plain, tmp_path / "b", workers=0)
    a, b = (members(tmp_path / name) for name in "ab")
    assert {name: data for name, data in a.items() if not name.endswith("codes.npy")} == b
    one = codec.load_own(str(trained / "image"))
    for name, data in a.items():
        if name.endswith("codes.npy"):
            array = np.load(io.BytesIO(data), allow_pickle=False)
            expected = one.encode(one.tokenizer.read(a[name.replace("codes.npy", "jpg")]))
            assert (array.dtype == np.uint16 and array.shape == (3, 4)) or array.shape == (4, 3), array.shape
            assert array.ravel().tolist() == expected.tolist()
    assert sum(name.endswith("codes.npy") for name in a) == 32
    digest = codec.hash_file(_exported(trained, tmp_path))
    card = (tmp_path / "a" / "card.md").read_text()
    assert f"a codebook of 36 (FSQ), made by the codec with the SHA-256 `{digest}`" in card
    with pytest.raises(UserError, match="packed with other settings"):
        pack(dataclasses.replace(coded, codes=str(trained / "audio")), tmp_path / "a", workers=0)


def _exported(trained, tmp_path):
    codec.export(trained / "image", tmp_path / "codec.safetensors")
    return tmp_path / "codec.safetensors"


def test_a_pack_with_codes_that_was_stopped_goes_on(trained, corpus, tmp_path, monkeypatch):
    """It stops while samples are coded; by then the run has learned on, but the pack keeps its own copy."""
    from multimodal_fm.pack import codes as pack_codes
    from multimodal_fm.pack import state

    monkeypatch.setattr(state, "CHUNK", 8)
    coded = Settings([str(corpus / "train-0.tar")], dedup="none", codes=str(trained / "image"))
    pack(coded, tmp_path / "whole", workers=0)
    calls, original = itertools.count(), pack_codes.add

    def stop(*given):
        if next(calls) == 11:
            raise KeyboardInterrupt
        original(*given)

    monkeypatch.setattr(pack_codes, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(coded, tmp_path / "parts", workers=0)
    monkeypatch.setattr(pack_codes, "add", original)
    pack(coded, tmp_path / "parts", workers=0)
    assert members(tmp_path / "whole") == members(tmp_path / "parts")
    assert not list((tmp_path / "parts" / ".pack").glob("codec*"))


@pytest.mark.slow
def test_codes_do_not_depend_on_the_number_of_workers(trained, corpus, tmp_path):
    coded = Settings([str(corpus / "train-*.tar")], codes=str(trained / "image"))
    pack(coded, tmp_path / "a", workers=0)
    pack(coded, tmp_path / "b", workers=2)
    assert members(tmp_path / "a") == members(tmp_path / "b")


def run(*words: str) -> None:
    app(list(words), exit_on_error=False, print_error=False, result_action="return_value")


def test_a_corpus_gets_codes_of_two_modalities(trained, corpus, tmp_path):
    """One after the other, from the command line; coding again replaces what an earlier codec made."""
    rest = ["--dedup", "none", "--workers", "0"]
    run("pack", str(corpus / "validation-0.tar"), *rest, "--codes", str(trained / "image"), "--to", str(tmp_path / "a"))
    more = ["--codes", str(trained / "audio"), "--codes-member", "audio.codes.npy"]
    run("pack", str(tmp_path / "a" / "train-000000.tar"), *rest, *more, "--to", str(tmp_path / "b"))
    found = members(tmp_path / "b")
    assert all(found[f"train-000000.tar/sample01{i:02d}.codes.npy"] for i in range(16))
    array = np.load(io.BytesIO(found["train-000000.tar/sample0100.audio.codes.npy"]))
    assert array.shape == (12,), "half a second: two windows of six tokens"
    with pytest.raises(UserError, match="no checkpoint in it"):
        run("pack", str(corpus / "validation-0.tar"), "--codes", str(tmp_path), "--to", str(tmp_path / "c"))


# -------------------------------------------------------------------------------------------- generating and evaluating


def test_a_checkpoint_that_writes_codes_carries_its_codec(trained, corpus, tmp_path):
    """Text, then codes, in one sequence, with a contrastive head: trained, resumed, moved, loaded, decoded."""
    pack(Settings([str(corpus / "train-0.tar")], dedup="none", codes=str(trained / "image")), tmp_path / "coded", 0)
    picture_codes = {
        "tokenizer": "codes",
        "codebook_size": 36,
        "rows": 3,
        "columns": 4,
        "codec": str(trained / "image"),
    }
    task = {"modalities": ["text", "pictures"], "batch_size": 4, "sources": {"all": 1}}
    data = tiny(
        corpus,
        run_dir=str(tmp_path / "run"),
        sources={"all": {"shards": f"{tmp_path}/coded/train-*.tar"}},
        tasks={
            "draw": {**task, "objectives": {"causal": {"fuse": True, "drop_prefix": 0.3}}},
            "pairs": {**task, "objectives": {"contrastive": {}}},
        },
        tokenizers={"text": {"vocab_size": 300, "max_tokens": 24}, "pictures": picture_codes},
        steps=2,
        save_every=2,
    )
    loop.pretrain(build(data))
    folder = loop.pretrain(build({**data, "steps": 4}), resume=True)
    assert (folder / "tokenizer-pictures.safetensors").exists()
    folder = shutil.move(folder, tmp_path / "elsewhere")
    model = multimodal_fm.load(folder)
    expected = make_tokenizer(codec=str(trained / "image")).decode(list(range(12)))
    assert np.array_equal(np.asarray(model.tokenizers["pictures"].decode(list(range(12)))), np.asarray(expected))
    assert model.embed(pictures=[np.zeros((3, 4), int)])["pictures"].shape == (1, 32)
    wrong = {**data, "run_dir": str(tmp_path / "wrong")}
    wrong["model"]["tokenizers"]["pictures"] = {**picture_codes, "codebook_size": 40}
    with pytest.raises(UserError, match="has 36 codes: set codebook_size to that"):
        loop.pretrain(build(wrong))


def test_a_share_of_the_samples_is_read_without_its_prefix():
    text = make_sequence(torch.arange(5), torch.zeros(5, 3), 0)
    (drawn,) = make_tokenizer().read(np.arange(12).reshape(3, 4))
    sample = Sample({"text": text, "pictures": drawn.replace(modality=torch.ones(13, dtype=torch.long))})
    settings = causal.Config(fuse=True, drop_prefix=0.25)
    lengths = [
        sum(map(len, causal.Objective.arrange(settings, sample, torch.Generator().manual_seed(i)).inputs))
        for i in range(2000)
    ]
    assert set(lengths) == {13, 18} and abs(lengths.count(13) / 2000 - 0.25) < 0.03
    alone = next(
        e
        for i in range(50)
        if len((e := causal.Objective.arrange(settings, sample, torch.Generator().manual_seed(i))).inputs) == 1
    )
    assert alone.targets[0].content.tolist() == list(range(12)) and alone.rows[0].tolist() == list(range(12))
    assert len(causal.Objective.arrange(settings, sample).inputs) == 2, "evaluation reads all of it"
    with pytest.raises(ValueError, match="fuse: true"):
        causal.Config(drop_prefix=0.1)


def test_what_is_measured_is_what_brute_force_measures(trained, tmp_path):
    """Pictures of several sizes, one of them twice and one broken."""
    generator, written = np.random.default_rng(0), []
    for i in range(7):
        pixels = np.kron(generator.integers(0, 256, (3, 3 + i % 2, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        written.append({"__key__": f"k{i}", "png": data.getvalue()})
    written += [{"__key__": "copy", "png": written[0]["png"]}, {"__key__": "broken", "png": b"x"}]
    shards.write(tmp_path / "held.tar", written)
    model = multimodal_fm.load(trained / "image")
    figures, embedded = evaluate(model, {}, Evaluation(str(tmp_path / "held.tar"), measure=["reconstruction"]))
    assert len(embedded.skipped) == 1 and "codes drawn evenly would use" in embedded.notes[0]
    one, psnr, used, pixels = codec.Codec(model), [], [], []
    for row in written[:7]:
        tokens = one.tokenizer.read(row["png"])
        numbers = one.encode(tokens)
        used += numbers.tolist()
        given, made = (
            np.asarray(one.tokenizer.render(c, tokens[0].position), float)
            for c in (tokens[0].content, one.decode(numbers, [tokens[0].position]))
        )
        psnr.append(10 * np.log10(255**2 / ((given - made) ** 2).mean()))
        pixels.append(tokens[0].content.double())
    mean = torch.cat(pixels).mean(0)
    baseline = [10 * np.log10(255**2 / float((own - mean).square().mean())) for own in pixels]
    figure = figures["reconstruction/image/psnr"]
    assert figure["n"] == 7 and figure["value"] == pytest.approx(np.mean(psnr), rel=1e-9)
    assert figure["low"] < figure["value"] < figure["high"] and figure["chance"] == pytest.approx(np.mean(baseline))
    assert figures["reconstruction/image/codebook_use"]["value"] == pytest.approx(len(set(used)) / 36)
    shares = np.array([used.count(number) for number in set(used)]) / len(used)
    assert figures["reconstruction/image/perplexity"]["value"] == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum())
    )


def test_sounds_are_measured_by_their_log_mel(trained, corpus):
    model = multimodal_fm.load(trained / "audio")
    figures, _ = evaluate(model, {}, Evaluation(f"{corpus}/validation-0.tar", measure=["reconstruction"]))
    one, found = codec.Codec(model), {}
    for row in samples(16, 100):
        tokens = one.tokenizer.read(row["flac"])
        made = one.decode(one.encode(tokens), [own.position for own in tokens]).double()
        given = torch.cat([own.content for own in tokens]).double()
        error = float((made - given).square().mean())
        found[row["flac"]] = 10 * np.log10(float(given.square().mean()) / error), np.sqrt(error)
    snr, rmse = np.mean(list(found.values()), 0)
    assert figures["reconstruction/audio/snr"]["value"] == pytest.approx(snr)
    assert figures["reconstruction/audio/rmse"]["value"] == pytest.approx(rmse)
    assert figures["reconstruction/audio/snr"]["n"] == len(found) == 4


def test_a_model_without_codes_is_not_measured(corpus):
    model = make_model({"head": "retrieval"})
    figures, _ = evaluate(model.eval(), {}, Evaluation(f"{corpus}/validation-0.tar", measure=["reconstruction"]))
    assert figures == {}


def test_the_models_of_the_page_can_be_built():
    """The configurations in docs/codes.md."""
    page = Path(__file__).parent.parent.joinpath("docs/codes.md").read_text(encoding="utf-8")
    found = [yaml.safe_load(block)["model"] for block in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    models = [Model(config.build(ModelConfig, model)) for model in found]
    assert [list(model.modalities) for model in models] == [["image"], ["text", "pictures", "sounds"]]
    assert codec.find_head(models[0]).config.codebook_size == 1000
