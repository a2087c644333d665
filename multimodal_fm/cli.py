"""The command line: it parses, calls and prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from . import __version__
from .errors import UserError

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
    from .config import load
    from .train import loop
    from .train.smoke import toy

    loaded = load(config, list(settings))
    if smoke and resume:
        raise UserError("--smoke always starts afresh: leave out --resume")
    loop.pretrain(toy(loaded) if smoke else loaded, resume=resume, allow_data_change=allow_data_change)


@app.command
def evaluate(
    run: str,
    *,
    on: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    group: str = "",
    within: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    labels: str = "",
    modalities: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
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
        The field that says which samples are right answers for each other; without it, those of an equal text.
    within
        Keep each query's gallery to the samples with the same value of this field.
    where
        FIELD=VALUE: keep the samples whose JSON has this value. May be given again.
    labels
        The field with the labels for kNN and the probe; without it, the `.cls` member.
    modalities
        The modalities to read; without it, all that the data has.
    json
        One JSON object on standard output, everything else on standard error.
    device
        cpu, cuda, or auto.
    """
    import json as json_

    from .config import Evaluation
    from .evals.run import evaluate as measure
    from .evals.run import render, table
    from .model import load
    from .run_dir.records import Skipped

    model = load(run, device=device)
    if on:
        named = {"": Evaluation(on, _pairs(where), group, within, labels, modalities or [])}
    else:
        named = model.evaluations
        if not named:
            raise UserError("--on SHARDS is missing, and the run's config has no `evaluate`")
    everything = {}
    for name, evaluation in named.items():
        figures, encoded = measure(model, evaluation)
        everything |= {f"{name}/{key}" if name else key: value for key, value in figures.items()}
        if encoded.lost:
            print("\n".join(Skipped(encoded.lost).lines()), file=sys.stderr)
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
    from .reports.run import write

    write(run, device)


@app.command
def inspect(
    *shards: str,
    config: str = "",
    html: str = "",
    verify: Annotated[bool, Parameter(negative=())] = False,
    rebuild: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    samples: Annotated[bool, Parameter(negative=())] = False,
    piece: int = 2000,
) -> int:
    """Say what a corpus holds and what is broken in it: `mmfm inspect 'photos-*.tar' --html photos.html`.

    Exits with 0 whatever it finds, with 2 where it cannot start, with 1 where --verify finds damage.

    Parameters
    ----------
    shards
        .tar, .jsonl or .txt files, patterns or URLs.
    config
        The YAML file whose tokenizers count the tokens; without it, the default ones.
    html
        Write the same as a page with plots and a gallery.
    verify
        Read every byte and compare it with the index; name what is damaged.
    rebuild
        Make the indexes anew, of shards that have changed.
    json
        One JSON object on standard output.
    samples
        Decode everything: one JSON line a sample with what a training run would get.
    piece
        .txt files are cut to pieces of at most so many bytes, as `piece` of a source says.
    """
    from .inspect.run import inspect as look

    return look(list(shards), config, html, verify, rebuild, json, samples, piece)


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
    """Find the samples nearest to a text, a picture or a sound: `mmfm search runs/demo --in SHARDS "a red bus"`.

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
        FIELD=VALUE: keep the samples whose JSON has this value. May be given again.
    top
        How many of each modality.
    device
        cpu, cuda, or auto.
    """
    from .corpus.shards import SHARDS
    from .model import load
    from .search.query import search as find

    words = [one for one in in_ if not one.endswith(SHARDS)]  # the query, where it stands behind the shards
    if words and not query and not image and not audio:
        query, in_ = " ".join(words), [one for one in in_ if one.endswith(SHARDS)]
    given = {modality: value for modality, value in (("text", query), ("image", image), ("audio", audio)) if value}
    if len(given) != 1:
        raise UserError("search for one thing: a text, --image FILE or --audio FILE")
    if top < 1:
        raise UserError("--top is at least 1")
    if not in_:
        raise UserError("--in names no shards: give .tar, .jsonl or .txt files")
    find(load(run, device=device), given, in_, _pairs(where), top)


def _pairs(given: list[str] | None) -> dict[str, str]:
    """FIELD=VALUE texts as a map."""
    pairs = {}
    for one in given or []:
        field, equals, value = one.partition("=")
        if not equals or not field:
            raise UserError(f"--where {one!r} is not FIELD=VALUE")
        pairs[field] = value
    return pairs


@app.command
def pack(
    *sources: str,
    to: str,
    image_column: str = "",
    text_column: str = "",
    audio_column: str = "",
    label_column: str = "",
    key_column: str = "",
    longest_side: int = 0,
    rate: int = 0,
    shard_size: str = "256MB",
    split: str = "1",
    group: str = "",
    dedup: str = "exact",
    piece_bytes: int = 2000,
    workers: int | None = None,
) -> None:
    """Make checked webdataset shards and a data card of what you have: `mmfm pack photos --to shards/photos`.

    A SOURCE is a folder of media (files of one stem are a sample: photo.jpg, photo.txt, photo.json; or a folder a
    label), a table (.csv, .tsv, .parquet, or .jsonl with a column named below), text (.jsonl, .txt), webdataset shards
    (.tar, .tar.gz, .tar.bz2, .tar.xz, .tar.zst), or a Hugging Face data set (a folder of save_to_disk, or a name).
    Stopped at any time, the same command goes on; what it makes does not depend on --workers.

    Parameters
    ----------
    sources
        Files, patterns, folders, or the name of a Hugging Face data set.
    to
        The folder to write: shards, card.md, croissant.json, quarantine.jsonl (what was left out, and why).
    image_column
        The column of a table with pictures: paths (from the table's folder), URLs, or their bytes.
    text_column
        The column with text; without it one of text, caption, txt, captions.
    audio_column
        The column with sounds: paths, URLs, or their bytes.
    label_column
        The column with classes: whole numbers, or words that are numbered in their order.
    key_column
        The column with names for the samples.
    longest_side
        Make larger pictures smaller, to so many pixels (JPEG, quality 95); others keep their bytes.
    rate
        Make all sounds mono FLAC of so many samples a second; without it they keep their bytes.
    shard_size
        The most bytes a shard has, as in 256MB or 1GiB.
    split
        Shares of train, validation and test, as in 0.9,0.05,0.05. Samples that share a picture, a sound, a text or a
        translation are never on two sides; with --dedup near neither are near copies.
    group
        Samples with an equal value in this field (dots go deeper) are never on two sides of the split either.
    dedup
        none, exact (equal content: the first is kept), or near: also of samples whose parts are all nearly equal the
        first is kept. Pictures of 64 pixels and more: perceptual hashes (64 bits) that differ in at most 4, and alike
        colors; text: a similarity (Jaccard, runs of 5 characters, by MinHash) of at least 0.8.
    piece_bytes
        Longer text that belongs to no picture or sound is cut into pieces of at most so many bytes.
    workers
        Processes; without it, one a core. 0: none but this one.
    """
    from .pack import settings, summary
    from .pack.run import pack as write

    chosen = settings.Settings(
        list(sources), image_column, text_column, audio_column, label_column, key_column, longest_side, rate,
        settings.parse_size(shard_size), settings.parse_split(split), group, dedup, piece_bytes,
    )  # fmt: skip
    facts = write(chosen, to, len(os.sched_getaffinity(0)) if workers is None else workers, show=True)
    print(summary(facts, to))


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    # Waiting threads sleep rather than spin: on a busy machine a step takes two thirds of the time (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began us
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a corpus may hold what a terminal cannot show
    try:
        app(exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        hint = "" if isinstance(error, UserError) else " (see mmfm --help)"
        print(f"mmfm: {lines[-1] if lines else type(error).__name__}{hint}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"mmfm: {error.filename or 'reading or writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
