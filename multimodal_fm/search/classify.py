"""Says which class each of a user's things is of: by a head that was trained on labels, or by the classes' names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import MAX_TOKENS, Sample
from ..errors import SampleError, UserError
from ..evals.heads import bind, run_head
from ..evals.zero_shot import TEMPLATES, embed_classes
from ..model import Model
from ..objectives import supervised
from ..objectives.contrastive import MAX_SCALE
from ..pack.samples import modality_of
from ..tokens import Tokens, constant

MODALITIES = ("image", "audio", "text")


def classify(
    model: Model,
    things: Sequence[Any],
    labels: Sequence[str] | None = None,
    head: str = "classify",
    templates: Sequence[str] | None = None,
    modality: str = "",
) -> list[dict]:
    """See `Model.classify`. Raises UserError."""
    if isinstance(things, (str, bytes, os.PathLike)):
        raise UserError(f"classify: give a list of things, not one {type(things).__name__}")
    given = [identify(thing, number, modality) for number, thing in enumerate(things)]
    for number, thing in enumerate(given):
        if unknown := [name for name in thing if name not in model.modalities]:
            raise UserError(f"classify: {_name(number, thing)} is of the modality {unknown[0]!r}, and this model reads "
                            f"{', '.join(model.modalities)}")  # fmt: skip
    if not given:
        return []
    training = model.training
    model.eval()
    try:
        return _by_head(model, given, head) if labels is None else _by_names(model, given, labels, templates)
    finally:
        model.train(training)


def identify(thing: Any, number: int, modality: str = "") -> dict[str, Any]:
    """What is to be read of a thing, by modality: the one named, or else by its type and the ending of its file.

    Raises UserError.
    """
    if isinstance(thing, dict) and thing and not modality:
        return {name: part for name, own in thing.items() for part in identify(own, number, name).values()}
    path = thing if isinstance(thing, (str, os.PathLike)) else None
    kind = modality_of(os.path.splitext(str(path))[1][1:].lower()) if path is not None else ""
    is_file = isinstance(thing, os.PathLike) or (path is not None and not modality and os.path.isfile(path))
    if not modality:
        if isinstance(thing, str) and not is_file and kind in ("image", "audio") and not any(map(str.isspace, thing)):
            raise UserError(
                f"classify: things[{number}]: there is no file {thing!r}; a text is told by modality='text'"
            )
        modality = kind if is_file else "text" if path is not None else _by_type(thing)
        if modality not in MODALITIES:
            what = repr(str(path)) if path is not None else f"a {type(thing).__name__}"
            raise UserError(f"classify: things[{number}] is {what}, whose modality is not known: name it in modality=")
    if modality == "text" and is_file:
        try:
            thing = Path(str(path)).read_text("utf-8", "replace")
        except OSError as error:
            raise UserError(f"classify: things[{number}] ({path}): {error.strerror}") from None
    return {modality: str(thing) if isinstance(thing, Path) else thing}


def _by_type(thing: Any) -> str:
    if isinstance(thing, tuple) and len(thing) == 2:
        return "audio"  # samples and their rate
    pixels = hasattr(thing, "getbands") or getattr(thing, "ndim", 0) == 3  # a PIL picture, or an array
    return "image" if pixels else ""


def _name(number: int, thing: dict[str, Any]) -> str:
    files = [part for name, part in thing.items() if isinstance(part, str) and name != "text"]
    return f"things[{number}]" + (f" ({files[0]})" if files else "")


@torch.no_grad()
def _by_head(model: Model, given: list[dict[str, Any]], head: str) -> list[dict]:
    """By a head; the mean of the logits of a long thing's windows."""
    plugin = model.config.heads.get(head)
    if plugin is None or plugin.name != "classify":
        have = ", ".join(name for name, own in model.config.heads.items() if own.name == "classify")
        raise UserError(f"classify: this model has no head {head!r} that was trained on classes "
                        f"({f'it has {have}' if have else 'tune one'}); or name the classes in labels=")  # fmt: skip
    objective = supervised.Objective(supervised.Config(head=head, fuse=True), model, [])
    bound, layer = bind(model, objective), model.heads[head]
    label = layer.encode(plugin.config, plugin.config.classes[0], None)  # pyright: ignore  it is not looked at
    outputs: list[list[Tensor]] = [[] for _ in given]
    held, size = [], 0
    for number, thing in enumerate(given):
        for view in _read(model, thing, number):
            held.append((number, objective.arrange(bound, Sample(view, label=label))))
            size += sum(map(len, view.values()))
        if size >= MAX_TOKENS or number == len(given) - 1:
            answers = run_head(model, objective, list(enumerate(example for _, example in held)))
            for (owner, _), answer in zip(held, answers, strict=True):
                outputs[owner].append(answer)
            held, size = [], 0
    return [layer.decode(torch.cat(own), None) for own in outputs]  # pyright: ignore


def _read(model: Model, thing: dict[str, Any], number: int) -> list[dict[str, Tokens]]:
    """The sequences of a thing by modality; several where a long one is covered by windows. Raises UserError."""
    read = {}
    for modality, raw in thing.items():
        place = model.modalities.index(modality)
        try:
            sequences = model.tokenizers[modality].read(raw)
        except (SampleError, OSError) as error:
            raise UserError(f"classify: {_name(number, thing)}: {error}") from None
        read[modality] = [one.replace(modality=constant(place, len(one))) for one in sequences]
    if len(read) == 1:
        return [{modality: one} for modality, own in read.items() for one in own]
    return [{modality: own[0] for modality, own in read.items()}]


def _by_names(
    model: Model, given: list[dict[str, Any]], labels: Sequence[str], templates: Sequence[str] | None
) -> list[dict]:
    """By the cosines of the things with sentences about the classes."""
    names = [] if isinstance(labels, str) else [str(label) for label in labels]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"classify: labels are at least two different names, not {labels!r}")
    if "text" not in model.modalities or "retrieval" not in model.heads:
        raise UserError("classify: with labels the model must read text and have a retrieval head; this one has not")
    found: list[dict] = [{} for _ in given]
    for modality in dict.fromkeys(name for thing in given for name in thing):
        rows = [number for number, thing in enumerate(given) if modality in thing]
        if any(len(given[number]) > 1 for number in rows):
            raise UserError("classify: with labels each thing is of one modality; a pair needs a trained head")
        sentences = list(templates) if templates is not None else TEMPLATES.get(modality, ["{}"])
        classes = embed_classes(model, [name.replace("_", " ") for name in names], sentences)
        vectors = model.embed_sequences(modality, [
            [view[modality] for view in _read(model, given[number], number)] for number in rows
        ])[0]  # fmt: skip
        shares = (vectors.double().cpu() @ classes.double().T * MAX_SCALE).softmax(1).tolist()
        for number, row in zip(rows, shares, strict=True):
            named = dict(zip(names, row, strict=True))
            found[number] = {"label": max(named, key=named.__getitem__), "probabilities": named}
    return found
