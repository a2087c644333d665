"""The command line: it parses, calls and prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError

from . import __version__
from .decoding.settings import Settings
from .errors import UserError, printable

SECONDS_FOR_THE_FIRST = 10  # that a process waits for the first to fail, before it prints why it failed itself

app = App(
    name="mmfm",
    help="Pretrain one Transformer on text, images and audio; search across the three; tune and evaluate it.",
    version=__version__,
)


@app.command
def pretrain(
    config: str,
    /,
    *settings: str,
    resume: Annotated[Literal["yes", "auto"] | None, Parameter(negative=())] = None,
    smoke: Annotated[bool, Parameter(negative=())] = False,
    allow_data_change: Annotated[bool, Parameter(negative=())] = False,
    profile: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train as a YAML file says, e.g. `mmfm pretrain configs/demo.yaml steps=50 model.backbone.width=128`.

    Parameters
    ----------
    config
        The YAML file.
    settings
        key=value pairs that stand in for the file's (dots go deeper); run_dir=FOLDER names the run folder.
    resume
        Go on from the newest whole checkpoint in the run folder. `--resume auto`: or begin, where there is none.
    smoke
        The same run at toy size for ten steps, in a temporary folder.
    allow_data_change
        With --resume: go on although the sources' shards are others than before.
    profile
        Write RUN/profile.json and RUN/profile.txt: where the time of the steps 4 to 6 goes.
    """
    from .train import loop
    from .train.config import load
    from .train.smoke import toy

    loaded = load(config, list(settings))
    if smoke and resume:
        raise UserError("--smoke always starts afresh: leave out --resume")
    how = {"yes": True, "auto": "auto", None: False}[resume]
    loop.pretrain(toy(loaded) if smoke else loaded, how, allow_data_change, profile)


@app.command
def scale(
    config: str,
    /,
    *settings: str,
    sizes: str = "32,48,64,96",
    held_out: str = "128",
    seeds: int = 1,
    figure: str = "",
    to: str = "",
) -> None:
    """Train a ladder of sizes, fit the scaling law, and compare it with larger runs: `mmfm scale configs/gpt.yaml`.

    Writes scale.json and scale.html, with what is predicted and what was measured. What was interrupted goes on.

    Parameters
    ----------
    config
        The YAML file.
    settings
        key=value pairs that stand in for the file's, for runs of all sizes, such as steps=500.
    sizes
        The widths that the law is fitted to, WIDTH or WIDTHxDEPTH, with commas between them; at least four.
    held_out
        The larger ones that it is compared with, in the same way; may be empty.
    seeds
        Runs of each size.
    figure
        Of metrics.jsonl; without it the validation's loss, or, where there is none, that of training.
    to
        The folder; without it, the config's run folder with -scale behind it.
    """
    from .reports import scale as page
    from .train.config import load
    from .train.scale import parse_sizes
    from .train.scale import scale as train_ladder

    if seeds < 1:
        raise UserError(f"--seeds {seeds}: is at least 1")
    loaded = load(config, list(settings))
    folder, depth = to or f"{loaded.run_dir}-scale", loaded.model.backbone.depth
    ladder = parse_sizes(sizes, depth), parse_sizes(held_out, depth)
    result = train_ladder(loaded, *ladder, folder, seeds, figure, lambda line: print(printable(line)))
    path = page.write(folder, result)
    print(page.sentence(result))
    for run in (run for run in result["runs"] if run["held_out"]):
        low, high = run["predicted"]["low"], run["predicted"]["high"]
        inside = "inside" if run["inside"] else "outside"
        print(f"held out {run['size']}: {run['loss']:.4f}, {inside} of the predicted {low:.4f} to {high:.4f}")
    print(printable(str(path)))


@app.command
def evaluate(
    run: str,
    /,
    *,
    on: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    group: str = "",
    within: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    labels: str = "",
    modalities: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    evaluators: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    measure: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    train: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    subgroups: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    suite: str = "",
    trust: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    device: str = "auto",
) -> None:
    """Measure a run's newest checkpoint: retrieval in all directions, kNN and a linear probe, bits per byte.

    The figures are kept in RUN/evaluations.json too.

    Parameters
    ----------
    run
        A run folder, or the folder of one checkpoint.
    on
        Shards: .tar, .jsonl or .txt files or patterns. Without it, what the run's config names under `evaluate`,
        with the settings given here in place of the config's.
    group
        The field whose equal values belong together: right answers of retrieval; never neighbors or training data of
        each other in kNN and probe. Without it, samples of an equal text are right answers.
    within
        Limit each query's gallery to the samples with the same value of this field.
    where
        FIELD=VALUE: keep the samples whose JSON has this value. May be given again.
    labels
        The field with the classes for kNN and the probe; without it, the `.cls` member.
    modalities
        The modalities to read; without it, all that the corpus has.
    evaluators
        Import paths of your own evaluators, to be run beside the built-in ones.
    measure
        The built-in evaluators to run, by name, as in zero_shot or embedding_space; without it, those of every day.
    train
        Shards that kNN and the probe are fitted on; without it, within the corpus, by folds.
    subgroups
        Fields of the samples: the scores of each of their values, and the largest difference.
    suite
        A YAML file of evaluations by name, as under `evaluate` of a config; or `quick` or `full`: those of the run's
        config with few evaluators, or with all.
    trust
        Without --on: read what the config of a checkpoint names that was not trained here by you.
    json
        Print one JSON object to standard output, everything else to standard error.
    device
        cpu, cuda, or auto.
    """
    from . import objectives
    from .evals.base import Evaluation
    from .evals.metrics import SEED
    from .evals.run import evaluate as measure_all
    from .evals.run import keep, load_evaluations, load_suite, render, table
    from .model import load
    from .run_dir import checkpoint
    from .run_dir.records import Skipped

    folder = checkpoint.newest(run)
    if on and suite:
        raise UserError("give --on SHARDS or --suite, not both")
    fields = {"group": group, "within": within, "labels": labels, "where": _pairs(where), "train": train}
    lists = {"modalities": modalities, "evaluators": evaluators, "measure": measure, "subgroups": subgroups}
    given = {name: value for name, value in {**fields, **lists}.items() if value}
    if on:
        evaluations = {"": Evaluation(on, **given)}
    else:
        evaluations = load_suite(suite, folder, trust) if suite else load_evaluations(folder, trust)
        if not evaluations:
            raise UserError("--on SHARDS is missing, and the run's config has no `evaluate`")
        evaluations = {name: replace(evaluation, **given) for name, evaluation in evaluations.items()}
    model = load(folder, device=device, plugins=trust)
    trained = objectives.load(folder, model, plugins=trust)
    all_figures = {}
    for name, evaluation in evaluations.items():
        figures, embedded = measure_all(model, trained, evaluation, folder)
        keep(name, evaluation, figures, embedded)
        all_figures |= {f"{name}/{key}" if name else key: {**value, "seed": SEED} for key, value in figures.items()}
        if embedded.skipped:
            print("\n".join(Skipped(embedded.skipped).lines()), file=sys.stderr)
        if not json:
            print(f"\n{printable(name)}" if name else "", render(table(figures)), sep="\n")
        for note in embedded.notes:
            print(f"note: {printable(note)}", file=sys.stderr if json else sys.stdout)
    if json:
        print(dumps(all_figures))


@app.command
def tune(
    run: str,
    /,
    *settings: str,
    task: str,
    data: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    validation: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    test: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    how: str = "full",
    label: str = "",
    image_column: str = "",
    audio_column: str = "",
    text_column: str = "",
    pair_column: str = "",
    like: str = "",
    rehearsal: float = 0.0,
    shots: int = 0,
    seed: int = 0,
    resume: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Adapt a checkpoint to labeled data and measure it: `mmfm tune RUN --task image-classification --data FOLDER`.

    Needs no config: labels are found, classes counted, settings chosen for the size of the data. The run folder is one
    like any other, with the figures of the test part, a confusion matrix and the worst mistakes in report.html.

    Parameters
    ----------
    run
        A run folder, a checkpoint's folder, or `none` for a random start with the architecture of --like RUN.
    settings
        key=value pairs for the run's configuration, such as steps=500 or optim.lr=1e-4; run_dir=FOLDER names the run.
    task
        image-classification, audio-classification, text-classification, pair-classification, token-tagging,
        question-answering, regression, captioning or retrieval.
    data
        Shards, a folder, a CSV, JSONL or Parquet file, or hf:OWNER/NAME.
    validation
        The same, for choosing the best checkpoint; without it, a part of the data is split off.
    test
        The same, for the figures; without it, a part of the data is split off.
    how
        full: all weights; lora: low-rank adapters; prompt: learned tokens; probe: a linear layer; knn: nearest
        neighbors; prototypes: class means; zero-shot: the names of the classes.
    label
        The column or field with the labels, or .cls; without it, it is found.
    image_column
        The column of a table with images.
    audio_column
        The column of a table with sounds.
    text_column
        The column of a table with texts.
    pair_column
        The column with the second text of a pair, or the context of a question.
    like
        With `none`: the run whose architecture and tokenizers are taken.
    rehearsal
        full, lora, prompt: the share, from 0 to 1, of the base's own tasks that goes on in every step, against
        forgetting.
    shots
        probe, knn, prototypes: learn from so many samples of each class.
    seed
        Of the split, of the head's weights and of the order of the samples.
    resume
        Go on from the newest whole checkpoint in the run folder, where there is one.
    json
        Print one JSON object to standard output, everything else to standard error.
    """
    from . import tune as adapt
    from .evals.run import render, table

    run_dir, overrides = f"runs/{task}-{how}", []
    parts = (data, validation or [], test or [])  # which take the settings that follow them along
    given = [one for part in parts for one in part if re.match(r"[a-z_][\w.-]*=", one) and not Path(one).exists()]
    data, validation, test = ([one for one in part if one not in given] for part in parts)
    for setting in (*settings, *given):
        if setting.startswith("run_dir="):
            run_dir = setting.removeprefix("run_dir=")
        else:
            overrides.append(setting)
    columns = {"image_column": image_column, "audio_column": audio_column, "text_column": text_column}
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        result = adapt(
            run, data, task, how, validation, test, run_dir, overrides, label=label, **columns,
            pair_column=pair_column, like=like, rehearsal=rehearsal, shots=shots, seed=seed, resume=resume,
        )  # fmt: skip
    if json:
        print(dumps(result))
    else:
        print(render(table(result["test"])), f"{result['run']}: {result['how']}, {result['seconds']:.0f} s", sep="\n")


@app.command
def compare(
    run_a: str,
    run_b: str,
    /,
    *,
    forgetting: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say whether two runs differ by more than chance: `mmfm compare runs/a runs/b`.

    Test sets on which both runs kept their predictions (mmfm tune does) are compared sample by sample, figures that
    both were evaluated for (mmfm evaluate) by their intervals.

    Parameters
    ----------
    run_a
        A run folder; with --forgetting the run that was tuned.
    run_b
        The other one; with --forgetting what tuning made of it.
    forgetting
        What tuning changed in each modality and task, of the figures that both runs were evaluated for.
    json
        Print one JSON object.
    """
    from .evals import compare as comparison

    if forgetting:
        result, render = comparison.measure_forgetting(run_a, run_b), comparison.render_forgetting
    else:
        result, render = comparison.compare(run_a, run_b), comparison.render_comparison
    print(dumps(result) if json else "\n".join(printable(line) for text in render(result) for line in text.split("\n")))


@app.command
def report(run: str, /, *, trust: Annotated[bool, Parameter(negative=())] = False, device: str = "auto") -> None:
    """Write RUN/report.html, one page that needs no network: a gallery, the evaluations, the curves, the config.

    Of a run that `mmfm tune` made: the figures of its task, the confusions and the worst mistakes.

    Parameters
    ----------
    run
        A run folder whose config has an `evaluate`, or that of a tune.
    trust
        Read the files and URLs that the config names although the run was not trained here by you.
    device
        cpu, cuda, or auto.
    """
    from .reports import run as page
    from .reports import tune as tuned

    if (Path(run) / tuned.FILE).exists():
        print(printable(str(tuned.write(run, trust))))
    else:
        page.write(run, device, trust)


@app.command
def card(
    run: str,
    /,
    *settings: str,
    check: Annotated[bool, Parameter(negative=())] = False,
    trust: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Write RUN/README.md, a model card in Hugging Face's format, and RUN/card.json, the file and field of each number.

    With --check it writes nothing: it exits with 1 and says what is missing or below the thresholds under `card` in the
    config, with 0 where a release has all it needs.

    Parameters
    ----------
    run
        A run folder.
    settings
        key=value pairs that stand in for those under `card` in the config, as in license=apache-2.0.
    check
        Check the card and the run's evaluations rather than write it.
    trust
        Read the data cards beside the shards that the config names although the run was not trained here by you.
    """
    from .reports.model_card import Card

    made = Card(run, settings, trust)
    if not check:
        print(printable(str(made.write())))
        return 0
    for line in (problems := made.problems()):
        print(line)
    return 1 if problems else 0


@app.command
def inspect(
    *shards: str,
    config: str = "",
    html: str = "",
    verify: Annotated[bool, Parameter(negative=())] = False,
    rebuild: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    samples: Annotated[bool, Parameter(negative=())] = False,
    orders: Annotated[bool, Parameter(negative=())] = False,
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
    orders
        The order table of each task of --config for the first sample that it can read: what the model reads, in which
        order (a token reads those of its sequence whose order is not later), and what is predicted from which row.
    piece
        .txt files are cut to pieces of at most so many bytes, as `piece_bytes` of a source says.
    """
    from .inspect.run import inspect as look

    settings = None
    if orders:
        from .train.config import load

        if not config:
            raise UserError("--orders needs --config, whose tasks it shows")
        settings = load(config)
    more = {"tasks": settings.tasks, "heads": settings.model.heads} if settings else {}
    return look(list(shards), config, html, verify, rebuild, json, samples, piece, **more)


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
    from .model import load
    from .run_dir.records import Skipped
    from .search.query import render, split_query
    from .search.query import search as find

    if not query and not image and not audio:
        in_, query = split_query(in_)
    given = {modality: value for modality, value in (("text", query), ("image", image), ("audio", audio)) if value}
    if len(given) != 1:
        raise UserError("search for one thing: a text, --image FILE or --audio FILE")
    if top < 1:
        raise UserError("--top is at least 1")
    if not in_:
        raise UserError("--in names no shards: give .tar, .jsonl or .txt files")
    hits, skipped = find(load(run, device=device), given, in_, _pairs(where), top)
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
    from .model import load

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
    from .generate import find_target, save
    from .model import load

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
    text_block: int = 0,
    allow_outside: Annotated[bool, Parameter(negative=())] = False,
    codes: str = "",
    codes_member: str = "codes.npy",
    workers: int | None = None,
) -> None:
    """Make checked webdataset shards and a data card of what you have: `mmfm pack photos --to shards/photos`.

    A SOURCE is a folder of media (files of one stem are a sample: photo.jpg, photo.txt, photo.json; where all files are
    media, one folder down, the folders' names are labels), a table (.csv, .tsv, .parquet, or .jsonl with a column of
    images or audio or one named below), text (.jsonl, .txt), webdataset shards (.tar, .tar.gz, .tar.bz2, .tar.xz,
    .tar.zst), or a Hugging Face data set (a folder of save_to_disk, or hf:owner/name). Stopped at any time, the same
    command continues; the result does not depend on --workers.

    Parameters
    ----------
    sources
        Files, patterns, folders, or hf:owner/name for a data set of the Hugging Face hub.
    to
        The folder to write, outside of the sources: shards, card.md, croissant.json, quarantine.jsonl (what was left
        out, and why).
    image_column
        The column of a table with images: paths below the table's folder, URLs, or their bytes; without it one of
        image, img, picture, photo, image_path, image_url, image_file, img_path.
    text_column
        The column with text; without it one of text, caption, txt, captions.
    audio_column
        The column with audio: paths, URLs, or bytes; without it one of audio, sound, audio_path, audio_url, audio_file,
        sound_path.
    label_column
        The column with classes: whole numbers, or words that are numbered in order. Words of all sources share one
        numbering; sources with whole numbers cannot be packed together with sources of words.
    key_column
        The column with names for the samples.
    longest_side
        Make larger images smaller, to so many pixels (JPEG, quality 95); others keep their bytes.
    rate
        Make all audio mono FLAC of so many samples a second; without it audio keeps its bytes.
    shard_size
        The most bytes a shard has, as in 256MB or 1GiB.
    split
        Shares of train, validation and test, as in 0.9,0.05,0.05. Samples that share an image, audio, a text or a
        translation, and the pieces of one document (a text file is one), are never in two splits; with --dedup near
        neither are near copies.
    group
        Samples with an equal value in this field (dots go deeper) are never in two splits either.
    dedup
        none; exact: of samples with equal media, texts, labels and other fields (but for ids, paths and URLs) the first
        is kept; or near: also of samples that are nearly equal in all modalities. Images of 64 pixels and more:
        perceptual hashes (64 bits) that differ in at most 4, and alike colors; text: a Jaccard similarity (runs of 5
        characters, by MinHash) of at least 0.8.
    piece_bytes
        Longer text that belongs to no image or audio is cut into pieces of at most so many bytes.
    text_block
        Join texts that follow each other in a split to samples of at most so many bytes, which training reads as one
        sequence with the tokenizer's END and BEGIN between the documents: RoBERTa's full sentences, GPT's packed
        documents. Longer texts are cut to it, other fields of theirs are left out. 0: each text is a sample.
    allow_outside
        Let tables name files outside of their folder and URLs of hosts on private networks.
    codes
        A run (or a checkpoint's folder) with a head `codes`: its codec makes codes of each picture, or sound, which
        become the member KEY.codes.npy.
    codes_member
        What follows the key in the name of these members, where a corpus gets codes of two modalities, one after the
        other: audio.codes.npy.
    workers
        Processes; without it, one for each core. 0: none but this one.
    """
    from .corpus import storage
    from .pack import settings, summary
    from .pack.run import pack as write

    size, shares = storage.parse_size(shard_size, "--shard-size"), settings.parse_split(split)
    chosen = settings.Settings(
        list(sources), image_column, text_column, audio_column, label_column, key_column, longest_side, rate,
        size, shares, group, dedup, piece_bytes, text_block, allow_outside, codes, codes_member,
    )  # fmt: skip
    facts = write(chosen, to, len(os.sched_getaffinity(0)) if workers is None else workers, show=True)
    print(summary(facts, to))


def arguments(words: list[str]) -> list[str]:
    """`pretrain --resume` alone is `pretrain --resume yes`."""
    if words[:1] == ["pretrain"] and "--resume" in words and words[words.index("--resume") + 1 :][:1] != ["auto"]:
        words = [word for given in words for word in ((given, "yes") if given == "--resume" else (given,))]
    return words


def _usage(error: CycloptsError) -> str:
    """What is wrong with the words of a command line."""
    command = " ".join(error.command_chain or ())
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1].removesuffix(".")
    if isinstance(error, MissingArgumentError) and error.argument:
        name = error.argument.name
        text = f"{command}: {name} {'needs a value' if name in sys.argv else 'is missing'}"
    elif isinstance(error, UnknownOptionError) and command == "pretrain":
        text += "; settings of the configuration are written without dashes, as in steps=50"
    return f"{text} (see mmfm {command + ' ' if command else ''}--help)"


def fail(what: str) -> NoReturn:
    """Print one line on standard error and exit with 2.

    Of several processes the first prints it. torchrun ends the others when the first has failed; one that is still
    there some seconds later has failed alone, and says so.
    """
    line = f"mmfm: {printable(what)}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats what stands there below its own traceback
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(dumps({"message": message}))
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_THE_FIRST)
    print(line, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    # Waiting threads sleep rather than spin: on a busy machine a step takes two thirds of the time (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began us
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a corpus may hold what a terminal cannot show
    try:
        app(arguments(sys.argv[1:]), exit_on_error=False, print_error=False)
    except UserError as error:
        fail(" ".join(str(error).splitlines()) or type(error).__name__)
    except CycloptsError as error:
        fail(_usage(error))
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'reading or writing'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
