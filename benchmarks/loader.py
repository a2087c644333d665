"""How fast are samples read? The training stream against OpenCLIP's loader and others on the same shards, and against
the decoder alone; sounds against a loop that decodes all; text against the tokenizer alone.

Everybody runs in a process of its own with equally many workers and draws in turns; figures are medians a second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loader_peers import BATCH, turns

HERE = Path(__file__).parent
NAMES = ("loader-256-w1", "loader-256-w2", "loader-640-w1", "loader-640-w2", "audio", "text")
PICTURES = {256: 768, 640: 256}  # how many of so many pixels a side
RATE, SECONDS, WANTED = 44_100, 30, 10  # of the sounds
CLIPS, TEXTS = 24, 2048
UNITS = {"audio": "clips/s", "text": "tokens/s"}
CALLS = ("tokenizer", "tiktoken")  # Hugging Face's batched call, and that of the library that applies our merges
TOKENIZERS = {
    "text": {"vocab_size": 4096, "max_tokens": 1024},
    "image": {"patch": 16, "max_tokens": 196, "min_crop_scale": 0.9},  # OpenCLIP's crop, to as many pixels
    "audio": {"patch_frames": 10, "max_tokens": WANTED * 10},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns, within ten minutes")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter that has the peers (README.md)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--save", action="store_true", help="write results/loader.json and loader.md")
    given = parser.parse_args()
    rounds, seconds = (3, 2.0) if given.quick else (7, 5.0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            contest = {"audio": sounds, "text": texts}.get(name, pictures)
            rows.append(row(name, *contest(Path(folder), name, given.peers), rounds, seconds))
            if given.json:
                print(json.dumps(rows[-1]), flush=True)
    from common import RESULTS, about, markdown, write_results

    table = [["", "ours", "theirs", "peer", "ratio", "others"]]
    table += [[*(shown(one[key]) for key in ("name", "ours", "theirs", "peer", "ratio", "others"))] for one in rows]
    if not given.json:
        print(markdown(table))
    if given.save:
        write_results(RESULTS, "loader", "Reading samples", about(), rows, markdown(table))
    return int(any(one["ratio"] is None for one in rows))


def row(name: str, peer: str, commands: dict[str, list[str]], rounds: int, seconds: float) -> dict:
    """One contest. commands: by contestant; `ours` and `peer` are the two whose ratio counts."""
    rates = contest(commands, rounds, seconds)
    ours, theirs = rates.pop("ours"), rates.pop(peer)
    found = [one if isinstance(one, float) else None for one in (ours, theirs)]
    for who, one in (("ours", ours), (peer, theirs)):
        if not isinstance(one, float):
            rates[who] = one
    ratio = found[0] / found[1] if None not in found else None
    counted = {"unit": UNITS.get(name, "samples/s"), "runs": rounds}
    sides = {"peer": peer, "ours": found[0], "theirs": found[1], "ratio": ratio}
    return {"name": name, **sides, **counted, "others": rates}


def contest(commands: dict[str, list[str]], rounds: int, seconds: float) -> dict[str, float | str]:
    """Samples (or tokens) a second of each, in turns; a line of text for who cannot take part."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        players = {who: Player(command, Path(folder) / f"{i}") for i, (who, command) in enumerate(commands.items())}
        for player in players.values():
            stack.callback(player.close)
        for _ in range(rounds):
            for player in players.values():
                player.play(seconds)
        return {who: player.rate() for who, player in players.items()}


class Player:
    """A process that draws when it is told to (`turns`). Between its turns it stands still, its workers too: they would
    fill their queues in the next one's time."""

    def __init__(self, command: list[str], log: Path):
        self.log, self.rates, self.alive = log, [], True
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w"), "text": True}
        try:
            self.process = subprocess.Popen(command, env={**quiet, "PYTHONPATH": path}, start_new_session=True, **pipes)
        except OSError as error:
            log.write_text(str(error))
            self.process, self.alive = None, False
            return
        self._answer()  # one starts after the other, so that each warms up alone

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        self.alive = bool(line)
        self._signal(signal.SIGSTOP)
        return line

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def play(self, seconds: float) -> None:
        if self.alive:
            self._signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                print(seconds, file=self.process.stdin, flush=True)
            if line := self._answer():
                count, took = line.split()
                self.rates.append(int(count) / float(took))

    def rate(self) -> float | str:
        if self.alive and self.rates:
            return statistics.median(self.rates)
        said = self.log.read_text().strip().splitlines()
        return f"left out: {said[-1][:200] if said else 'it ended without a word'}"

    def close(self) -> None:
        if self.process is None:
            return
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._signal(signal.SIGKILL)  # its workers, which would look for it for some seconds


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{who} {shown(one)}" for who, one in value.items())
    return str(value) if not isinstance(value, float) else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def own(who: str, folder: Path, workers: int) -> list[str]:
    return [sys.executable, str(HERE / "loader.py"), "--play", who, str(folder), str(workers)]


def pictures(work: Path, name: str, python: str) -> tuple[str, dict]:
    side, workers = (int(word.strip("w")) for word in name.split("-")[1:])
    folder = work / str(side)
    made(folder, lambda: ({"jpg": photo, "txt": caption} for photo, caption in photos(side, PICTURES[side])))
    peers = {who: [python, str(HERE / "loader_peers.py"), who] for who in ("openclip", "energon", "webdataset")}
    commands = {who: [*command, str(folder), str(workers)] for who, command in peers.items()}
    mine = {"ours": "text,image", "ours, pictures alone": "image"}
    mine |= {"decoder": "decoder", "libjpeg": "libjpeg"}
    return "openclip", {who: own(how, folder, workers) for who, how in mine.items()} | commands


def sounds(work: Path, name: str, python: str) -> tuple[str, dict]:
    both = [(modality, clip) for clip in clips() for modality in ("ogg", "flac")]
    for folder, modalities in (("sounds", ("ogg", "flac")), ("ogg", ("ogg",)), ("flac", ("flac",))):
        made(
            work / folder,
            lambda modalities=modalities: (
                {modality: encoded(modality, c)} for modality, c in both if modality in modalities
            ),
        )
    commands = {"ours": own("audio", work / "sounds", 1), "loop": own("loop", work / "sounds", 1)}
    commands["loop that crops before it resamples"] = own("loop-crop", work / "sounds", 1)
    for modality in ("ogg", "flac"):
        commands |= {
            f"ours, {modality}": own("audio", work / modality, 1),
            f"loop, {modality}": own("loop", work / modality, 1),
        }
    return "loop", commands


def texts(work: Path, name: str, python: str) -> tuple[str, dict]:
    folder = work / "texts"
    made(folder, lambda: ({"txt": text} for text in prose(TEXTS)))
    return "tokenizer", {who: own(how, folder, 2) for who, how in (("ours", "text"), *((w, w) for w in CALLS))}


# The corpora, made on the spot.


def made(folder: Path, samples) -> None:
    """Four shards of the samples in a folder, unless they are there."""
    from multimodal_fm.corpus import shards

    if folder.exists():
        return
    folder.mkdir()
    everything = [{"__key__": f"{i:06d}", **sample} for i, sample in enumerate(samples())]
    for part in range(4):
        shards.write(folder / f"{part}.tar", everything[part::4])


WORDS = (
    "a the of on in with near under and two red small old green large white blue wooden dark bright young quiet man "
    "woman child dog cat horse bird house street river mountain table window boat train field tree garden market light"
)


def photos(side: int, count: int):
    """JPEGs (quality 90) with edges, grain and the falling spectrum of photographs, and captions."""
    from PIL import Image, ImageDraw

    random, words = np.random.default_rng(side), WORDS.split()
    high, wide = np.fft.fftfreq(2 * side)[:, None], np.fft.rfftfreq(2 * side)[None]
    fall = np.maximum(np.hypot(high, wide), 1 / side) ** 1.2
    scenes = []
    for _ in range(6):
        fields = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((2 * side,) * 2)) / fall) for _ in range(3)]
        light, warm, cold = (field / field.std() for field in fields)
        levels = np.stack([light * 45 + warm * 18, light * 45 - warm * 6 - cold * 6, light * 45 + cold * 18], 2)
        scene = Image.fromarray((levels + 128).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(scene)
        for _ in range(30):
            (x, y), (w, h) = random.integers(2 * side, size=2), random.integers(side // 20, side // 4, size=2)
            color = tuple(random.integers(256, size=3).tolist())
            (draw.ellipse if random.random() < 0.5 else draw.rectangle)([x, y, x + w, y + h], fill=color)
        scenes.append(np.asarray(scene))
    for i in range(count):
        y, x = random.integers(side, size=2)
        grain = random.standard_normal((side, side, 1), dtype=np.float32) * 6
        pixels = (scenes[i % len(scenes)][y : y + side, x : x + side] + grain).clip(0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=90)
        yield data.getvalue(), " ".join(random.choice(words, 12))


def clips():
    """Sounds (T,) of `SECONDS`: tones that swell over colored noise."""
    random = np.random.default_rng(0)
    time = np.arange(SECONDS * RATE) / RATE
    for _ in range(CLIPS // 2):
        wave = np.zeros(len(time))
        for _ in range(8):
            pitch, pace, start = random.uniform(80, 3000), random.uniform(0.1, 3), random.uniform(0, 6)
            wave += np.sin(2 * np.pi * pitch * time + start) * (1 + np.sin(2 * np.pi * pace * time)) * random.random()
        spectrum = (
            np.fft.rfft(random.standard_normal(len(time))) / np.maximum(np.arange(len(time) // 2 + 1), 200) ** 0.5
        )
        noise = np.fft.irfft(spectrum, len(time))
        yield 0.1 * (wave / wave.std() + 0.5 * noise / noise.std())


def encoded(modality: str, wave: np.ndarray) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave, RATE, format=modality.upper())
    return data.getvalue()


def prose(count: int):
    """Texts of about 2,000 letters, of 20,000 made-up words as often as in a language (Zipf)."""
    random = np.random.default_rng(0)
    letters, often = list("etaoinshrdlucmfwypvbgk"), np.arange(22, 0, -1) / sum(range(23))
    words = ["".join(random.choice(letters, random.integers(2, 10), p=often)) for _ in range(20_000)]
    share = 1 / np.arange(1, len(words) + 1)
    for _ in range(count):
        yield " ".join(random.choice(words, 340, p=share / share.sum()))


# Who draws: `loader.py --play WHO FOLDER WORKERS`.


def play(who: str, folder: str, workers: int) -> None:
    import torch

    torch.set_num_threads(1)
    if who == "tokenizer":  # the library's own threads, as many as our workers
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(workers)}
    if who in ("text,image", "image", "audio", "text"):
        drawn = {"text": words}.get(who, lambda step: len(step.samples))
        turns(ours(folder, who.split(","), workers), 2 * workers, drawn)
    elif who in ("decoder", "libjpeg"):
        raws = [raw["jpg"] for raw in everything(folder)]
        turns(in_threads(decoder if who == "decoder" else libjpeg, raws, workers), 0)
    elif who.startswith("loop"):
        turns(loop(everything(folder), who == "loop-crop"), 0, len)
    else:
        turns(tokenizer_alone(folder, who, workers), 0, int)


def ours(folder: str, parts: list[str], workers: int):
    """StepDataset of the training stream."""
    from multimodal_fm.stream.loader import Loader

    return iter(Loader(steps(folder, parts), 0, 10**9, workers))


def steps(folder: str, parts: list[str]):
    from multimodal_fm.corpus.shards import Corpus
    from multimodal_fm.objectives import contrastive
    from multimodal_fm.stream.dataset import StepDataset
    from multimodal_fm.stream.tasks import build_tasks, fit_tokenizers
    from multimodal_fm.train.config import build

    take = 8 if parts == ["audio"] else BATCH
    task = {"objectives": {"masked": {}}, "modalities": parts, "batch_size": take, "sources": {"all": 1}}
    config = build(
        {
            "sources": {"all": {"shards": f"{folder}/*.tar"}},
            "tasks": {"pairs": task},
            "model": {"tokenizers": TOKENIZERS, "backbone": {"width": 64, "depth": 1, "num_heads": 2}},
            "run_dir": folder,
        },
        "benchmarks/loader.py",
    )
    corpora = {name: Corpus(source, name) for name, source in config.sources.items()}
    tokenizers = fit_tokenizers(config.tasks, corpora, config.model.tokenizers, config.seed, Path(folder))
    whole = functools.partial(contrastive.Objective.arrange, contrastive.Config())  # a sample as it is: no masks
    tasks = [dataclasses.replace(t, arrange=whole, grouped=True) for t in build_tasks(config.tasks, corpora)]
    return StepDataset(tasks, tokenizers, config.seed)


def words(step) -> int:
    """Ids of text, the two marks around each left out."""
    return sum(len(batch.content["text"]) - 2 * batch.num_sequences for batch in step.batches)


def everything(folder: str) -> list[dict]:
    from multimodal_fm.corpus import shards

    corpus = shards.Corpus(shards.Config(f"{folder}/*.tar"))
    return [corpus.raw(i) for i in range(len(corpus))]


def in_threads(call, raws: list[bytes], workers: int):
    """Batches of calls, dealt to threads that always have work."""
    import torch

    local = threading.local()

    def batch(number: int) -> None:
        if not hasattr(local, "generator"):
            local.generator = random.Random(number)
        for i in range(number * BATCH, (number + 1) * BATCH):
            call(raws[i % len(raws)], local.generator)

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        number, waiting = 0, []
        while True:
            while len(waiting) < 2 * workers:
                waiting.append(pool.submit(batch, number))
                number += 1
            yield waiting.pop(0).result()


def decoder(raw: bytes, generator) -> None:
    """From a JPEG to the pixels of a random part at the size that is wanted, as the tokenizer does it."""
    from multimodal_fm.tokenizers import image

    image.Tokenizer(image.Config(**TOKENIZERS["image"])).view(raw, generator)


def libjpeg(raw: bytes, generator) -> None:
    """The library's call in it, at the same scale: no crop, no resize."""
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(raw)
    part = 2 if min(height, width) >= 480 else 1
    simplejpeg.decode_jpeg(raw, fastdct=True, fastupsample=True, min_height=height // part, min_width=width // part)


def loop(raws: list[dict], crop_first: bool):
    """What one writes first with soundfile and torchaudio: decode all, mono, resample, cut 10 s out, log-mel."""
    import soundfile
    import torch
    import torchaudio

    resample = torchaudio.transforms.Resample(RATE, 16_000)
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=512, win_length=400, hop_length=160, n_mels=64, f_min=20.0)
    random = np.random.default_rng(0)

    def cut(wave, rate: int):
        start = random.integers(len(wave) - WANTED * rate + 1)
        return wave[start : start + WANTED * rate]

    while True:
        for raw in raws:
            samples, rate = soundfile.read(io.BytesIO(next(iter(raw.values()))), dtype="float32", always_2d=True)
            wave = torch.from_numpy(samples).mean(1)
            wave = resample(cut(wave, rate)) if crop_first else cut(resample(wave), 16_000)
            yield [mel(wave).clamp(min=1e-8).log10()]


def tokenizer_alone(folder: str, who: str, workers: int):
    """How many ids each call of the tokenizer gave for a batch of the same texts."""
    from tokenizers import Tokenizer

    from multimodal_fm.tokenizers import text

    settings = steps(folder, ["text"]).tokenizers["text"].config
    merges, given = Tokenizer.from_file(settings.file), [raw["txt"].decode() for raw in everything(folder)]
    counts = [len(found.ids) for found in merges.encode_batch_fast(given, add_special_tokens=False)]
    assert max(counts) < settings.max_tokens - 2, "ours would crop"
    if who == "tiktoken":
        call, how = text.load_merges(settings.file).encode_ordinary_batch, {"num_threads": workers}
    else:
        call, how = merges.encode_batch_fast, {"add_special_tokens": False}
    while True:
        for start in range(0, len(given), BATCH):
            call(given[start : start + BATCH], **how)
            yield sum(counts[start : start + BATCH])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        os._exit(0)  # threads may be ahead still
    sys.exit(main())
