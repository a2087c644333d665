import io
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.tokenizers import audio, base, image, text


def generator(seed=0):
    return random.Random(seed)


def text_tokenizer(**settings) -> text.Tokenizer:
    return text.Tokenizer(text.Config(**settings))


def image_tokenizer(**settings) -> image.Tokenizer:
    return image.Tokenizer(image.Config(**settings))


def audio_tokenizer(**settings) -> audio.Tokenizer:
    return audio.Tokenizer(audio.Config(**settings))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    raws = [{"txt": b"a red square and a blue circle"}, {"json": json.dumps({"caption": "ein rotes Quadrat"}).encode()}]
    return text_tokenizer(vocab_size=400, max_tokens=32).fit(raws * 20, tmp_path_factory.mktemp("bpe") / "words")


TEXTS = ["", "plain", "<|endoftext|> [MASK] <s>", "日本語 עברית 🙂‍↔️", "\x00\x7f\t\r\n", "a\u0301 \u202e ﷽", " " * 50]


@pytest.mark.parametrize("given_text", TEXTS)
def test_text_round_trips(words, given_text):
    ids = words.encode(given_text)
    assert words.decode(ids) == given_text
    assert text.BEGIN not in ids and text.END not in ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_round_trips(words, given_text):
    assert words.decode(words.encode(given_text)) == given_text


def test_odd_captions_are_learned_from_and_drawn(tmp_path):
    odd = {"json": json.dumps({"captions": {"en": "x \ud800 y", "fr": None, "de": 3}}).encode()}
    config = text_tokenizer(vocab_size=300, max_tokens=32).fit(
        [odd, {"json": b"[1]"}, {"json": b"3"}], tmp_path / "words"
    )
    assert len(config.split_inputs(odd)) == 1
    only = text_tokenizer(vocab_size=300, max_tokens=32, file=config.file, fields={"txt": 0, "captions": 1})
    assert only.read({"txt": b"word"}, generator())[0].content.numel() > 2


def test_bytes_are_counted(words):
    for given_text in ("plain", "日本語", "🙂"):
        assert words.count_bytes(words.encode(given_text)) == len(given_text.encode())


def test_half_a_surrogate_pair_is_no_error(words):
    assert "\ufffd" in words.decode(words.encode("x\ud800y"))


def test_a_pasted_megabyte_costs_bounded_time(words):
    for paste in ("a" * 1_000_000, "ab c" * 250_000, "\n" * 1_000_000):
        began = time.process_time()
        (sequence,) = words.read(paste if paste.strip() else paste + "x", generator())
        assert len(sequence) <= 32
        assert time.process_time() - began < 1.0


def test_long_text_is_covered_by_windows(words):
    long = " ".join(f"square {i}" for i in range(100))
    windows = words.read(long)
    assert len(windows) > 1 and all(len(w) <= 32 for w in windows)
    assert "".join(words.decode(w.content.tolist()) for w in windows) == long


def test_a_text_part_may_be_several_texts(words):
    row = {"caption": "one", "captions": {"en": "one", "fr": "un", "de": "eins"}, "meta": {"alt": ["first", "second"]}}
    raw = {"json": json.dumps(row).encode(), "txt": b"word"}
    settings_ = text_tokenizer(
        vocab_size=400, max_tokens=32, file=words.file, fields={"txt": 1, "captions": 3, "meta.alt": 1}
    )
    seen = {words.decode(settings_.read(raw, generator(i))[0].content.tolist()) for i in range(80)}
    assert seen == {"word", "one", "un", "eins", "first", "second"}
    settings_.config.fields = ["meta.alt", "txt"]
    assert settings_.split_inputs(raw) == ["first", "second"]


def test_text_that_cannot_be_read(words):
    with pytest.raises(SampleError, match="text-decode"):
        words.read({"txt": "café".encode("latin-1")})
    with pytest.raises(SampleError, match="empty"):
        words.read({"txt": b"  \n"})
    with pytest.raises(SampleError, match="json"):
        words.read({"json": b"{"})
    assert words.read({"json": b'{"other": 1}'}) == []


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """Merges of letters that stand next to each other in every way, and the library that learned them."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("merges")
    words = ["".join(draw.choices("aabc'é1 ", k=draw.randint(1, 30))) for _ in range(2000)]
    config = text_tokenizer(vocab_size=1000).fit([{"txt": word.encode()} for word in words], folder / "words")
    return config, Tokenizer.from_file(config.file)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text("aabc'é1 ", max_size=60), st.text(max_size=60)))
def test_text_is_encoded_as_by_the_library_that_learned_the_merges(merges, given_text):
    config, learned = merges
    whole = text._replace_surrogates(given_text)
    assert config.encode(given_text) == [i + 2 for i in learned.encode(whole, add_special_tokens=False).ids]


def test_files_of_byte_level_bpe_are_read_and_others_refused(words, tmp_path):
    saved = json.loads(Path(words.file).read_text())
    whole = "it's 3 red squares,  on\n blue 1234567"

    def variant(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(saved | changes))
        return text_tokenizer(vocab_size=400, file=str(path))

    regex = {"Regex": r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"}
    pattern = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    for steps in ([pattern, bytewise], [bytewise]):
        config = variant(f"by{len(steps)}", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        learned = Tokenizer.from_file(config.file)
        assert config.encode(whole) == [i + 2 for i in learned.encode(whole, add_special_tokens=False).ids]
        assert config.decode(config.encode(whole)) == whole
    vocabulary = saved["model"]["vocab"]
    refused = {
        "words": {"model": saved["model"] | {"type": "WordLevel"}},
        "folded": {"normalizer": {"type": "Lowercase"}},
        "spaced": {"pre_tokenizer": saved["pre_tokenizer"] | {"add_prefix_space": True}},
        "inverted": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern | {"invert": True}, bytewise]}},
        "twice": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, saved["pre_tokenizer"]]}},
        "turned": {"model": saved["model"] | {"merges": saved["model"]["merges"][::-1]}},
        "short": {"model": saved["model"] | {"vocab": {k: v for k, v in vocabulary.items() if k != "Ā"}}},
        "empty": {"model": {}},
    }
    for name, changes in refused.items():
        with pytest.raises(UserError, match=f"{name}.json: not a tokenizer of byte-level BPE"):
            text.load_merges(variant(name, **changes).file)


def test_merges_are_those_of_the_file_that_stands_under_the_name(words, tmp_path, monkeypatch):
    saved = json.loads(Path(words.file).read_text())
    few = {word: i for word, i in saved["model"]["vocab"].items() if i < 256}
    for name, model in {"one": saved["model"], "two": saved["model"] | {"vocab": few, "merges": []}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(saved | {"model": model}))
    found = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        found.append(text.load_merges("tokenizer.json").n_vocab)
    assert found[0] > found[1] == 256
    kept = text.Tokenizer(text.Config(file="tokenizer.json", vocab_size=258))
    ids = kept.encode("square square")
    os.replace(tmp_path / "one" / "tokenizer.json", "tokenizer.json")
    assert kept.encode("square square") == ids, "a tokenizer in use stays as it is"
    assert len(text.Tokenizer(kept.config).encode("square square")) < len(ids)
    Path("tokenizer.json").unlink()
    assert text.load_merges("tokenizer.json").n_vocab == found[0], "what was read stays"


def test_every_part_of_a_long_text_is_drawn(words):
    long = " ".join(f"square {i}" for i in range(10))
    config = text_tokenizer(vocab_size=400, max_tokens=12, file=words.file)
    drawn = [config.decode(config.read(long, generator(i))[0].content.tolist()) for i in range(2000)]
    assert all(one in long for one in drawn) and len(set(drawn)) > 30
    assert any(long.startswith(one) for one in drawn) and any(long.endswith(one) for one in drawn)


def test_a_causal_text_reads_what_is_before(words):
    for maker in (None, generator(0)):
        (plain,), (causal,) = (words.replace(causal=causal).read("a red square", maker) for causal in (False, True))
        assert not plain.order.any() and causal.order.tolist() == list(range(len(causal)))
        assert torch.equal(plain.content, causal.content)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (1, 1), (1000, 1), (3, 500), (97, 89), (640, 480)])
def test_the_grid_keeps_the_aspect_ratio_and_the_limit(size):
    tokenizer = image_tokenizer(patch=8, max_tokens=50, enlarge=True)
    (tokens,) = tokenizer.read({"jpg": jpeg((200, 10, 10), size)})
    rows, columns = tokens.position[:, 1].max() + 1, tokens.position[:, 2].max() + 1
    assert len(tokens) == rows * columns <= 50
    if 1 / 8 <= size[0] / size[1] <= 8:
        assert len(tokens) >= 0.6 * 50
        assert 0.7 < (columns / rows) / (size[0] / size[1]) < 1.4


def test_small_pictures_are_enlarged_only_where_the_config_says_so():
    sizes = [(40, 30), (7, 8), (1, 1), (3, 100), (56, 48), (57, 60), (400, 300)]
    keep, enlarge = (image_tokenizer(patch=8, max_tokens=50, enlarge=enlarge) for enlarge in (False, True))
    counts = [len(keep.read({"jpg": jpeg("red", size)})[0]) for size in sizes]
    assert counts == [5 * 4, 1, 1, 12, 42, 49, 48]
    assert counts == keep.count_tokens(*np.array([(0, *size) for size in sizes]).T).tolist()
    assert [len(enlarge.read({"jpg": jpeg("red", size)})[0]) for size in sizes][:3] == [48, 42, 49]


@pytest.mark.parametrize("enlarge, counts", [(False, [16, 1, 1, 4, 36, 49, 49]), (True, [49] * 7)])
def test_every_picture_is_squeezed_into_a_square_where_the_config_says_so(enlarge, counts):
    sizes = [(40, 30), (7, 8), (1, 1), (3, 100), (56, 48), (57, 60), (400, 300)]
    square = image_tokenizer(patch=8, max_tokens=50, enlarge=enlarge, square=True)
    found = [square.read({"jpg": jpeg("red", size)})[0] for size in sizes]
    assert [len(tokens) for tokens in found] == counts
    assert counts == square.count_tokens(*np.array([(0, *size) for size in sizes]).T).tolist()
    assert all(tokens.position[:, 1:].amax(0).tolist() == [n**0.5 - 1] * 2 for tokens, n in zip(found, counts))
    (drawn,) = square.replace(min_crop_scale=0.3).read({"jpg": jpeg("red", (400, 300))}, generator(0))
    assert len(drawn) == 49


@pytest.mark.parametrize("side", ["left", "top"])
@pytest.mark.parametrize("encode", [lambda p: p, lambda p: as_jpeg(p), lambda p: as_jpeg(p.convert("CMYK"))])
def test_all_of_a_long_picture_is_read_in_evaluation(side, encode):
    pixels = np.zeros((100, 1000, 3), np.uint8)
    pixels[:, :40] = pixels[:, -40:] = 255  # four per cent at each end
    picture = Image.fromarray(pixels if side == "left" else pixels.transpose(1, 0, 2))
    (tokens,) = image_tokenizer(patch=8, max_tokens=64).read(encode(picture))
    values, along = tokens.content.float().mean(1), tokens.position[:, 2 if side == "left" else 1]
    assert values[along == 0].min() > 150 and values[along == along.max()].min() > 150


def test_a_source_changes_augmentation_settings_alone():
    tokenizers = {"text": text_tokenizer(), "image": image_tokenizer(patch=8, hflip=0.5)}
    changed = base.override_augmentation(tokenizers, {"image": {"hflip": 0, "min_crop_scale": 0.9}}, "scenes")
    assert changed == tokenizers | {"image": image_tokenizer(patch=8, hflip=0, min_crop_scale=0.9)}
    for augment, problem in (
        (
            {"image": {"vflip": 0}},
            "sources.scenes.augment.image.vflip: no augmentation of image (min_crop_scale, hflip",
        ),
        ({"image": {"patch": 16}}, "sources.scenes.augment.image.patch: no augmentation of image"),
        ({"image": {"hflip": 2}}, "sources.scenes.augment.image: hflip and color_jitter are from 0 to 1"),
        ({"image": {"hflip": "no"}}, "sources.scenes.augment.image: "),
        ({"text": {"hflip": 0}}, "sources.scenes.augment.text.hflip: no augmentation of text (it has none)"),
        ({"video": {}}, "sources.scenes.augment.video: there is no tokenizer 'video' (there are: text, image)"),
    ):
        with pytest.raises(UserError, match=re.escape(problem)):
            base.override_augmentation(tokenizers, augment, "scenes")


def test_numpy_pictures_are_read_as_tensors_are():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    tokenizer = image_tokenizer(patch=8)
    expected = tokenizer.read(torch.from_numpy(pixels).permute(2, 0, 1))[0].content
    for same in (
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        torch.from_numpy(pixels / 255).permute(2, 0, 1),
    ):
        assert torch.equal(tokenizer.read(same)[0].content, expected)
    for wrong in (
        pixels[0],
        pixels[..., :1],
        pixels[:0],
        pixels.astype(int),
        pixels / 255 * np.nan,
        torch.zeros(24, 40, 3),
    ):
        with pytest.raises(SampleError):
            tokenizer.read(wrong)


def test_patches_are_where_their_position_says():
    picture = torch.zeros(3, 32, 48, dtype=torch.uint8)
    picture[0, 8:16, 16:24] = 255  # row 1, column 2
    (tokens,) = image_tokenizer(patch=8, max_tokens=24).read(picture)
    bright = tokens.content.float().view(len(tokens), 3, -1)[:, 0].mean(1)
    assert tokens.position[bright.argmax()].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
        ("L", 128, (128, 128, 128)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 128), (127, 127, 127)),
        ("P", 5, None),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_color_modes(mode, color, expected):
    data = io.BytesIO()
    Image.new(mode, (16, 16), color).save(data, "JPEG" if mode == "CMYK" else "PNG")
    picture = image_tokenizer().decode_picture(data.getvalue())
    assert picture.shape == (16, 16, 3)
    if expected:
        assert np.abs(picture[8, 8].astype(int) - expected).max() <= 3


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 40, 10))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    data = io.BytesIO()
    picture.save(data, "JPEG", exif=exif, quality=95)
    upright = image_tokenizer().decode_picture(data.getvalue())
    assert upright.shape == (40, 20, 3) and upright[20, 15, 0] > 200 and upright[20, 4, 0] < 50


def test_a_damaged_note_beside_the_pixels_is_no_matter():
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(data, "JPEG", exif=exif)
    harmed = bytearray(data.getvalue())
    start = harmed.index(b"Exif")
    for place in range(start + 6, start + 30):
        changed = bytearray(harmed)
        changed[place] ^= 0xFF
        assert image_tokenizer().decode_picture(bytes(changed)).shape[2] == 3


def test_pictures_that_cannot_be_read():
    whole = jpeg((1, 2, 3), (300, 300))
    for data in (b"", b"<html><body>404</body></html>", whole[: len(whole) // 2], b"\xff\xd8\xff"):
        with pytest.raises(SampleError):
            image_tokenizer().read({"jpg": data})
    with pytest.raises(SampleError, match="pixel-limit"):
        image_tokenizer(max_pixels=10_000).read({"jpg": whole})


def waves(size=(640, 480)) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[: size[1], : size[0]] / 40.0
    levels = np.stack([np.sin(x + y / 3), np.sin(y / 2 - x / 5), np.sin(x * y / 40)], 2)
    return Image.fromarray((127 + 90 * levels).astype(np.uint8))


def as_jpeg(picture: Image.Image, **how) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=92, **how)
    return data.getvalue()


@pytest.fixture
def decoded(monkeypatch):
    """The shapes that the fast decoder returned."""
    import simplejpeg

    shapes, decode = [], simplejpeg.decode_jpeg

    def watched(*given, **how):
        pixels = decode(*given, **how)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    return shapes


@pytest.mark.parametrize("size", [(640, 480), (481, 643), (1999, 777), (100, 80)])
def test_a_reduced_picture_is_nearly_the_whole_one(decoded, size):
    config, picture = image_tokenizer(patch=16, max_tokens=64, min_crop_scale=0.4, hflip=0.5), waves(size)
    data = as_jpeg(picture)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in (None, 1, 2, 3, 4):
        (small,), (full,) = (config.read(r, seed if seed is None else generator(seed)) for r in (data, whole))
        assert torch.equal(small.position, full.position)
        assert (small.content.float() - full.content.float()).abs().mean() < 4  # 43 and more where the part is another
    assert len(decoded) == 5 and (min(size) < 400 or all(2 * shape[0] <= size[1] + 1 for shape in decoded[:1]))


def test_a_jpeg_is_decoded_as_small_as_its_part_allows(decoded):
    config = image_tokenizer(patch=16, max_tokens=64)  # 128 pixels a side
    for side, expected in ((127, 127), (255, 255), (256, 128), (511, 256), (512, 128), (1023, 256), (1024, 128)):
        config.read({"jpg": as_jpeg(waves((side, side)))})
        assert decoded[-1] == (expected, expected)
    cropped = image_tokenizer(patch=16, max_tokens=64, min_crop_scale=0.3)
    data = as_jpeg(waves((400, 400)))
    for seed in range(10):
        cropped.read({"jpg": data}, generator(seed))
    assert set(decoded[-10:]) == {(200, 200), (400, 400)}  # the smaller the part, the more of its pixels are wanted


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("side", [16, 64])
def test_a_turned_jpeg_is_read_upright(decoded, turn, side):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = as_jpeg(waves((200, 120)), exif=exif)
    config = image_tokenizer(patch=8, max_tokens=side)
    (fast,), (plain,) = (
        config.read({"jpg": data}),
        config.read(Image.open(io.BytesIO(data))),
    )
    assert decoded and torch.equal(fast.position, plain.position)
    assert (fast.content.float() - plain.content.float()).abs().mean() < 4


def test_grey_and_odd_jpegs(decoded):
    config = image_tokenizer(patch=8, max_tokens=64)
    for mode in ("L", "CMYK"):
        data = as_jpeg(waves().convert(mode))
        (read,), (plain,) = (
            config.read({"jpg": data}),
            config.read(Image.open(io.BytesIO(data))),
        )
        assert (read.content.float() - plain.content.float()).abs().mean() < 4
    assert len(decoded) == 1  # CMYK is left to the other decoder


def test_a_cut_jpeg_is_lost_and_never_grey():
    data = as_jpeg(waves())
    for config in (image_tokenizer(), image_tokenizer(patch=8, max_tokens=16)):
        for share in (0.1, 0.5, 0.9, 0.99):
            for end in (b"", b"\xff\xd9"):
                with pytest.raises(SampleError, match="decode"):
                    config.read({"jpg": data[: int(share * len(data))] + end})
    (whole,), (behind,) = (image_tokenizer().read({"jpg": d}) for d in (data, data + b"\0" * 99))
    assert torch.equal(whole.content, behind.content)


def test_limits_hold_before_anything_is_decoded(decoded):
    data = as_jpeg(waves())
    for config, reason in (
        (image_tokenizer(max_pixels=307_199), "pixel-limit"),
        (image_tokenizer(max_bytes=999), "byte-limit"),
    ):
        with pytest.raises(SampleError, match=reason):
            config.read({"jpg": data})
    assert not decoded


def test_a_picture_varies_only_by_its_generator():
    config = image_tokenizer(
        patch=8, max_tokens=16, min_crop_scale=0.5, hflip=0.5, rotation_degrees=10, color_jitter=0.3
    )
    picture = torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, again, other = (config.read(picture, generator(s))[0].content for s in (1, 1, 2))
    assert torch.equal(first, again) and (first.shape != other.shape or not torch.equal(first, other))
    assert torch.equal(config.read(picture)[0].content, config.read(picture)[0].content)


SOUND = audio_tokenizer(patch_frames=8, n_mels=32, patch_mels=32, max_tokens=10)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_099, 192_000])
@pytest.mark.parametrize("modality", ["FLAC", "WAV", "OGG"])
def test_any_rate_becomes_the_same_sound(rate, modality):
    if modality == "OGG" and rate > 100_000:
        pytest.skip("libsndfile writes no such OGG")
    (tokens,) = SOUND.read({modality.lower(): tone(440, 0.6, rate, modality, channels=2)})
    (plain,) = SOUND.read((torch.sin(2 * torch.pi * 440 * torch.arange(9600) / 16_000) * 0.4, 16_000))
    assert tokens.content.shape == plain.content.shape
    loudest = tokens.content.view(len(tokens), 32, 8).mean((0, 2)).argmax()
    assert abs(int(loudest) - int(plain.content.view(len(tokens), 32, 8).mean((0, 2)).argmax())) <= 1


def test_long_sound_is_cropped_in_training_and_covered_in_inference():
    wave = torch.randn(16_000 * 3, generator=torch.Generator().manual_seed(0))
    windows = SOUND.read((wave, 16_000))
    covered = sum(len(w) for w in windows) * 8 * 160
    assert abs(covered - len(wave)) <= 8 * 160 and all(len(w) <= 10 for w in windows)
    crops = {float(SOUND.read((wave, 16_000), generator(i))[0].content.sum()) for i in range(5)}
    assert len(crops) == 5
    again = SOUND.read((wave, 16_000))
    assert all(torch.equal(a.content, b.content) for a, b in zip(windows, again))


def test_only_the_wanted_window_of_a_file_is_the_right_one():
    wave = torch.zeros(16_000 * 2)
    wave[16_000:] = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave.numpy(), 16_000, format="FLAC")
    from_file, given_wave = (
        SOUND.read({"flac": data.getvalue()}),
        SOUND.read((wave, 16_000)),
    )
    for a, b in zip(from_file, given_wave, strict=True):
        torch.testing.assert_close(a.content, b.content, rtol=0, atol=0.05)


@pytest.fixture
def frames(monkeypatch):
    """How many frames each call of the decoder returned."""
    import soundfile

    counts, read = [], soundfile.SoundFile.read

    def watched(self, *given, **how):
        found = read(self, *given, **how)
        counts.append(len(found))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    return counts


@pytest.mark.parametrize("modality", ["OGG", "FLAC"])
def test_only_the_wanted_window_is_decoded(frames, modality):
    data = {modality.lower(): tone(440, 5, 44_100, modality, channels=2)}
    for seed in range(5):
        SOUND.read(data, generator(seed))
    assert set(frames) == {SOUND.config.window_samples * 441 // 160}
    frames.clear()
    SOUND.read(data)
    assert sum(frames) <= 5 * 44_100 + len(frames)  # inference: all of it, once


@pytest.mark.parametrize("rate", [100, 8_000, 11_025, 22_050, 43_300, 44_100, 48_000, 192_000, 999_900])
def test_the_resampler_is_torchaudios(rate):
    import torchaudio

    for count in (1, 7, 441, 20_000):
        wave = torch.randn(count, generator=torch.Generator().manual_seed(0))
        expected = torchaudio.transforms.Resample(rate, 16_000)(wave)
        torch.testing.assert_close(audio.resample(wave, rate, 16_000), expected, rtol=0, atol=5e-6)


def test_too_long_a_sound_is_lost_by_its_header(frames):
    config = audio_tokenizer(patch_frames=8, n_mels=32, patch_mels=32, max_tokens=10, max_seconds=2.0)
    assert len(config.read({"flac": tone(440, 2.0)})[0]) == 10
    frames.clear()
    for raw in ({"flac": tone(440, 2.1)}, {"ogg": tone(440, 2.1, 44_100, "OGG")}, (torch.zeros(40_000), 16_000)):
        for seed in (None, generator()):
            with pytest.raises(SampleError, match="duration-limit"):
                config.read(raw, seed)
    assert not frames


def test_patches_in_frequency_have_rows():
    config = audio_tokenizer(patch_frames=8, n_mels=32, patch_mels=8, max_tokens=40)
    (tokens,) = config.read({"flac": tone(440)})
    assert set(tokens.position[:, 1].tolist()) == {0, 1, 2, 3}
    low, high = (config.read({"flac": tone(f)})[0] for f in (150, 6000))
    energy = [t.content.mean(1).view(-1, 4).mean(0).argmax().item() for t in (low, high)]
    assert energy[0] < energy[1]


def test_sounds_that_cannot_be_read():
    import soundfile

    empty, nan = io.BytesIO(), io.BytesIO()
    soundfile.write(empty, np.zeros(0), 16_000, format="WAV")
    soundfile.write(nan, np.full(16_000, np.nan), 16_000, format="WAV", subtype="FLOAT")
    for data, reason in (
        (empty.getvalue(), "empty"),
        (nan.getvalue(), "not-finite"),
        (b"<html>", "decode"),
        (b"", "decode"),
    ):
        with pytest.raises(SampleError, match=reason):
            SOUND.read({"wav": data})


def test_sounds_that_overflow_or_lie_are_lost():
    with pytest.raises(SampleError, match="not-finite"):
        SOUND.read((torch.randn(16_000) * 1e30, 16_000))
    for rate in (1, 2**31):
        with pytest.raises(SampleError, match="samples a second"):
            SOUND.read((torch.randn(16_000), rate))


def test_silence_and_a_click_are_finite():
    for wave in (torch.zeros(16_000), torch.ones(1), torch.full((100,), 1e6)):
        for tokens in SOUND.read((wave, 16_000)):
            assert torch.isfinite(tokens.content).all()


def test_the_trained_merges_replace_those_before_at_once(tmp_path, monkeypatch):
    """Another process reads either the old file or the new one, never a half."""
    raws = [{"txt": b"a red square and a blue circle"}]
    path = text_tokenizer(vocab_size=300).fit(raws, tmp_path / "words").file
    before, seen = Path(path).read_bytes(), []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(b).read_bytes()), replace(a, b)))
    text_tokenizer(vocab_size=300).fit([{"txt": b"something else altogether, altogether"}], tmp_path / "words")
    assert seen == [before] != [Path(path).read_bytes()]


def test_rand_augment_is_drawn_from_the_sample_alone():
    tokenizer = image.Tokenizer(image.Config(patch=8, max_tokens=16, rand_augment=15))
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    state = torch.random.get_rng_state()
    first, again, other = (tokenizer.view(picture, random.Random(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (tokenizer.view(picture) == picture).all()


def test_without_end_cuts_only_the_end_of_a_text_has_an_end(tmp_path):
    """So that a causal model of windows of a long text does not learn that texts end with the window."""
    config = text.Config(vocab_size=258, max_tokens=10, end_cuts=False)
    tokenizer = text.Tokenizer(config).fit([], tmp_path / "bytes")
    windows = tokenizer.read("abcdefghijklmnopqrst")
    assert [len(window) for window in windows] == [9, 9, 6]
    assert [int(window.content[-1]) == text.END for window in windows] == [False, False, True]
    assert all(int(window.content[0]) == text.BEGIN for window in windows)
    assert "".join(tokenizer.decode(window.content.tolist()) for window in windows) == "abcdefghijklmnopqrst"
    for seed in range(40):
        (window,) = tokenizer.read("abcdefghijklmnopqrst" * 20, random.Random(seed))
        decoded = tokenizer.decode(window.content.tolist())
        assert (int(window.content[-1]) == text.END) == (len(window) == 10), decoded
    ends = [tokenizer.read("abcdefghijk", random.Random(seed))[0] for seed in range(40)]
    said = {(tokenizer.decode(one.content.tolist()), int(one.content[-1]) == text.END) for one in ends}
    assert said == {("abcdefgh", False), ("bcdefghi", False), ("cdefghij", False), ("defghijk", True)}
