"""What a denoiser makes of noisy texts that it has not seen: BART's originals, T5's spans, UL2's rests (greedy)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batch import MAX_TOKENS, Sample
from ..decoding.settings import Settings
from ..decoding.writer import Sequence, get_generation, write
from ..errors import SampleError
from ..generate import slices
from ..model import Model
from ..objectives.base import Prefix
from ..objectives.denoise import Bound, Objective
from ..tokens import Tokens, constant
from . import base, task_metrics
from .embed_corpus import EmbeddedCorpus, Scores
from .likelihood import score_texts
from .metrics import estimate, record

MAX_SAMPLES = 300  # that are restored: the first of the corpus


@dataclass
class Config:
    pass


class Evaluator(base.Evaluator):
    Config = Config
    default = False

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives: dict[str, Any]) -> dict[str, dict]:
        """`denoise/NOISE/{exact,chrf,bits_per_token}` for each noise of the first objective that denoises text.

        `exact` is the share of the targets that are written token by token as they are, and `chrf` how near the others
        are (Popović 2015; 0 to 100). Their chance is that of copying: the source as it was read, without its masks and
        sentinels. `bits_per_token` is that of the targets.
        """
        objective = next((o for o in objectives.values() if isinstance(o, Objective) and "text" in o.modalities), None)
        if objective is None:
            return {}
        numbers, texts = read_texts(model, embedded)
        figures = {}
        if len(embedded.corpus) > MAX_SAMPLES:
            embedded.note(f"denoise: of the first {MAX_SAMPLES} of {len(embedded.corpus)} samples")
        for name, noise in objective.config.noises.items() if numbers else ():
            bound = Bound(type(objective.config)(noises={name: noise}), objective.tokenizers)
            examples = [
                objective.arrange(bound, Sample({"text": tokens}), torch.Generator().manual_seed(seed))
                for seed, tokens in enumerate(texts)
            ]
            decode = model.tokenizers["text"].decode
            targets = [example.targets[-1].content.tolist() for example in examples]
            written = restore(model, objective, examples)
            copies = [copy_source(model, example) for example in examples]
            exact, copied = (
                np.array([own == target for own, target in zip(ids, targets, strict=True)], dtype=float)
                for ids in (written, copies)
            )
            scores = Scores(exact, np.array(numbers), np.arange(len(numbers)), copied)
            figures |= record(embedded, f"denoise/{name}/exact", scores)
            references = [[decode(target)] for target in targets]
            chrf, by_copying = (
                task_metrics.captions([decode(ids) for ids in own], references)["chrf"] for own in (written, copies)
            )
            figures[f"denoise/{name}/chrf"] = chrf | {"chance": by_copying["value"]}
            nats, counts = score_texts(model, objective, examples)
            bits = nats.numpy() / math.log(2)
            weights = counts.double().numpy()
            figures[f"denoise/{name}/bits_per_token"] = estimate(bits, np.arange(len(bits)), None, weights=weights)
        return figures


def read_texts(model: Model, embedded: EmbeddedCorpus) -> tuple[list[int], list[Tokens]]:
    """The first window of the text of each sample of the corpus, and the samples' numbers."""
    tokenizer, place = model.tokenizers["text"], model.modalities.index("text")
    numbers, texts = [], []
    for number in range(min(len(embedded.corpus), MAX_SAMPLES)):
        raw = embedded.corpus.raw(number)
        try:
            windows = tokenizer.read({e: raw[e] for e in tokenizer.extensions if e in raw})
        except SampleError:
            continue
        if windows:
            numbers.append(number)
            texts.append(windows[0].replace(modality=constant(place, len(windows[0]))))
    return numbers, texts


def restore(model: Model, objective: Objective, examples: list) -> list[list[int]]:
    """The ids that the model writes after the source of each example, the likeliest each time."""
    ids = []
    sizes = [sum(map(len, example.inputs)) for example in examples]
    for rows in slices(sizes, MAX_TOKENS):
        sequences = []
        for example in examples[rows]:
            *source, target = example.inputs
            time = float(target.position[0, 0])
            prefix = Prefix(source, int(target.order[0]), time, list(example.hidden[:-1]))
            start = [int(target.content[0])]
            sequences.append(Sequence(prefix, start, len(start)))
        for _ in write(model, objective, "text", sequences, Settings(temperature=0)):
            pass
        ids += [sequence.written for sequence in sequences]
    return ids


def copy_source(model: Model, example) -> list[int]:
    """The ids of the source without what is hidden, the first ids and the sentinels, and with an end."""
    tokenizer, generation = model.tokenizers["text"], get_generation(model, "text")
    kept: list[int] = []
    for piece, hidden in zip(example.inputs[:-1], example.hidden[:-1], strict=True):
        known = torch.ones(len(piece), dtype=torch.bool) if hidden is None else ~hidden.bool()
        kept += piece.content[known].tolist()
    marks = {*tokenizer.sentinels, *generation.first, generation.end}
    return [*(one for one in kept if one not in marks), *([] if generation.end is None else [generation.end])]
