"""Captions and transcripts: how well the right text is expected, and what the model writes by itself, word by word the
likeliest (greedy decoding)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS, Sample
from ..decoding.settings import Settings
from ..decoding.writer import get_generation
from ..errors import SampleError
from ..generate import Fit, Prompt, slices, write_prompts
from ..model import Model
from ..objectives.causal import Objective
from ..stream.quarantine import quarantine_row
from ..tokens import Tokens, constant
from . import base, task_metrics
from .embed_corpus import EmbeddedCorpus, split_inputs
from .likelihood import score_texts
from .metrics import estimate

MAX_SAMPLES = 200  # that are captioned: the first of the corpus
MAX_LENGTH = 40  # tokens of a caption


@dataclass
class Config:
    pass


class Evaluator(base.Evaluator):
    Config = Config
    default = False

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives) -> dict[str, dict]:
        """`captions/{bits_per_token,bleu,chrf}` of an objective that writes text after pictures or sounds."""
        objective = next((o for o in objectives.values() if writes_captions(o)), None)
        if objective is None:
            return {}
        read = [modality for modality in objective.modalities if modality != "text"]
        samples, references, prefixes = [], [], []
        for number in range(min(len(embedded.corpus), MAX_SAMPLES)):
            raw, _ = embedded.corpus.read(number)
            try:
                prefix = {modality: _read(model, modality, raw) for modality in read}
                texts = split_inputs(model.tokenizers["text"], raw)
            except SampleError as error:
                embedded.skipped.append(quarantine_row(embedded.corpus, number, "captions", error, None))
                continue
            if texts and all(prefix.values()):
                samples.append(number)
                references.append(texts)
                prefixes.append(prefix)
        if not samples:
            return {}
        if len(embedded.corpus) > MAX_SAMPLES:
            embedded.note(f"captions: of the first {MAX_SAMPLES} of {len(embedded.corpus)} samples")
        nats, counts = expect(model, objective, prefixes, [texts[0] for texts in references])
        clusters = np.arange(len(samples))
        figures = {"captions/bits_per_token": estimate(nats / math.log(2), clusters, None, weights=counts)}
        written = write(model, objective, prefixes)
        scores = task_metrics.captions(written, references, clusters)
        return figures | {f"captions/{name}": figure for name, figure in scores.items()}


def writes_captions(objective: Any) -> bool:
    return (
        isinstance(objective, Objective)
        and objective.config.fuse
        and objective.has_likelihood("text")
        and bool(objective.config.prefix)
        and objective.modalities[-1] == "text"
        and len(objective.modalities) > 1
    )


def _read(model: Model, modality: str, raw: dict) -> Tokens:
    tokenizer, number = model.tokenizers[modality], model.modalities.index(modality)
    sequences = tokenizer.read({e: raw[e] for e in tokenizer.extensions if e in raw})
    if not sequences:
        raise SampleError("empty", f"it has no {modality}")
    return sequences[0].replace(modality=constant(number, len(sequences[0])))


def _batches(prefixes: list[dict[str, Tokens]]):
    """Slices of samples that have about `MAX_TOKENS` tokens together."""
    return slices([sum(map(len, prefix.values())) + MAX_LENGTH for prefix in prefixes], MAX_TOKENS)


def expect(model: Model, objective: Objective, prefixes, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The nats (N,) of each text after its prefix, and its tokens (N,)."""
    tokenizer, number = model.tokenizers["text"], model.modalities.index("text")
    nats, counts = [], []
    for rows in _batches(prefixes):
        examples = []
        for prefix, text in zip(prefixes[rows], texts[rows], strict=True):
            tokens = tokenizer.read(text)[0]
            tokens = tokens.replace(modality=constant(number, len(tokens)))
            examples.append(objective.arrange(objective.config, Sample({**prefix, "text": tokens})))
        each, count = score_texts(model, objective, examples)
        nats.append(each)
        counts.append(count)
    return torch.cat(nats).numpy(), torch.cat(counts).double().numpy()


def write(model: Model, objective: Objective, prefixes: list[dict[str, Tokens]]) -> list[str]:
    """A text for each prefix: the likeliest token each time, until the end or `MAX_LENGTH` or what the model reads."""
    generation = get_generation(model, "text")
    settings = Settings(temperature=0, max_new_tokens=min(MAX_LENGTH, generation.length - len(generation.first)))
    prompts = [Prompt(prefix, list(generation.first)) for prefix in prefixes]
    written = write_prompts(model, Fit("captions", objective, parallel=False), "text", prompts, 1, settings)
    return [generated.value.strip() for (generated,) in written]
