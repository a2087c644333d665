"""The command line: it parses, calls and prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from . import __version__
from .errors import BadInput

app = App(
    name="mmfm",
    help="Pretrain one Transformer on text, images and audio; search across the three; evaluate it.",
    version=__version__,
)


@app.command
def pretrain(
    config: str, *settings: str, resume: bool = False, smoke: bool = False, allow_data_change: bool = False
) -> None:
    """Train as a YAML file says, e.g. `mmfm pretrain configs/demo.yaml steps=50 model.width=128`.

    Parameters
    ----------
    config
        The YAML file.
    settings
        key=value pairs that stand in for the file's (dots go deeper); run=FOLDER names the run folder.
    resume
        Go on from the newest whole checkpoint in the run folder.
    smoke
        The same run at toy size for ten steps, in RUN-smoke.
    allow_data_change
        With --resume: go on although the sources' shards are others than before.
    """
    from . import train
    from .config import load

    loaded = load(config, list(settings))
    if smoke and resume:
        raise BadInput("--smoke always starts afresh: leave out --resume")
    train.pretrain(train.smoke(loaded) if smoke else loaded, resume=resume, allow_data_change=allow_data_change)


@app.command
def evaluate(
    run: str,
    *,
    on: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    group: str = "",
    within: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    labels: str = "",
    parts: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    device: str = "auto",
) -> None:
    """Measure a run's newest checkpoint: retrieval in all directions, kNN and a linear probe, bits per byte.

    Parameters
    ----------
    run
        A run folder, or one checkpoint's folder.
    on
        Shards: .tar, .jsonl or .txt files or patterns. Without it, what the run's config says under `evaluate`.
    group
        The field that says which items are right answers for each other; without it, those of an equal text.
    within
        Keep each query's gallery to the items with the same value of this field.
    where
        FIELD=VALUE: keep the items whose JSON has this value. May be given again.
    labels
        The field with the labels for kNN and the probe; without it, the `.cls` member.
    parts
        The kinds to read; without it, all that the data has.
    json
        One JSON object on standard output, everything else on standard error.
    device
        cpu, cuda, or auto.
    """
    import json as json_

    from .config import Evaluation
    from .evaluate import evaluate as measure
    from .evaluate import render, table
    from .model import load
    from .monitor import summary

    model = load(run, device=device)
    if on:
        named = {"": Evaluation(on, _pairs(where), group, within, labels, parts or [])}
    else:
        named = model.evaluations
        if not named:
            raise BadInput("--on SHARDS is missing, and the run's config has no `evaluate`")
    everything = {}
    for name, evaluation in named.items():
        figures, encoded = measure(model, evaluation)
        everything |= {f"{name}/{key}" if name else key: value for key, value in figures.items()}
        if encoded.lost:
            print("\n".join(summary(encoded.lost)), file=sys.stderr)
        if not json:
            print(f"\n{name}" if name else "", render(table(figures)), sep="\n")
    if json:
        print(json_.dumps(everything))


@app.command
def report(run: str, *, device: str = "auto") -> None:
    """Write RUN/report.html, one page that needs no network: a gallery, the measurements, the curves, the config.

    Parameters
    ----------
    run
        A run folder whose config has an `evaluate`.
    device
        cpu, cuda, or auto.
    """
    from .report import write

    write(run, device)


@app.command
def search(
    run: str,
    query: str = "",
    *,
    in_: Annotated[list[str], Parameter(name="--in", consume_multiple=True, negative=())],
    image: str = "",
    audio: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    top: int = 5,
    device: str = "auto",
) -> None:
    """Find the items nearest to a text, a picture or a sound: `mmfm search runs/demo --in SHARDS "a red bus"`.

    Parameters
    ----------
    run
        A run folder, or one checkpoint's folder.
    query
        The text to search for.
    in_
        Shards to search in.
    image
        A picture to search for.
    audio
        A sound to search for.
    where
        FIELD=VALUE: keep the items whose JSON has this value. May be given again.
    top
        How many of each kind.
    device
        cpu, cuda, or auto.
    """
    from .model import load
    from .search import search as find
    from .shards import SHARDS

    words = [one for one in in_ if not one.endswith(SHARDS)]  # the query, where it stands behind the shards
    if words and not query and not image and not audio:
        query, in_ = " ".join(words), [one for one in in_ if one.endswith(SHARDS)]
    given = {kind: value for kind, value in (("text", query), ("image", image), ("audio", audio)) if value}
    if len(given) != 1:
        raise BadInput("search for one thing: a text, --image FILE or --audio FILE")
    if top < 1:
        raise BadInput("--top is at least 1")
    if not in_:
        raise BadInput("--in names no shards: give .tar, .jsonl or .txt files")
    find(load(run, device=device), given, in_, _pairs(where), top)


def _pairs(given: list[str] | None) -> dict[str, str]:
    """FIELD=VALUE texts as a map."""
    pairs = {}
    for one in given or []:
        field, equals, value = one.partition("=")
        if not equals or not field:
            raise BadInput(f"--where {one!r} is not FIELD=VALUE")
        pairs[field] = value
    return pairs


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    # Waiting threads sleep rather than spin: on a busy machine a step takes two thirds of the time (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a corpus may hold what a terminal cannot show
    try:
        app(exit_on_error=False, print_error=False)
    except (BadInput, CycloptsError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        hint = "" if isinstance(error, BadInput) else " (see mmfm --help)"
        print(f"mmfm: {lines[-1] if lines else type(error).__name__}{hint}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if not error.filename:
            raise
        print(f"mmfm: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
