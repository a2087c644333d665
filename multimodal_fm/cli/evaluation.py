"""Measures and documents: evaluate, compare, report and card."""

from __future__ import annotations

import sys
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError, printable
from .app import app, pairs


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
    from .. import objectives
    from ..evals.base import Evaluation
    from ..evals.metrics import SEED
    from ..evals.run import evaluate as measure_all
    from ..evals.run import keep, load_evaluations, load_suite, render, table
    from ..model import load
    from ..run_dir import checkpoint
    from ..run_dir.records import Skipped

    folder = checkpoint.newest(run)
    if on and suite:
        raise UserError("give --on SHARDS or --suite, not both")
    fields = {"group": group, "within": within, "labels": labels, "where": pairs(where), "train": train}
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
    from ..evals import compare as comparison

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
    from ..reports import run as page
    from ..reports import tune as tuned

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
    from ..reports.model_card import Card

    made = Card(run, settings, trust)
    if not check:
        print(printable(str(made.write())))
        return 0
    for line in (problems := made.problems()):
        print(line)
    return 1 if problems else 0
