"""What a codec gives back of pictures or sounds that it codes, and how much of its codebook it uses.

Peak signal-to-noise ratio of a picture, signal-to-noise ratio of a sound's normalized log-mel, in decibels; the share
of the codebook that occurs, and the perplexity of its codes (van den Oord et al. 2017).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..batch import batch_by_tokens
from ..errors import SampleError
from ..heads.codes import Head
from ..model import Model
from ..run_dir.codec import Codec
from ..stream.quarantine import quarantine_row
from ..tokens import Tokens
from . import base
from .embed_corpus import EmbeddedCorpus, Scores, split_inputs
from .metrics import estimate, jackknife, record


@dataclass
class Config:
    modalities: list[str] = field(default_factory=list)  # empty: all whose raw content the model codes


@dataclass
class Sums:
    """Of one input, over its N tokens of V values, in float64."""

    sample: int  # that holds it
    tokens: int = 0
    error: float = 0.0  # squared differences between the values and what is given back
    energy: float = 0.0  # squared values
    values: Tensor | float = 0.0  # (V,)
    codes: list[int] = field(default_factory=list)


class Evaluator(base.Evaluator):
    Config = Config

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives) -> dict[str, dict]:
        """`reconstruction/MODALITY/{psnr or snr, rmse, codebook_use, perplexity}` of each head `codes`.

        Chance is what the mean token of the corpus in the place of every token gets.
        """
        figures = {}
        for head in (one for one in model.heads.values() if isinstance(one, Head)):
            if not config.modalities or head.modality in config.modalities:
                figures |= measure(embedded, model, head)
        return figures


def measure(embedded: EmbeddedCorpus, model: Model, head: Head) -> dict[str, dict]:
    """The figures of one head."""
    found = reconstruct(embedded, Codec(model, head))
    name, size = f"reconstruction/{head.modality}", head.config.codebook_size
    if not found:
        return {}
    tokens = np.array([one.tokens for one in found])
    width = len(torch.as_tensor(found[0].values)) * tokens
    values = np.stack([np.asarray(one.values) for one in found])
    mean = values.sum(0) / tokens.sum()
    error, energy = (np.array([getattr(one, key) for one in found]) / width for key in ("error", "energy"))
    baseline = energy + (tokens * (mean @ mean) - 2 * values @ mean) / width
    samples, clusters = np.array([one.sample for one in found]), np.arange(len(found))

    def decibels(mean_square: np.ndarray) -> np.ndarray:
        return head.reconstructor.decibels(torch.from_numpy(mean_square), torch.from_numpy(energy)).numpy()

    scores = Scores(decibels(error), samples, clusters, decibels(baseline))
    figures = record(embedded, f"{name}/{head.reconstructor.quality}", scores)
    if head.reconstructor.quality == "snr":
        figures[f"{name}/rmse"] = estimate(np.sqrt(error), clusters, float(np.sqrt(baseline).mean()))
    counts = [np.bincount(one.codes, minlength=size) for one in found] if size < 1 << 12 else None

    def total(chosen: np.ndarray) -> np.ndarray:
        if counts is not None:
            return np.sum([counts[number] for number in chosen], axis=0)
        return np.bincount(np.concatenate([found[number].codes for number in chosen]), minlength=size)

    figures[f"{name}/codebook_use"] = jackknife(lambda rows: float((total(rows) > 0).mean()), len(found))
    figures[f"{name}/perplexity"] = jackknife(lambda rows: perplexity(total(rows)), len(found))
    if tokens.sum() < 10 * size:
        most = 1 - (1 - 1 / size) ** int(tokens.sum())
        embedded.note(f"{name}/codebook_use: {tokens.sum()} codes drawn evenly would use {100 * most:.0f} % of {size}")
    return figures


def perplexity(counts: np.ndarray) -> float:
    """The exponential of the entropy of the shares that counts (K,) are."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def reconstruct(embedded: EmbeddedCorpus, codec: Codec) -> list[Sums]:
    """Each distinct input of the corpus, coded and given back; what cannot be read is named in `skipped`."""
    found: list[Sums] = []
    for pairs in batch_by_tokens(_sequences(embedded, codec, found)):
        tokens = [one for _, one in pairs]
        codes = codec.encode(tokens)
        content = codec.decode(codes, [one.position for one in tokens])
        start = 0
        for owner, one in pairs:
            rows = slice(start, start + len(one))
            target, given = (codec.head.reconstructor.target(c).double() for c in (one.content, content[rows]))
            sums = found[owner]
            sums.tokens += len(one)
            sums.error += float((given - target).square().sum())
            sums.energy += float(target.square().sum())
            sums.values = sums.values + target.sum(0)
            sums.codes += codes[rows].tolist()
            start += len(one)
    return found


def _sequences(embedded: EmbeddedCorpus, codec: Codec, found: list[Sums]) -> Iterator[tuple[int, Tokens]]:
    """The sequences of the corpus's distinct inputs, each with its input's place in `found`, where its sums begin."""
    seen = set()
    for sample in range(len(embedded.corpus)):
        raw, failed = embedded.corpus.read(sample, codec.tokenizer.extensions)
        try:
            for value in split_inputs(codec.tokenizer, raw):
                digest = hashlib.sha256(
                    b"".join(name.encode() + b"\0" + value[name] for name in sorted(value))
                ).digest()
                if digest not in seen and (sequences := codec.tokenizer.read(value)):
                    seen.add(digest)
                    found.append(Sums(sample))
                    yield from ((len(found) - 1, one) for one in sequences)
        except SampleError as error:
            failed.append((codec.modality, error))
        embedded.skipped += [quarantine_row(embedded.corpus, sample, part, error, None) for part, error in failed]
