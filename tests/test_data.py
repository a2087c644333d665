"""The data recipes: made-up stamps through data.tuxpaint, and data.scenes, both as commands."""

import io
import json
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from scipy import ndimage

from data import writing
from data.scenes import __main__ as scenes
from data.scenes import picture, sound
from data.scenes.captions import canonical, describe
from data.scenes.scene import COLOURS, HELD_OUT, Kind, Scene, draw_scene, generator
from data.tuxpaint import __main__ as tuxpaint
from data.tuxpaint import source
from data.tuxpaint.stamps import Sound, Stamp, file_digest, read_stamps, validation_stamps, without_leaks

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="2cm" height="1cm"><rect width="40" height="20"/></svg>'


LEAK = "stamp of training with a picture or caption of validation"


def read_samples(folder, split):
    """{key: {extension: bytes}} of a split's shards, JSON parsed."""
    samples = defaultdict(dict)
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uname, member.uid) == (0, "data", 0)
                key, extension = member.name.split(".")
                content = tar.extractfile(member).read()
                samples[key][extension] = json.loads(content) if extension == "json" else content
    return samples


def contents(folder):
    """{name: bytes} of a build."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_tone(path, pitch, seconds=0.3, rate=22050):
    time_axis = np.arange(int(seconds * rate)) / rate
    kind = {"format": "OGG", "subtype": "VORBIS"} if path.suffix == ".ogg" else {}
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time_axis), rate, **kind)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """A small tree of stamps with the oddities of the real one."""
    root = tmp_path_factory.mktemp("package") / "usr/share/tuxpaint/stamps"
    (root / "animals/birds").mkdir(parents=True)
    (root / "food").mkdir()
    for number in range(30):
        name = root / f"animals/birds/bird_{number}"
        color = (8 * number, 255 - 8 * number, 90, 128)
        Image.new("RGBA", (20 + number, 40), color).save(name.with_suffix(".png"))
        lines = [f"A bird of kind {number}.", f"fr.utf8=Un oiseau {number}.", f"da.utf8=En fugl {number}."]
        name.with_suffix(".txt").write_text("\n".join(lines) + "\nes.utf8=\nnonsense\n", encoding="utf-8")
        write_tone(root / f"animals/birds/bird_{number}_desc_fr.ogg", 300 + number)
    food = root / "food"
    (food / "pear.svg").write_text(SVG)
    (food / "pear.txt").write_bytes(b"\xef\xbb\xbfA pear.\nde.utf8=Eine Bi\xc2\x93rne.\nis.utf8=\xff\xfe\n")
    write_tone(food / "pear.ogg", 500, seconds=11)
    write_tone(food / "pear_desc.wav", 500)
    write_tone(food / "pear_de.ogg", 510)
    write_tone(food / "pear_desc_lt.ogg", 500)  # no text in Lithuanian
    write_tone(food / "nothing_desc_fr.ogg", 500)  # no such stamp
    soundfile.write(food / "pear_desc_de.ogg", np.zeros(8000), 8000)  # silent
    same = Image.new("L", (300, 100), 77)
    for name, text in {"plum": "A plum.", "prune": "A prune.", "prune_again": "  a PRUNE. "}.items():
        same.save(food / f"{name}.png")
        (food / f"{name}.txt").write_text(text)
    same.save(food / "plum_mirror.png")
    same.save(food / "no_text.png")
    (food / "broken.png").write_bytes(b"not a picture")
    (food / "broken.txt").write_text("A broken file.")
    (food / "gift.txt").write_text("A gift without a picture.")
    return root


@pytest.fixture(scope="module")
def build(stamps, tmp_path_factory):
    """Builds stamps with a seed into a folder, through the command."""
    cache = tmp_path_factory.mktemp("cache")

    def build(seed, to):
        package = stamps.parents[3]
        arguments = ["--seed", seed, "--from", package, "--cache", cache, "--to", to, "--workers", 1]
        assert writing.run("data.tuxpaint", tuxpaint.main, list(map(str, arguments))) == 0
        return to / str(seed)

    return build


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    return build(0, tmp_path_factory.mktemp("shards"))


def test_tuxpaint_samples(built):
    samples = read_samples(built, "train") | read_samples(built, "validation")
    found = {
        (sample["json"]["stamp"], sample["json"]["role"], sample["json"]["language"]): sample
        for sample in samples.values()
    }
    gone = json.loads((built / "card.json").read_bytes())["left_out"].get(LEAK, 0)
    assert len(found) == len(samples) == 30 * 2 + 3 + 4 - gone
    picture_sample = found["animals/birds/bird_3", "picture", "en"]
    assert set(picture_sample) == {"jpg", "txt", "json"}
    assert picture_sample["json"] == {
        "role": "picture",
        "stamp": "animals/birds/bird_3",
        "language": "en",
        "caption": "A bird of kind 3.",
        "folder": "animals",
        "captions": {"en": "A bird of kind 3.", "fr": "Un oiseau 3.", "da": "En fugl 3."},
        "license": "GPL-2",
        "source": tuxpaint.SOURCE,
    }
    spoken = found["animals/birds/bird_3", "spoken", "fr"]
    assert set(spoken) == {"jpg", "txt", "json", "flac"}
    assert spoken["txt"].decode() == "Un oiseau 3."
    assert spoken["jpg"] == picture_sample["jpg"]
    assert found["food/pear", "effect", "de"]["txt"].decode() == "Eine Birne."
    effect = found["food/pear", "effect", "en"]
    info = soundfile.info(io.BytesIO(effect["flac"]))
    assert (info.samplerate, info.channels, info.subtype, info.duration) == (16000, 1, "PCM_16", 10)
    with Image.open(io.BytesIO(effect["jpg"])) as image:
        assert image.size == (160, 80)


def test_tuxpaint_says_what_it_leaves_out(built):
    card = json.loads((built / "card.json").read_bytes())
    card["left_out"].pop(LEAK, None)
    assert card["left_out"] == {
        "mirrored twin of a picture": 1,
        "picture without a text": 1,
        "silent or empty sound": 1,
        "sound without a stamp": 1,
        "sound without a text in its language": 1,
        "text line that is empty or garbled": 60,
        "text line that is not UTF-8": 1,
        "text without a picture": 1,
        "unreadable picture": 1,
    }


def test_tuxpaint_split_has_nothing_in_common(stamps, built):
    sides = []
    for split in writing.SPLITS:
        samples = read_samples(built, split).values()
        texts = {sample["json"]["caption"].casefold().strip() for sample in samples} | {
            sample["txt"] for sample in samples
        }
        sides.append(texts | {sample[kind] for sample in samples for kind in ("jpg", "flac") if kind in sample})
    assert not sides[0] & sides[1]
    assert 3 <= json.loads((built / "card.json").read_bytes())["splits"]["validation"]["captions"] <= 5
    found, _ = read_stamps(stamps)
    digests = {path: file_digest(path) for path in stamps.rglob("*") if path.is_file()}
    for seed in range(30):
        held_out = validation_stamps(found, seed)
        assert len(held_out & {"food/prune", "food/prune_again"}) in (0, 2), "equal captions stay together"
        left_out = Counter()
        kept = {stamp.name: stamp for stamp in without_leaks(found, held_out, digests, left_out)}
        if "food/plum" in held_out:  # the same picture under another caption
            assert "food/prune" not in kept or "food/prune" in held_out
        assert held_out <= kept.keys() and sum(left_out.values()) <= 2


def test_tuxpaint_trains_on_no_text_of_validation():
    def stamp(name, caption, **texts):
        sounds = [Sound(Path(f"{name}-{language}"), "spoken", language) for language in texts]
        return Stamp(name, Path(name), {"en": caption, **texts}, sounds)

    stamps = [
        stamp("a", "A bear.", fr="Un ours.", de="Ein Bär."),
        stamp("b", "A brown bear.", fr="un OURS. ", de="Braunbär."),
    ]
    digests = {path: str(path) for one in stamps for path in (one.picture, *(s.path for s in one.sounds))}
    left_out = Counter()
    kept = without_leaks(stamps, {"a"}, digests, left_out)
    assert [sorted(one.texts) for one in kept] == [["de", "en", "fr"], ["de", "en"]]
    assert [len(one.sounds) for one in kept] == [2, 1] and sum(left_out.values()) == 2
    digests[Path("b-de")] = digests[Path("a-de")]  # the same recording
    assert [len(one.sounds) for one in without_leaks(stamps, {"a"}, digests, left_out)] == [2, 0]


def test_tuxpaint_bytes_follow_the_seed(build, built, tmp_path, capsys):
    assert contents(build(0, tmp_path)) == contents(built)
    other = build(1, tmp_path)
    stamps_of = [
        {sample["json"]["stamp"] for sample in read_samples(path, "validation").values()} for path in (built, other)
    ]
    assert stamps_of[0] != stamps_of[1]
    before = (other / "card.json").stat().st_mtime_ns
    capsys.readouterr()
    build(1, tmp_path)
    assert "already there" in capsys.readouterr().out
    (other / "validation-000000.tar").write_bytes(b"cut short")
    build(1, tmp_path)
    assert (other / "card.json").stat().st_mtime_ns > before


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_card", fail)
    with pytest.raises(AssertionError, match="130"):
        build_scenes(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--from", "missing"], 2), (["--from", "empty"], 2), (["--seed", "-1"], 2), (["--what"], 2), ([], 3)],
)
def test_tuxpaint_failures_are_one_line(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # so there is no apt-get
    (tmp_path / "empty").mkdir()
    arguments = [*arguments, "--cache", "cache", "--to", "shards"]
    assert writing.run("data.tuxpaint", tuxpaint.main, arguments) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "shards").exists()


def test_download_that_fails_or_stands_still(tmp_path, monkeypatch):
    tool = tmp_path / "apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(source, "PATIENCE_SECONDS", 0.5)
    for script, reason in {
        "echo half > tuxpaint-stamps-default_1.deb; echo 'E: no network'; exit 100": "no network",
        "exec sleep 60": "no progress",
    }.items():
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        start = time.monotonic()
        with pytest.raises(writing.RecipeError, match=reason) as failure:
            source.find_stamps(None, tmp_path / "cache")
        assert failure.value.code == 3
        assert time.monotonic() - start < 5
        assert source.cached_package(tmp_path / "cache") is None


@pytest.fixture(scope="module")
def scene_shards(tmp_path_factory):
    return build_scenes(tmp_path_factory.mktemp("scenes"), 0)


def build_scenes(to, seed):
    arguments = f"--seed {seed} --train 40 --validation 15 --workers 1 --to {to}".split()
    assert writing.run("data.scenes", scenes.main, arguments) == 0
    return to / str(seed)


def test_scenes_bytes_follow_the_seed(scene_shards, tmp_path):
    assert contents(build_scenes(tmp_path, 0)) == contents(scene_shards)
    assert not set(read_texts(build_scenes(tmp_path, 1))) & set(read_texts(scene_shards))


def read_texts(folder):
    return [sample["json"]["caption"] for sample in read_samples(folder, "train").values()]


def test_scenes_samples(scene_shards):
    for split, count in (("train", 40), ("validation", 15)):
        by_stamp = defaultdict(dict)
        for sample in read_samples(scene_shards, split).values():
            by_stamp[sample["json"]["stamp"]][sample["json"]["role"]] = sample
        assert len(by_stamp) == count
        for sample in by_stamp.values():
            shown, spoken = sample["picture"], sample["spoken"]
            assert shown["jpg"] == spoken["jpg"]
            captions = shown["json"]["captions"]
            assert set(captions) == {"en", "fr", "es"}
            assert captions[spoken["json"]["language"]] == spoken["txt"].decode()
            assert shown["txt"].decode() == captions["en"]
            assert soundfile.info(io.BytesIO(spoken["flac"])).samplerate == 16000


def test_scenes_hold_combinations_out():
    def pairs(split, index):
        kinds = draw_scene(3, split, index).kinds
        assert len({kind.shape for kind in kinds}) == len({kind.place for kind in kinds}) == len(kinds)
        return {(kind.colour, kind.shape) for kind in kinds}

    assert not any(pairs("train", index) & set(HELD_OUT) for index in range(500))
    assert all(pairs("validation", index) & set(HELD_OUT) for index in range(100))
    assert set.union(*(pairs("validation", index) for index in range(500))) >= set(HELD_OUT)


@pytest.mark.parametrize("index", range(12))
def test_scene_parts_agree(index):
    """The shapes in the picture, the words of the caption and the notes are those of the scene."""
    scene = draw_scene(0, "train", index)
    shapes = sum(kind.count for kind in scene.kinds)

    image = np.asarray(picture.draw_picture(scene, generator(0, "train", index, "picture"))).astype(float)
    spots, found = ndimage.label(np.abs(image - image[0, 0]).max(axis=2) > 30)
    assert found == shapes
    colours = [np.median(image[spots == spot + 1], axis=0) for spot in range(found)]
    names = [min(COLOURS, key=lambda name: np.abs(colour - picture.COLOURS[name]).sum()) for colour in colours]
    assert sorted(names) == sorted(kind.colour for kind in scene.kinds for _ in range(kind.count))

    words = canonical(scene)
    assert all(kind.colour in words and kind.shape in words and kind.size in words for kind in scene.kinds)
    assert set(describe(scene, generator(0, "train", index, "words"))) == {"en", "fr", "es"}

    samples = sound.play(scene, generator(0, "train", index, "sound"))
    loudness = ndimage.maximum_filter1d(np.abs(samples), 400)
    assert ndimage.label(ndimage.median_filter(loudness, 201) > 0.06)[1] == shapes


def test_scene_sound_follows_the_scene():
    def play(**changes):
        kind = {"shape": "circle", "colour": "red", "count": 2, "size": "large", "place": "middle"} | changes
        return sound.play(Scene((Kind(**kind),), "white", "en"), np.random.default_rng(0))

    peaks = [np.abs(np.fft.rfft(play(colour=colour), 32000)).argmax() for colour in COLOURS]
    assert peaks == sorted(set(peaks))
    assert np.abs(play(size="small")).max() < 0.5 * np.abs(play()).max()
    assert len(play(count=3)) > len(play()) > len(play(size="small"))
    plain = play()
    for changes in ({"shape": "star"}, {"place": "left"}, {"place": "top"}, {"colour": "blue"}):
        assert np.abs(play(**changes) - plain).max() > 0.1
