"""Writes, draws and plays: generate."""

from __future__ import annotations

import sys
from json import dumps
from typing import Annotated, Any

from cyclopts import Parameter

from ..decoding.settings import Settings
from ..errors import UserError, printable
from .app import app


@app.command
def generate(
    run: str,
    text: str = "",
    /,
    *,
    to: str = "text",
    image: str = "",
    audio: str = "",
    fill: Annotated[str, Parameter(negative=())] = "",
    out: str = "",
    settings: Annotated[Settings | None, Parameter(name="*", negative=())] = None,
    candidates: int = 1,
    rerank: Annotated[bool, Parameter(negative=())] = False,
    objective: str = "",
    json: Annotated[bool, Parameter(negative=())] = False,
    trust: Annotated[bool, Parameter(negative=())] = False,
    device: str = "auto",
) -> None:
    """Write a text, draw a picture, make a sound: `mmfm generate RUN "two small red stars" --to image --out stars.png`.

    What a run can write after what is said by its objectives; docs/generation.md has all settings.

    Parameters
    ----------
    run
        A run folder, or the folder of one checkpoint.
    text
        What is read before: a caption to draw, a text that goes on.
    to
        What is made: text, image, audio, or a modality of the run by its name.
    image
        A picture that is read before.
    audio
        A sound that is read before.
    fill
        A text with [MASK] for each token that is to be filled in.
    out
        The file to write, as in stars.png, sound.wav or text.txt; without it a text is printed as it is written.
    candidates
        How many are made, which are told apart by chance or by the beams they come from.
    rerank
        Sort the candidates by their likeness to what was read, by the run's contrastive head, and keep the best.
    objective
        The run's objective that writes, as in caption/causal; without it the first that fits.
    json
        Print one JSON object a candidate, the best first.
    trust
        Load tokenizers and objectives from outside of the package that the checkpoint names.
    device
        cpu, cuda, or auto.
    """
    from ..generate import find_target, save
    from ..model import load

    model = load(run, device=device, plugins=trust)
    given = {name: value for name, value in (("text", text), ("image", image), ("audio", audio)) if value}
    asked = {"to": to, "objective": objective, "candidates": candidates, "rerank": rerank}
    keywords: dict[str, Any] = {name: [value] for name, value in given.items()} | vars(settings or Settings()) | asked
    keywords |= {"fill": [fill]} if fill else {}
    generation = model.tokenizers[find_target(model, to)].generation()
    if not out and not json and generation is not None and generation.end is None:
        raise UserError(
            f"name the file to write: --out FILE, as in --out made.{'wav' if to.startswith('audio') else 'png'}"
        )
    plain = candidates == 1 and not rerank and not fill and not out and not json
    if plain:
        for piece in model.stream_text(**keywords):
            print(_lines(piece), end="", flush=True)
        print()
        return
    show = sys.stderr.isatty() and (candidates > 1 or bool(out))
    tell = (lambda done, of: print(f"\r{to} {done:3d} %", end="", file=sys.stderr, flush=True)) if show else None
    (best,) = model.generate(progress=tell, **keywords)
    if show:
        print(file=sys.stderr)
    if out:
        save(best.value, out)
    for number, one in enumerate([best, *best.others]):
        said = {"ids": one.ids, "log_likelihood": one.log_likelihood, "stopped": one.stopped}
        said |= {} if one.similarity is None else {"similarity": one.similarity}
        said |= {"text": one.value} if isinstance(one.value, str) else {}
        if json:
            print(dumps({**said, "modality": one.modality, **({"file": out} if out and not number else {})}))
        elif not out and (not number or not rerank):
            print(_lines(str(one.value)))
    if out and not json:
        print(printable(out))


def _lines(text: str) -> str:
    """A text whose line ends are kept and that does nothing else to a terminal."""
    return "\n".join(printable(line) for line in text.split("\n"))
