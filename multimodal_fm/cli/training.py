"""Trains: pretrain, plan, scale and tune."""

from __future__ import annotations

import contextlib
import re
import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import UserError, printable
from .app import app


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
    from ..train import loop
    from ..train.config import load
    from ..train.smoke import toy

    loaded = load(config, list(settings))
    if smoke and resume:
        raise UserError("--smoke always starts afresh: leave out --resume")
    how = {"yes": True, "auto": "auto", None: False}[resume]
    loop.pretrain(toy(loaded) if smoke else loaded, how, allow_data_change, profile)


@app.command
def plan(
    target: str,
    /,
    *settings: str,
    gpus: int = 1,
    kind: str = "auto",
    utilization: float = 0.0,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say what a run will hold, compute, take and read, before it starts: `mmfm plan mine.yaml --gpus 8 --kind h100`.

    Reads a few steps of the data; the model itself is not built. Of a run's folder, what was predicted and what was
    measured: `mmfm plan runs/mine`.

    Parameters
    ----------
    target
        The YAML file, or the folder of a run.
    settings
        key=value pairs that stand in for the file's, as for `pretrain`.
    gpus
        How many devices share a step; more than one need `--kind`.
    kind
        auto: this machine's device, which is measured; cpu; or one that is elsewhere: b200, h200, h100, h100-pcie,
        a100, a100-40, l40s, l4, a10, rtx4090, mi300x.
    utilization
        Of a named accelerator: the share of its peak that products reach in a whole step; 0: the assumed one.
    json
        One JSON object on standard output.
    """
    from ..reports.plan import render
    from ..train.plan import plan as make_plan

    made = make_plan(target, settings, gpus, kind, utilization)
    for line in [dumps(made)] if json else render(made).splitlines():
        print(printable(line))


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
    from ..reports import scale as page
    from ..train.config import load
    from ..train.scale import parse_sizes
    from ..train.scale import scale as train_ladder

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
    from .. import tune as adapt
    from ..evals.run import render, table

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
