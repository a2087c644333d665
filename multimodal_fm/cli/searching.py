"""Finds: search and classify."""

from __future__ import annotations

import sys
from json import dumps
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError, printable
from .app import app, pairs


@app.command
def search(
    run: str,
    query: str = "",
    /,
    *,
    in_: Annotated[list[str], Parameter(name="--in", consume_multiple=True, negative=())],
    image: str = "",
    audio: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    top: int = 5,
    json: Annotated[bool, Parameter(negative=())] = False,
    device: str = "auto",
) -> None:
    """Find the samples nearest to a text, a picture or a sound: `mmfm search runs/demo --in SHARDS "a red bus"`.

    Parameters
    ----------
    run
        A run folder, or the folder of one checkpoint.
    query
        The text to search for.
    in_
        Shards to search in.
    image
        A picture to search for.
    audio
        A sound to search for.
    where
        FIELD=VALUE: keep the samples whose JSON has this value. May be given again.
    top
        How many of each modality.
    json
        Print one JSON object a hit.
    device
        cpu, cuda, or auto.
    """
    from ..model import load
    from ..run_dir.records import Skipped
    from ..search.query import render, split_query
    from ..search.query import search as find

    if not query and not image and not audio:
        in_, query = split_query(in_)
    given = {modality: value for modality, value in (("text", query), ("image", image), ("audio", audio)) if value}
    if len(given) != 1:
        raise UserError("search for one thing: a text, --image FILE or --audio FILE")
    if top < 1:
        raise UserError("--top is at least 1")
    if not in_:
        raise UserError("--in names no shards: give .tar, .jsonl or .txt files")
    hits, skipped = find(load(run, device=device), given, in_, pairs(where), top)
    if skipped:
        print("\n".join(Skipped(skipped).lines()), file=sys.stderr)
    print(render(hits, json))


@app.command
def classify(
    run: str,
    /,
    *things: str,
    labels: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    templates: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    head: str = "classify",
    modality: str = "",
    json: Annotated[bool, Parameter(negative=())] = False,
    device: str = "auto",
) -> None:
    """Say which class each file or text is of: `mmfm classify runs/demo cat.jpg --labels cat dog`.

    Parameters
    ----------
    run
        A run folder, or the folder of one checkpoint.
    things
        Files of pictures, sounds or texts, or texts.
    labels
        The names of the classes, which need no training; without it, the classes that the run was tuned to.
    templates
        With --labels: sentences with {} for the name of a class, whose vectors are averaged.
    head
        Without --labels: the head of the model that says it.
    modality
        image, audio or text: of all things; without it, endings of files tell it.
    json
        Print one JSON object a thing.
    device
        cpu, cuda, or auto.
    """
    from ..model import load

    if not things:
        raise UserError("name files or texts to classify")
    found = load(run, device=device).classify(list(things), labels, head, templates, modality)
    for thing, said in zip(things, found, strict=True):
        if json:
            print(dumps({"thing": thing, **said}))
            continue
        chosen = said["label"] if isinstance(said["label"], list) else [said["label"]]
        shown = ", ".join(f"{name} {said['probabilities'][name]:.3f}" for name in chosen) or "none"
        print(printable(f"{thing}  {shown}"))
