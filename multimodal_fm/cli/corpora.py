"""Makes and describes corpora: inspect and pack."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter

from ..errors import UserError, printable
from .app import app


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
    workers: int = 0,
    cluster: str = "",
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
    workers
        Processes that read shards which have no index yet, or with --verify all; 0: none but this one.
    cluster
        Read them on a Ray cluster: ray, auto, ray://HOST:10001 or HOST:6379. Under torchrun its ranks do.
    """
    from ..inspect.run import inspect as look

    settings = None
    if orders:
        from ..train.config import load

        if not config:
            raise UserError("--orders needs --config, whose tasks it shows")
        settings = load(config)
    more = {"tasks": settings.tasks, "heads": settings.model.heads} if settings else {}
    how = {"workers": workers, "cluster": cluster}
    return look(list(shards), config, html, verify, rebuild, json, samples, piece, **more, **how)


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
    cluster: str = "",
) -> None:
    """Make checked webdataset shards and a data card of what you have: `mmfm pack photos --to shards/photos`.

    A SOURCE is a folder of media (files of one stem are a sample: photo.jpg, photo.txt, photo.json; where all files are
    media, one folder down, the folders' names are labels), a table (.csv, .tsv, .parquet, or .jsonl with a column of
    images or audio or one named below), text (.jsonl, .txt), webdataset shards (.tar, .tar.gz, .tar.bz2, .tar.xz,
    .tar.zst), or a Hugging Face data set (a folder of save_to_disk, or hf:owner/name). Stopped at any time, the same
    command continues; the result does not depend on --workers, nor on the machines. Under torchrun its ranks do it.

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
        Processes, of each rank under torchrun; without it, one for each core. 0: none but this one.
    cluster
        Pack on a Ray cluster, whose machines see the sources and --to: ray (one that runs here or that RAY_ADDRESS
        names, else one of this machine), auto (one that runs), ray://HOST:10001 or HOST:6379.
    """
    from ..corpus import storage
    from ..pack import settings, summary
    from ..pack.run import pack as write

    size, shares = storage.parse_size(shard_size, "--shard-size"), settings.parse_split(split)
    chosen = settings.Settings(
        list(sources), image_column, text_column, audio_column, label_column, key_column, longest_side, rate,
        size, shares, group, dedup, piece_bytes, text_block, allow_outside, codes, codes_member,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    facts = write(chosen, to, max(1, cores) if workers is None else workers, show=True, cluster=cluster)
    if facts:  # on the first of several ranks
        print("\n".join(map(printable, summary(facts, to).split("\n"))))
