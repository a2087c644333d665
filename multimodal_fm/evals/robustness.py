"""How much the other evaluators' figures fall when inputs are worse than those of the corpus, at strengths 1 to 5.

Images: common corruptions (Hendrycks and Dietterich 2019, arXiv:1903.12261), with the settings of CIFAR-10-C up to 64
pixels, and those of ImageNet-C, at 224 pixels, above. Sound: white noise, and speed (which shifts the pitch too: Ko et
al. 2015). Text: words with a letter swapped with the next, dropped or doubled. What is random is drawn from the seed
and the input alone, and is the same at each strength but stronger, so that two models meet the same inputs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..batch import MAX_TOKENS
from ..errors import SampleError, UserError
from . import base
from .embed_corpus import EmbeddedCorpus, Inputs, embed_sequences
from .metrics import estimate_difference, is_about

SMALL, LARGE = 64, 224  # pixels of the shorter side: up to the first as CIFAR-10-C, above as ImageNet-C at the second
SKIPPED = ("r@1", "r@5")  # of a direction of retrieval, r@10 is enough


@dataclass
class Config:
    corruptions: list[str] = field(default_factory=list)  # those of `CORRUPTIONS` to apply; empty: all
    strengths: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    seed: int = 0


class Evaluator(base.Evaluator):
    Config, default, after_others = Config, False, True

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives=None) -> dict[str, dict]:
        """`robustness/MODALITY/CORRUPTION/STRENGTH/FIGURE` for each score about the modality, and what they lose.

        `robustness/MODALITY/CORRUPTION/FIGURE/drop` is the clean score minus that of the corrupted inputs, averaged
        over the strengths, and `robustness/MODALITY/all/FIGURE/drop` the average of these: by a paired bootstrap over
        the same inputs. What is fitted is fitted on clean inputs where the evaluation has a `train`, and otherwise on
        corrupted ones too. Raises UserError for corruptions and strengths that there are not.
        """
        check(config)
        figures: dict[str, dict] = {}
        for modality in embedded.inputs:
            drops: dict[str, list[np.ndarray]] = {}
            for corruption, corrupt in CORRUPTIONS.get(modality, {}).items():
                if config.corruptions and corruption not in config.corruptions:
                    continue
                name, values = f"robustness/{modality}/{corruption}", {}
                for strength in config.strengths:
                    change = Change(corruption, corrupt, strength, config.seed)
                    found, scores = _measure(embedded, model, objectives, modality, change)
                    figures |= {f"{name}/{strength}/{key}": figure for key, figure in found.items()}
                    for key, own in scores.items():
                        values.setdefault(key, []).append(own)
                for key, own in values.items():
                    mean = np.mean(own, axis=0)
                    figures[f"{name}/{key}/drop"] = _drop(embedded, key, mean)
                    drops.setdefault(key, []).append(mean)
            for key, own in drops.items():
                figures[f"robustness/{modality}/all/{key}/drop"] = _drop(embedded, key, np.mean(own, axis=0))
        return figures


def check(config: Config) -> None:
    """Raises UserError for corruptions and strengths that there are not."""
    known = [name for own in CORRUPTIONS.values() for name in own]
    if unknown := [name for name in config.corruptions if name not in known]:
        raise UserError(f"corruptions: there is no {unknown[0]!r}; there are {', '.join(known)}")
    if not config.strengths or any(strength not in (1, 2, 3, 4, 5) for strength in config.strengths):
        raise UserError(f"strengths: {config.strengths} are not whole numbers from 1 to 5")


def _drop(embedded: EmbeddedCorpus, name: str, corrupted: np.ndarray) -> dict:
    clean = embedded.scores[name]
    return estimate_difference(corrupted, clean.values, clean.clusters) | {"chance": None}


def _measure(
    embedded: EmbeddedCorpus, model, objectives, modality: str, change: Change
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """The figures about the modality when its inputs are changed, and the scores of those that can be paired."""
    view = corrupt_corpus(embedded, model, modality, change)
    corpus: Any = view.corpus
    figures = embedded.remeasure(view, True)
    alone = _copy(view, {modality: view.inputs[modality]})  # the others' own figures have not changed
    figures |= embedded.remeasure(alone, False)
    view.scores |= alone.scores
    measured = {name for name in figures if name in view.scores or name.endswith("/bits_per_byte")}
    measured = {name for name in measured if name.rpartition("/")[2] not in SKIPPED}
    about = {name for name in measured if is_about(name, modality, objectives)}
    if corpus.kept:  # what points into these texts was measured on clean ones
        heads = {name for name in about if not is_about(name, modality)}
        about -= heads
        for name in heads:
            embedded.note(f"robustness: no {name} under {change.name}: a typo would move what its labels point at")
    paired = {}
    for name in about & view.scores.keys() & embedded.scores.keys():
        clean, own = embedded.scores[name], view.scores[name]
        if np.array_equal(clean.samples, own.samples):  # a head that reads the samples itself may lose one
            paired[name] = own.values
    return {name: figure for name, figure in figures.items() if name in about}, paired


# ------------------------------------------------------------------------------------------------- the changed corpus


@dataclass
class Change:
    """One corruption at one strength."""

    name: str
    corrupt: Callable[[Any, int, np.random.Generator], Any]
    strength: int
    seed: int

    def __call__(self, value, members: list[bytes]):
        """What has become of `value`; what is random depends on the seed and the members that it came from."""
        digest = hashlib.blake2b(f"{self.seed} {self.name}".encode(), digest_size=16)
        for member in members:
            digest.update(member)
        return self.corrupt(value, self.strength, np.random.default_rng(int.from_bytes(digest.digest())))


def corrupt_corpus(embedded: EmbeddedCorpus, model, modality: str, change: Change) -> EmbeddedCorpus:
    """The corpus with every input of one modality changed: the same samples, inputs and fields, other vectors.

    An input that cannot be read any more has vectors that are not numbers, so that it is found nowhere.
    """
    clean = embedded.inputs[modality]
    tokenizer = model.tokenizers[modality]
    vectors, features = torch.full_like(clean.vectors, torch.nan), torch.full_like(clean.features, torch.nan)
    texts = list(clean.texts)
    waiting: dict[int, list] = {}

    def embed() -> None:
        if waiting:
            own = list(waiting)
            vectors[own], features[own] = embed_sequences(model, modality, list(waiting.values()))
            waiting.clear()

    size = 0
    for number in range(len(clean.samples)):
        try:
            changed = corrupt_input(embedded.load(model, modality, number), modality, tokenizer, change)
            sequences = tokenizer.read(changed)
        except SampleError as error:
            embedded.note(f"{modality} {change.name} {change.strength}: {error}")
            continue
        texts[number] = changed if isinstance(changed, str) else texts[number]
        waiting[number] = sequences
        size += sum(map(len, sequences))
        if size >= MAX_TOKENS:
            embed()
            size = 0
    embed()
    view = _copy(embedded, embedded.inputs | {modality: Inputs(vectors, features, texts, clean.samples)})
    corpus: Any = CorruptedCorpus(embedded.corpus, modality, tokenizer, change)
    view.corpus = corpus
    return view


def _copy(embedded: EmbeddedCorpus, inputs: dict[str, Inputs]) -> EmbeddedCorpus:
    """The corpus with other inputs, without scores and notes."""
    own = [{m: numbers for m, numbers in sample.items() if m in inputs} for sample in embedded.sample_inputs]
    copy = EmbeddedCorpus(embedded.corpus, inputs, embedded.metadata, own)
    copy.train, copy.folder = embedded.train, embedded.folder
    return copy


class CorruptedCorpus:
    """A corpus whose samples are read with one modality changed; all else is the corpus's own."""

    def __init__(self, corpus, modality: str, tokenizer, change: Change):
        self._corpus, self._modality, self._tokenizer, self._change = corpus, modality, tokenizer, change
        self.kept = 0  # texts that stayed as they were

    def __len__(self) -> int:
        return len(self._corpus)

    def __getattr__(self, name: str):
        return getattr(self._corpus, name)

    def read(self, sample: int, extensions: tuple = ()) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
        """As of the corpus. A text whose JSON has `answer` or `words` stays: a typo would move what they point at."""
        raw, failed = self._corpus.read(sample, extensions)
        own = {name: data for name, data in raw.items() if name in self._tokenizer.extensions}
        try:
            if self._modality != "text":
                changed = corrupt_input(own, self._modality, self._tokenizer, self._change) if own else {}
            elif "txt" not in own:
                changed = own
            elif {"answer", "words"} & self._corpus.json(sample).keys():
                self.kept, changed = self.kept + 1, own
            else:
                text = own["txt"].decode("utf-8-sig", "replace")
                changed = own | {"txt": self._change(text, [text.encode()]).encode()}
        except SampleError as error:
            return {n: d for n, d in raw.items() if n not in own}, [*failed, (self._modality, error)]
        return {n: d for n, d in raw.items() if n not in own} | changed, failed

    def raw(self, sample: int, extensions: tuple = ()) -> dict[str, bytes]:
        return self.read(sample, extensions)[0]


def corrupt_input(value: Any, modality: str, tokenizer, change: Change) -> Any:
    """An input as its tokenizer reads it, changed: a text, or members of a sample. Raises SampleError."""
    if isinstance(value, str):
        return change(value, [value.encode("utf-8", "surrogatepass")])
    name, data = next((n, value[n]) for n in tokenizer.extensions if n in value)
    if modality == "image":
        return {"png": _encode_png(change(_shrink(tokenizer.decode_picture(data)), [data]))}
    import soundfile

    try:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError, ValueError, RuntimeError) as error:
        raise SampleError("decode", str(error)[:100]) from None
    wave, rate = change((wave, rate), [data])
    output = io.BytesIO()
    soundfile.write(output, wave, rate, format="WAV", subtype="FLOAT")
    return {"wav": output.getvalue()}


# --------------------------------------------------------------------------------------------------------- corruptions


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) whose shorter side is at most `LARGE`: the settings are for pictures of that size."""
    side = min(pixels.shape[:2])
    if side <= LARGE:
        return pixels
    size = [max(1, round(n * LARGE / side)) for n in (pixels.shape[1], pixels.shape[0])]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _encode_png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


def _choose(pixels: np.ndarray, small: list, large: list, strength: int) -> float:
    return (small if min(pixels.shape[:2]) <= SMALL else large)[strength - 1]


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).astype(np.uint8)  # rounded down, as in the paper's own files


def gaussian_noise(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    scale = _choose(pixels, [0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38], strength)
    return _to_uint8(pixels / 255 + scale * generator.standard_normal(pixels.shape))


def gaussian_blur(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    sigma = _choose(pixels, [0.4, 0.6, 0.7, 0.8, 1], [1, 2, 3, 4, 6], strength)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def contrast(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    share = _choose(pixels, [0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05], strength)
    mean = pixels.mean((0, 1)) / 255
    return _to_uint8((pixels / 255 - mean) * share + mean)


def brightness(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    """The value of HSV is raised; black, which has no color, becomes grey."""
    more = _choose(pixels, [0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5], strength)
    colors = pixels / 255
    value = colors.max(2, keepdims=True)
    colors = np.where(value > 0, colors / np.maximum(value, 1e-9), 1)
    return _to_uint8(colors * (value + more).clip(0, 1))


def jpeg_compression(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    quality = _choose(pixels, [80, 65, 58, 50, 40], [25, 18, 15, 10, 7], strength)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=int(quality))
    return np.asarray(Image.open(data))


def pixelate(pixels: np.ndarray, strength: int, generator: np.random.Generator) -> np.ndarray:
    share = _choose(pixels, [0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25], strength)
    picture = Image.fromarray(pixels)
    small = picture.resize([max(1, int(n * share)) for n in picture.size], Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BOX))


def white_noise(sound: tuple, strength: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Noise at 30, 20, 10, 5 and 0 dB of signal to noise; silence stays silent."""
    wave, rate = sound  # (T, C) float32
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    scale = np.sqrt(power / 10 ** ([30, 20, 10, 5, 0][strength - 1] / 10))
    return (wave + scale * generator.standard_normal(wave.shape)).astype(np.float32), rate


def speed(sound: tuple, strength: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Played faster or slower, each for half of the sounds, by 5, 10, 20, 35 and 50 %."""
    wave, rate = sound
    factor = [1.05, 1.1, 1.2, 1.35, 1.5][strength - 1]
    return wave, max(1, round(rate * factor if generator.random() < 0.5 else rate / factor))


def typos(text: str, strength: int, generator: np.random.Generator) -> str:
    """A tenth, a fifth, 30, 40 and 50 % of the words of two letters and more have one letter swapped with the next,
    dropped or doubled."""
    return "".join(_misspell(word, [0.1, 0.2, 0.3, 0.4, 0.5][strength - 1], generator) for word in _split_words(text))


def _split_words(text: str) -> Iterator[str]:
    """The runs of letters and the runs of all else, which join to the text."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or text[end].isalpha() != text[start].isalpha():
            yield text[start:end]
            start = end


def _misspell(word: str, rate: float, generator: np.random.Generator) -> str:
    if len(word) < 2 or not word[0].isalpha():
        return word
    draw, kind, where = generator.random(3)  # whether or not it is used, so that strengths share their typos
    if draw >= rate:
        return word
    at = int(where * (len(word) - 1))
    middle = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])[int(kind * 3)]
    return word[:at] + middle + word[at + 2 :]


CORRUPTIONS: dict[str, dict[str, Callable]] = {
    "image": {f.__name__: f for f in (gaussian_noise, gaussian_blur, contrast, brightness, jpeg_compression, pixelate)},
    "audio": {f.__name__: f for f in (white_noise, speed)},
    "text": {f.__name__: f for f in (typos,)},
}
