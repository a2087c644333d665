"""Zero-shot classification: each picture or sound against its classes as text, in sentences that are averaged.

The vector of a class is the mean of the unit vectors of its sentences, of unit length again (Radford et al. 2021,
arXiv:2103.00020, section 3.1.4). A tie counts against the input.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import UserError
from . import base
from .embed_corpus import EmbeddedCorpus, Scores
from .metrics import bootstrap, labeled_rows, number_groups, rank_first, record

TEMPLATES = {
    "image": ["{}", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}."],
    "audio": ["{}", "the sound of a {}.", "a recording of a {}.", "I can hear a {}."],
}


@dataclass
class Config:
    labels: str = ".cls"  # `.cls` or a JSON field
    group: str = ""  # the bootstrap draws inputs of an equal group together
    class_names: list[str] = field(default_factory=list)
    templates: dict[str, list[str]] = field(default_factory=dict)


class Evaluator(base.Evaluator):
    Config = Config
    default = False
    needs_vectors = True

    def run(self, embedded: EmbeddedCorpus, config: Config, model, objectives=None) -> dict[str, dict]:
        """`zero_shot/MODALITY/{accuracy,macro_recall}` for each modality with labels but text.

        Chance is the share of the commonest class, and one over the number of classes. Raises UserError for a template
        without {}, and for `class_names` that are too few.
        """
        figures = {}
        for modality in embedded.inputs:
            rows = labeled_rows(embedded, modality, config.labels) if modality != "text" else []
            if not rows or "text" not in model.modalities:
                continue
            values = [label for _, label, _ in rows]
            names = name_classes(embedded, [(label, sample) for _, label, sample in rows], config.class_names)
            if names is None or len(names) < 2:
                embedded.note(f"{modality}: no zero-shot: the classes are numbers without names; give `class_names`")
                continue
            templates = config.templates.get(modality) or TEMPLATES.get(modality, ["{}"])
            vectors = embed_classes(model, list(names.values()), templates)
            label_of = {label: number for number, label in enumerate(names)}
            labels = torch.tensor([label_of[value] for value in values])
            inputs = embedded.inputs[modality].vectors[[number for number, _, _ in rows]]
            every = torch.arange(len(names))
            ranks, _ = rank_first(inputs, vectors, lambda rows, y=labels, c=every: y[rows, None] == c)
            right, classes = (ranks == 1).double().numpy(), labels.numpy()
            samples = np.array([sample for _, _, sample in rows])
            clusters = number_groups([embedded.field(s, config.group) if config.group else None for s in samples])
            commonest = (classes == np.bincount(classes).argmax()).astype(float)
            name = f"zero_shot/{modality}"
            figures |= record(embedded, f"{name}/accuracy", Scores(right, samples, clusters, commonest))
            one_hot = np.eye(len(names))[classes]
            columns = np.concatenate([one_hot * right[:, None], one_hot], 1)
            figures[f"{name}/macro_recall"] = bootstrap(columns, macro_recall, clusters, 1 / len(names))
        return figures


def macro_recall(sums: np.ndarray) -> np.ndarray:
    """The mean over the classes drawn of their share of right answers, from counts (B, 2 C) of right and of all."""
    right, count = np.split(sums, 2, axis=1)
    drawn = count > 0
    return (right / np.where(drawn, count, 1)).sum(1) / drawn.sum(1)


def name_classes(
    embedded: EmbeddedCorpus, labels: list[tuple[str, int]], class_names: list[str]
) -> dict[str, str] | None:
    """The name of each class, by label, in the order of the labels; `labels` are labels with a sample that has each.

    A label that is a number n is called `class_names[n]`, or else what most of its samples say in the field `label`;
    one in words is its own name. None where a number has no name. Raises UserError.
    """
    said: dict[str, Counter] = {}
    for label, sample in labels:
        said.setdefault(label, Counter())[embedded.field(sample, "label")] += 1
    distinct = sorted(said, key=lambda label: (int(label) if label.isdecimal() else -1, label))
    if class_names:
        numbers = [int(label) if label.isdecimal() else place for place, label in enumerate(distinct)]
        if max(numbers) >= len(class_names):
            raise UserError(f"class_names: {len(class_names)} names, but there is a class {max(numbers)}")
        return {label: class_names[number] for label, number in zip(distinct, numbers)}
    names = {label: said[label].most_common(1)[0][0] if label.isdecimal() else label for label in distinct}
    if any(name is None or name.isdecimal() for name in names.values()):
        return None
    return {label: str(name).replace("_", " ") for label, name in names.items()}


def embed_classes(model, names: list[str], templates: list[str]) -> torch.Tensor:
    """The unit vector of each class (C, E). Raises UserError for a template without {}."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"templates: {template!r} has no {{}} for the name of a class")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    vectors = model.embed(text=sentences)["text"].float().cpu().view(len(names), len(templates), -1)
    return torch.nn.functional.normalize(vectors.mean(1), dim=-1)
