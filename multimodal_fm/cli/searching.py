"""Finds: embed, index, search and classify."""

from __future__ import annotations

import os
import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError, printable
from .app import app, pairs


@app.command
def embed(
    run: str,
    /,
    *sources: str,
    out: str,
    dtype: str = "float16",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    image_column: str = "",
    text_column: str = "",
    audio_column: str = "",
    key_column: str = "",
    allow_outside: Annotated[bool, Parameter(negative=())] = False,
    workers: int | None = None,
    batch_tokens: int = 16_384,
    device: str = "auto",
    cluster: str = "",
) -> None:
    """Embed what you have, to search it: `mmfm embed runs/demo photos sounds.csv --out collection`.

    A SOURCE is what `mmfm pack` reads: a folder of media, shards (.tar, .jsonl, .txt, or compressed tars), a table
    (.csv, .tsv, .parquet, .jsonl) or a Hugging Face data set. Stopped at any time, the same command goes on. More
    sources are added by the same command with their names; a source that changed is read again, and takes its own
    place when that is done. Under torchrun each process takes its share.

    Parameters
    ----------
    run
        A run folder, or the folder of one checkpoint.
    sources
        Files, patterns, folders, or hf:owner/name.
    out
        The folder of the collection: Parquet files, and quarantine.jsonl, which says what could not be read and why.
    dtype
        float16 or float32: of the vectors on disk.
    where
        FIELD=VALUE: keep the samples whose JSON has this value. May be given again.
    image_column
        The column of a table with images: paths below the table's folder, URLs, or their bytes; without it one of
        image, img, picture, photo, image_path, image_url, image_file, img_path.
    text_column
        The column with text; without it one of text, caption, txt, captions.
    audio_column
        The column with audio; without it one of audio, sound, audio_path, audio_url, audio_file, sound_path.
    key_column
        The column with names for the samples.
    allow_outside
        Let tables name files outside of their folder and URLs of hosts on private networks.
    workers
        Processes that read and decode; without it, one for each core. 0: none but this one.
    batch_tokens
        Tokens that the model reads at a time.
    device
        cpu, cuda, or auto.
    cluster
        Embed on a Ray cluster, whose machines see RUN, the sources and --out, each machine or GPU its share: ray, auto,
        ray://HOST:10001 or HOST:6379.
    """
    from ..model import load
    from ..run_dir.records import Skipped
    from ..search import embed as embedding

    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    settings = embedding.Settings(
        list(sources), pairs(where), dtype, workers, batch_tokens, image_column, text_column, audio_column, key_column,
        allow_outside,
    )  # fmt: skip
    show = sys.stderr.isatty()
    if cluster:
        result = embedding.embed_on_cluster(run, device, out, settings, cluster, show)
    else:
        result = embedding.embed(load(run, device=device), run, out, settings, show)
    if result["skipped"]:
        print("\n".join(Skipped(result["skipped"]).lines()), file=sys.stderr)
    counts = ", ".join(f"{count} {modality}" for modality, count in result["counts"].items())
    print(printable(f"{out}: {result['items']} items ({counts or 'none'}), {result['added']} of them new"))


@app.command
def index(
    folder: str,
    /,
    *,
    dtype: str = "i8",
    exact_below: int = 20_000,
    recall: float = 0.98,
    delete: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    to: str = "",
    name: str = "",
) -> None:
    """Make the index of a collection, to search it faster: `mmfm index collection`.

    A modality with more than --exact-below items gets a graph (HNSW, by usearch), whose candidates are compared
    exactly; its recall against exact search is measured and printed. Smaller ones are searched exactly. What is
    embedded, added or deleted later is found at once, without this; the same command takes it in.

    Parameters
    ----------
    folder
        The folder that `mmfm embed --out` made.
    dtype
        i8, f16 or f32: of the vectors in a graph. Smaller ones are faster and take less memory.
    exact_below
        Items of a modality that are searched exactly.
    recall
        Of the nearest 10, that a graph is searched far enough for.
    delete
        Ids of items to delete; nothing else is done.
    to
        postgresql://...: copy the collection into PostgreSQL, with pgvector, instead.
    name
        With --to: of the table; without it, that of the folder.
    """
    from ..pack.state import make_progress
    from ..search import index as indexing
    from ..search import postgres
    from ..search.graph import Settings

    if delete:
        opened = indexing.LocalIndex(folder)
        print(f"{folder}: {opened.delete(delete)} of {len(set(delete))} deleted, {len(opened)} items are left")
        return
    if to:
        print(f"{indexing.copy_to(folder, to, name)} items copied to {postgres.shown(to)}")
        return
    with make_progress(sys.stderr.isatty()) as progress:
        task = progress.add_task("indexing", total=None)
        indexing.build_index(
            folder,
            Settings(exact_below, dtype, recall=recall),
            report=lambda line: print(printable(line)),
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )


@app.command
def search(
    index: str,
    query: str = "",
    /,
    *,
    image: Annotated[list[Path] | None, Parameter(negative=())] = None,
    audio: Annotated[list[Path] | None, Parameter(negative=())] = None,
    like: Annotated[list[str] | None, Parameter(negative=())] = None,
    minus: Annotated[list[str] | None, Parameter(negative=())] = None,
    weight: Annotated[list[str] | None, Parameter(negative=())] = None,
    to: str = "",
    where: Annotated[list[str] | None, Parameter(negative=())] = None,
    top: int = 5,
    fold: bool = True,
    min_score: float = -1.0,
    json: Annotated[bool, Parameter(negative=())] = False,
    in_: Annotated[list[str] | None, Parameter(name="--in", consume_multiple=True, negative=())] = None,
    run: str = "",
    device: str = "auto",
) -> None:
    """Find what is nearest to texts, pictures and sounds: `mmfm search INDEX "a red bus" --to image`.

    What is given is added up, each part as a unit vector times its weight; --minus is subtracted.

    Parameters
    ----------
    index
        A folder that `mmfm embed` made, or postgresql://USER@HOST/DATABASE?collection=NAME; with --in a run folder.
    query
        The text to search for.
    image
        A picture to search for. May be given again, as may --audio, --like and --minus.
    audio
        A sound to search for.
    like
        The id of an item of the collection: more like this.
    minus
        A text that the hits should not be like.
    weight
        NAME=NUMBER, as in image=0.5: of text, image, audio, like or minus; 1 where nothing is said.
    to
        The modality to find: text, image or audio; all of them where nothing is said.
    where
        FIELD=VALUE: only items whose sample says so in its JSON. May be given again.
    top
        How many of each modality.
    fold
        Show near copies (cosine 0.98 and above) as one hit; --no-fold shows each.
    min_score
        Leave out hits below this cosine.
    json
        Print one JSON object a hit.
    in_
        Shards (.tar, .jsonl, .txt) to embed on the fly and search exactly, by the model of the run.
    run
        Where the model that made the collection is now, if it has moved.
    device
        cpu, cuda, or auto.
    """
    from ..search.query import parse_query, split_query

    if in_ is not None and not query:
        in_, query = split_query(in_)
        if not in_:
            raise UserError("--in names no shards: give .tar, .jsonl or .txt files")
    named = [("text", [query] if query else []), ("image", image), ("audio", audio), ("like", like), ("minus", minus)]
    weights = _weights(weight, [name for name, _ in named])
    kinds = {"like": "id", "minus": "text"}
    parts = [{kinds.get(n, n): value, "weight": weights.get(n, 1.0) * (-1 if n == "minus" else 1)}
             for n, values in named for value in values or ()]  # fmt: skip
    if not parts:
        raise UserError("name what to search for: a text, --image FILE, --audio FILE or --like ID")
    options = {"top": top, "to": to, "fold": fold, "min_score": min_score}
    if in_ is not None:
        _search_shards(index, in_, parse_query(parts), pairs(where), options, json, device)
    else:
        _search_index(index, parse_query(parts), pairs(where), options, json, run, device)


def _weights(given: list[str] | None, names: list[str]) -> dict[str, float]:
    weights = {}
    for one in given or []:
        name, _, number = one.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise UserError(f"--weight {one!r} is not NAME=NUMBER") from None
        if name not in names:
            raise UserError(f"--weight {one!r}: the names are {', '.join(names)}")
    return weights


def _search_index(place: str, query, where: dict, options: dict, json: bool, run: str, device: str) -> None:
    if (Path(place) / "checkpoints").is_dir():
        raise UserError(f"{place} is a run: name shards to search with --in, or embed them: mmfm embed {place} SHARDS "
                        "--out INDEX")  # fmt: skip
    from ..search.engine import render, search
    from ..search.index import open_index
    from ..search.query import ID, load_model

    index = open_index(place)
    try:
        only_ids = all(part.modality == ID for part in query.parts)
        model = None if only_ids else load_model(index, run, device)
        results = search(index, model, query, where=where, **options)
    finally:
        index.close()
    print("\n".join(map(dumps, results.rows())) if json else render(results))


def _search_shards(run: str, shards: list[str], query, where: dict, options: dict, json: bool, device: str) -> None:
    from ..corpus.shards import Config, Corpus
    from ..model import load
    from ..run_dir.records import Skipped
    from ..search.engine import render, search
    from ..search.memory import CorpusIndex

    model = load(run, device=device)
    index = CorpusIndex(model, Corpus(Config(shards, where=where), "in"))
    if index.skipped:
        print("\n".join(Skipped(index.skipped).lines()), file=sys.stderr)
    results = search(index, model, query, **options)

    def notes(found) -> list[str]:
        return index.notes(found.item, results.vector)

    rows = ({**row, "notes": index.notes(index.get([row["id"]])[0][0], results.vector)} for row in results.rows())
    print("\n".join(map(dumps, rows)) if json else render(results, notes))


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
