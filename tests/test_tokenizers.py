import io
import json
import time

import numpy as np
import pytest
import torch
from conftest import jpeg, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multimodal_fm.errors import Lost
from multimodal_fm.tokenizers import audio, image, text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    raws = [{"txt": b"a red square and a blue circle"}, {"json": json.dumps({"caption": "ein rotes Quadrat"}).encode()}]
    return text.fit(text.Config(vocabulary=400, limit=32), raws * 20, tmp_path_factory.mktemp("bpe"))


TEXTS = ["", "plain", "<|endoftext|> [MASK] <s>", "日本語 עברית 🙂‍↔️", "\x00\x7f\t\r\n", "a\u0301 \u202e ﷽", " " * 50]


@pytest.mark.parametrize("given_text", TEXTS)
def test_text_round_trips(words, given_text):
    ids = text.encode(words, given_text)
    assert text.decode(words, ids) == given_text
    assert text.BEGIN not in ids and text.END not in ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_round_trips(words, given_text):
    assert text.decode(words, text.encode(words, given_text)) == given_text


def test_odd_captions_are_learned_from_and_drawn(tmp_path):
    odd = {"json": json.dumps({"captions": {"en": "x \ud800 y", "fr": None, "de": 3}}).encode()}
    config = text.fit(text.Config(vocabulary=300, limit=32), [odd, {"json": b"[1]"}, {"json": b"3"}], tmp_path)
    assert len(text.things(config, odd)) == 1
    only = text.Config(vocabulary=300, limit=32, file=config.file, fields={"txt": 0, "captions": 1})
    assert text.read(only, {"txt": b"word"}, generator())[0].content.numel() > 2


def test_bytes_are_counted(words):
    for given_text in ("plain", "日本語", "🙂"):
        assert text.count_bytes(words, text.encode(words, given_text)) == len(given_text.encode())


def test_half_a_surrogate_pair_is_no_error(words):
    assert "\ufffd" in text.decode(words, text.encode(words, "x\ud800y"))


def test_a_pasted_megabyte_costs_bounded_time(words):
    for paste in ("a" * 1_000_000, "ab c" * 250_000, "\n" * 1_000_000):
        began = time.process_time()
        (sequence,) = text.read(words, paste if paste.strip() else paste + "x", generator())
        assert len(sequence) <= 32
        assert time.process_time() - began < 1.0


def test_long_text_is_covered_by_windows(words):
    long = " ".join(f"square {i}" for i in range(100))
    windows = text.read(words, long)
    assert len(windows) > 1 and all(len(w) <= 32 for w in windows)
    assert "".join(text.decode(words, w.content.tolist()) for w in windows) == long


def test_a_text_part_may_be_several_texts(words):
    row = {"caption": "one", "captions": {"en": "one", "fr": "un", "de": "eins"}, "meta": {"alt": ["first", "second"]}}
    raw = {"json": json.dumps(row).encode(), "txt": b"word"}
    settings_ = text.Config(vocabulary=400, limit=32, file=words.file, fields={"txt": 1, "captions": 3, "meta.alt": 1})
    seen = {text.decode(words, text.read(settings_, raw, generator(i))[0].content.tolist()) for i in range(80)}
    assert seen == {"word", "one", "un", "eins", "first", "second"}
    settings_.fields = ["meta.alt", "txt"]
    assert text.things(settings_, raw) == ["first", "second"]


def test_text_that_cannot_be_read(words):
    with pytest.raises(Lost, match="text-decode"):
        text.read(words, {"txt": "café".encode("latin-1")})
    with pytest.raises(Lost, match="empty"):
        text.read(words, {"txt": b"  \n"})
    with pytest.raises(Lost, match="json"):
        text.read(words, {"json": b"{"})
    assert text.read(words, {"json": b'{"other": 1}'}) == []


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (1, 1), (1000, 1), (3, 500), (97, 89), (640, 480)])
def test_the_grid_keeps_the_shape_and_the_limit(size):
    config = image.Config(patch=8, limit=50)
    (tokens,) = image.read(config, {"jpg": jpeg((200, 10, 10), size)})
    rows, columns = tokens.position[:, 1].max() + 1, tokens.position[:, 2].max() + 1
    assert len(tokens) == rows * columns <= config.limit
    if 1 / 8 <= size[0] / size[1] <= 8:
        assert len(tokens) >= 0.6 * config.limit
        assert 0.7 < (columns / rows) / (size[0] / size[1]) < 1.4


def test_patches_are_where_their_position_says():
    picture = torch.zeros(3, 32, 48, dtype=torch.uint8)
    picture[0, 8:16, 16:24] = 255  # row 1, column 2
    (tokens,) = image.read(image.Config(patch=8, limit=24), picture)
    bright = tokens.content.float().view(len(tokens), 3, -1)[:, 0].mean(1)
    assert tokens.position[bright.argmax()].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "mode, colour, expected",
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
def test_colour_modes(mode, colour, expected):
    data = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(data, "JPEG" if mode == "CMYK" else "PNG")
    picture = image.decode(image.Config(), data.getvalue())
    assert picture.mode == "RGB"
    if expected:
        assert np.abs(np.array(picture.getpixel((8, 8))) - expected).max() <= 3


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 40, 10))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    data = io.BytesIO()
    picture.save(data, "JPEG", exif=exif, quality=95)
    upright = image.decode(image.Config(), data.getvalue())
    assert upright.size == (20, 40) and upright.getpixel((15, 20))[0] > 200 and upright.getpixel((4, 20))[0] < 50


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
        assert image.decode(image.Config(), bytes(changed)).mode == "RGB"


def test_pictures_that_cannot_be_read():
    whole = jpeg((1, 2, 3), (300, 300))
    for data in (b"", b"<html><body>404</body></html>", whole[: len(whole) // 2], b"\xff\xd8\xff"):
        with pytest.raises(Lost):
            image.read(image.Config(), {"jpg": data})
    with pytest.raises(Lost, match="pixel-limit"):
        image.read(image.Config(pixels=10_000), {"jpg": whole})


def test_a_picture_varies_only_by_its_generator():
    config = image.Config(patch=8, limit=16, area=0.5, flip=0.5, rotate=10, colour=0.3)
    picture = torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8, generator=generator())
    first, again, other = (image.read(config, picture, generator(s))[0].content for s in (1, 1, 2))
    assert torch.equal(first, again) and (first.shape != other.shape or not torch.equal(first, other))
    assert torch.equal(image.read(config, picture)[0].content, image.read(config, picture)[0].content)


SOUND = audio.Config(frames=8, bands=32, high=32, limit=10)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_099, 192_000])
@pytest.mark.parametrize("kind", ["FLAC", "WAV", "OGG"])
def test_any_rate_becomes_the_same_sound(rate, kind):
    if kind == "OGG" and rate > 100_000:
        pytest.skip("libsndfile writes no such OGG")
    (tokens,) = audio.read(SOUND, {kind.lower(): tone(440, 0.6, rate, kind, channels=2)})
    (plain,) = audio.read(SOUND, (torch.sin(2 * torch.pi * 440 * torch.arange(9600) / 16_000) * 0.4, 16_000))
    assert tokens.content.shape == plain.content.shape
    loudest = tokens.content.view(len(tokens), 32, 8).mean((0, 2)).argmax()
    assert abs(int(loudest) - int(plain.content.view(len(tokens), 32, 8).mean((0, 2)).argmax())) <= 1


def test_long_sound_is_cropped_in_training_and_covered_in_inference():
    wave = torch.randn(16_000 * 3, generator=generator())
    windows = audio.read(SOUND, (wave, 16_000))
    covered = sum(len(w) for w in windows) * 8 * 160
    assert abs(covered - len(wave)) <= 8 * 160 and all(len(w) <= 10 for w in windows)
    crops = {float(audio.read(SOUND, (wave, 16_000), generator(i))[0].content.sum()) for i in range(5)}
    assert len(crops) == 5
    again = audio.read(SOUND, (wave, 16_000))
    assert all(torch.equal(a.content, b.content) for a, b in zip(windows, again))


def test_only_the_wanted_window_of_a_file_is_the_right_one():
    wave = torch.zeros(16_000 * 2)
    wave[16_000:] = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave.numpy(), 16_000, format="FLAC")
    from_file, given_wave = audio.read(SOUND, {"flac": data.getvalue()}), audio.read(SOUND, (wave, 16_000))
    for a, b in zip(from_file, given_wave, strict=True):
        torch.testing.assert_close(a.content, b.content, rtol=0, atol=0.05)


def test_patches_in_frequency_have_rows():
    config = audio.Config(frames=8, bands=32, high=8, limit=40)
    (tokens,) = audio.read(config, {"flac": tone(440)})
    assert set(tokens.position[:, 1].tolist()) == {0, 1, 2, 3}
    low, high = (audio.read(config, {"flac": tone(f)})[0] for f in (150, 6000))
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
        with pytest.raises(Lost, match=reason):
            audio.read(SOUND, {"wav": data})


def test_sounds_that_overflow_or_lie_are_lost():
    with pytest.raises(Lost, match="not-finite"):
        audio.read(SOUND, (torch.randn(16_000) * 1e30, 16_000))
    for rate in (1, 2**31):
        with pytest.raises(Lost, match="samples a second"):
            audio.read(SOUND, (torch.randn(16_000), rate))


def test_silence_and_a_click_are_finite():
    for wave in (torch.zeros(16_000), torch.ones(1), torch.full((100,), 1e6)):
        for tokens in audio.read(SOUND, (wave, 16_000)):
            assert torch.isfinite(tokens.content).all()
