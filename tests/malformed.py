"""Malformed shards and files, each with what a careful reader makes of it: `python tests/malformed.py FOLDER`.

The bytes are the same every time. Every archive holds sound samples before (`a0`, `a1`) and after (`b0`, `b1`) the
damaged one (`hurt`). Nothing here reads with the package: the expectations are written down, not computed by it.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

SENTINEL = "malformed-sentinel"  # appears in the working directory where something that was read was also run
ESCAPE = "malformed-escape"  # is in every name that leads out of a folder
MB = 1_000_000


@dataclass(frozen=True)
class Case:
    """One malformed file and what must come of it.

    A refusal is (key, part, reason). An empty key or part is whatever the reader knows; `|` parts reasons of which any
    will do. The part is the member's ending where the archive is at fault, the kind (`text`, `image`, `audio`) where
    its content is.
    """

    name: str
    fault: int  # in the list of faults; 0: not in it
    path: str  # a file, or what a user might write in a file's place
    says: str
    healthy: dict[str, dict[str, bytes]]  # members by key that are delivered bit-identical
    refused: tuple[tuple[str, str, str], ...] = ()  # each counted once
    outcome: dict[str, str] = field(default_factory=dict)  # ok, partial or skip by damaged key, `|` as above
    opens: bool = True  # False: nothing is left, training on it alone ends with exit code 2 and its name
    may: tuple[tuple[str, str, str], ...] = ()  # may be counted as well
    damaged: dict[str, dict[str, bytes]] = field(default_factory=dict)  # whole in the archive, but not to be decoded
    loose: frozenset[str] = frozenset()  # keys of which more may be delivered than `healthy` says


RECIPES: dict[str, Callable[[Path], Case]] = {}
"""What writes a case's file into a folder, by the case's name."""


def make(folder: str | Path, part: slice = slice(None)) -> list[Case]:
    """Writes the files, or those of a part of the cases, into the folder, which is made where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [recipe(Path(folder)) for recipe in list(RECIPES.values())[part]]


# --- sound samples ---


def noise(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth picture with some noise, uint8 (height, width, channels)."""
    random_state = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = (rows * 3 + columns * 2 + 40 * seed)[..., None] + np.arange(channels) * 60
    return ((base + random_state.integers(0, 40, base.shape)) % 256).astype(np.uint8)


def picture(kind: str = "JPEG", seed: int = 1, size: tuple[int, int] = (48, 36), mode: str = "RGB", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(noise(seed, size[1], size[0])).convert(mode).save(data, kind, **options)
    return data.getvalue()


def sound(kind: str = "FLAC", seed: int = 1, seconds: float = 0.1, rate: int = 16_000, subtype: str = "") -> bytes:
    data = io.BytesIO()
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (300 + 40 * seed) * time) + 0.02 * np.random.default_rng(seed).normal(
        size=len(time)
    )
    soundfile.write(data, wave, rate, format=kind, subtype=subtype or None)
    return same_serial(data.getvalue()) if kind == "OGG" else data.getvalue()


def same_serial(ogg: bytes) -> bytes:
    """The pages with serial number 1: the encoder draws one at random."""
    pages, place = bytearray(ogg), 0
    while place < len(pages):
        segments = pages[place + 26]
        end = place + 27 + segments + sum(pages[place + 27 : place + 27 + segments])
        pages[place + 14 : place + 18] = struct.pack("<I", 1)
        pages[place + 22 : place + 26] = bytes(4)
        check = 0
        for byte in pages[place:end]:
            check = (check << 8 & 0xFFFFFFFF) ^ OGG_TABLE[check >> 24 ^ byte]
        pages[place + 22 : place + 26] = struct.pack("<I", check)
        place = end
    return bytes(pages)


def _ogg_row(value: int) -> int:
    value <<= 24
    for _ in range(8):
        value = value << 1 ^ (0x04C11DB7 if value >> 31 else 0)
    return value & 0xFFFFFFFF


OGG_TABLE = [_ogg_row(value) for value in range(256)]


@functools.cache
def sound_sample(key: str) -> dict[str, bytes]:
    seed = sum(key.encode())
    text = f"a sound sample called {key}"
    row = json.dumps({"number": seed, "source": "made"}).encode()
    return {"jpg": picture(seed=seed), "txt": text.encode(), "json": row, "flac": sound(seed=seed)}


BEFORE, AFTER = ("a0", "a1"), ("b0", "b1")


def samples(*keys: str) -> dict[str, dict[str, bytes]]:
    return {key: sound_sample(key) for key in keys}


def hurt(*without: str) -> dict[str, dict[str, bytes]]:
    """The damaged sample as it would be without some of its members."""
    return {"hurt": {ending: data for ending, data in sound_sample("hurt").items() if ending not in without}}


# --- tar, by hand ---

BLOCK = 512
END = bytes(2 * BLOCK)


def header(name: bytes, size: int = 0, kind: bytes = b"0", link: bytes = b"", **fields: bytes) -> bytes:
    """One ustar header with a right checksum. fields: `size_field`, `magic`, `prefix`, `check` as they shall stand."""
    size_field = fields.get("size_field", b"%011o\0" % (size % 8**11))
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field + b"00000000000\0" + b" " * 8 + kind
    block += link.ljust(100, b"\0") + fields.get("magic", b"ustar\x0000") + b"user".ljust(32, b"\0") * 2
    block += b"0000000\0" * 2 + fields.get("prefix", b"").ljust(155, b"\0")
    block = block.ljust(BLOCK, b"\0")
    assert len(block) == BLOCK
    return block[:148] + fields.get("check", b"%06o\0 " % sum(block)) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: str | bytes, data: bytes = b"", kind: bytes = b"0", **fields) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return header(raw, len(data), kind, **fields) + padded(data)


def record(key: str, value: bytes) -> bytes:
    """One record of a pax header: its length, which counts its own digits, the key and the value."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def pax(*records: tuple[str, bytes], kind: bytes = b"x") -> bytes:
    return member("PaxHeaders/note", b"".join(record(*r) for r in records), kind)


def whole(*keys: str) -> bytes:
    """The members of sound samples, one sample after the other."""
    return b"".join(member(f"{key}.{e}", data) for key in keys for e, data in sound_sample(key).items())


def around(middle: bytes, end: bytes = END) -> bytes:
    return whole(*BEFORE) + middle + whole(*AFTER) + end


def swapped(ending: str, piece: bytes) -> bytes:
    """The damaged sample with other bytes where one of its members, header and content, would be."""
    return b"".join(piece if e == ending else member(f"hurt.{e}", d) for e, d in sound_sample("hurt").items())


def flipped(data: bytes, place: int, mask: int = 4) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


# --- how a case is written down ---


def tar(
    name: str,
    fault: int,
    says: str,
    content: Callable[[], bytes],
    file: str = "",
    keep=BEFORE + AFTER,
    own=dict,
    **rest,
):
    """A shard: `content()` are its bytes, `own()` what is healthy besides the sound samples `keep`."""

    def recipe(folder: Path) -> Case:
        path = folder / (file or f"{name}.tar")
        path.write_bytes(content())
        return Case(name, fault, str(path), says, samples(*keep) | own(), **rest)

    _register(name, recipe)


def part(
    name: str,
    fault: int,
    says: str,
    ending: str,
    content: Callable[[], bytes],
    reason: str = "",
    may: str = "",
    beside: str | None = None,
):
    """A shard with one odd member. `reason`: why it is lost (empty: it is fine). `may`: why it may be lost.

    `beside`: the ending of the member next to it; empty: it is all alone.
    """
    kind = {"txt": "text", "json": "text", "flac": "audio", "wav": "audio", "ogg": "audio", "mp3": "audio"}.get(
        ending, "image"
    )
    beside = ("jpg" if kind == "text" else "txt") if beside is None else beside

    def recipe(folder: Path) -> Case:
        data = content()
        other = {beside: sound_sample("hurt")[beside]} if beside else {}
        middle = b"".join(member(f"hurt.{e}", d) for e, d in {ending: data, **other}.items())
        path = folder / f"{name}.tar"
        path.write_bytes(around(middle))
        sound_ones = samples(*BEFORE, *AFTER)
        lost = "partial" if beside else "skip"
        if reason:
            whole_ones = sound_ones | ({"hurt": other} if other else {})
            refused = (("hurt", kind, reason),)
            return Case(
                name, fault, str(path), says, whole_ones, refused, {"hurt": lost}, damaged={"hurt": {ending: data}}
            )
        outcome, allowed = (f"ok|{lost}", (("hurt", kind, may),)) if may else ("ok", ())
        own = {"hurt": {ending: data, **other}}
        return Case(name, fault, str(path), says, sound_ones | own, (), {"hurt": outcome}, may=allowed)

    _register(name, recipe)


def _register(name: str, recipe: Callable[[Path], Case]):
    assert name not in RECIPES, name
    RECIPES[name] = recipe


SHARD = (("", "", "shard"),)
NAME = (("", "", "name"),)
PARTIAL = {"hurt": "partial"}

# --- archives that are cut ---


def _cut(ending: str, more: int) -> bytes:
    """Everything up to `more` bytes behind the beginning of the damaged sample's member."""
    found = 0
    for e, data in sound_sample("hurt").items():
        if e == ending:
            break
        found += len(member("x", data))
    return around(whole("hurt"))[: len(whole(*BEFORE)) + found + more]


tar("sound", 0, "nothing is wrong with it", lambda: around(whole("hurt")), own=hurt, outcome={"hurt": "ok"})
tar("cut-inside-content", 1, "cut inside a member's content", lambda: _cut("flac", BLOCK + 700), keep=BEFORE,
    own=lambda: hurt("flac"), refused=(("hurt", "flac", "shard"),), outcome=PARTIAL)  # fmt: skip
tar("cut-inside-header", 1, "cut inside a member's header", lambda: _cut("json", 200), keep=BEFORE,
    own=lambda: hurt("json", "flac"), refused=SHARD, outcome={"hurt": "ok|partial"})  # fmt: skip
tar("cut-inside-first", 1, "cut inside the very first member", lambda: whole("a0")[:900], keep=(),
    refused=(("a0", "jpg", "shard"),), outcome={"a0": "skip"}, opens=False)  # fmt: skip
tar("cut-between-samples", 2, "cut before a sample's first header", lambda: _cut("jpg", 0), keep=BEFORE, refused=SHARD)
tar("cut-between-members", 2, "cut before a member's header, within a sample", lambda: _cut("flac", 0), keep=BEFORE,
    own=lambda: hurt("flac"), refused=SHARD, outcome={"hurt": "ok|partial"})  # fmt: skip
tar("no-end", 2, "no end-of-archive blocks, nothing else", lambda: around(whole("hurt"), b""), own=hurt,
    refused=SHARD, outcome={"hurt": "ok"})  # fmt: skip
tar("half-an-end", 0, "one end-of-archive block where two should be", lambda: around(whole("hurt"), bytes(BLOCK)),
    own=hurt, may=SHARD, outcome={"hurt": "ok"})  # fmt: skip
tar("long-end", 0, "twenty end-of-archive blocks, as tar pads", lambda: around(whole("hurt"), bytes(20 * BLOCK)),
    own=hurt, outcome={"hurt": "ok"})  # fmt: skip
tar("rubbish-after-end", 0, "random bytes after the end",
    lambda: around(whole("hurt")) + random.Random(1).randbytes(3000),
    own=hurt, may=SHARD, outcome={"hurt": "ok"})  # fmt: skip
tar("two-archives", 0, "two archives one after the other: the second is not read",
    lambda: whole(*BEFORE, "hurt") + END + whole(*AFTER) + END, keep=BEFORE, own=hurt, refused=SHARD,
    outcome={"hurt": "ok"})  # fmt: skip
tar("header-of-zeros", 3, "a header overwritten with zeros reads as the end",
    lambda: around(swapped("json", bytes(BLOCK))), keep=BEFORE,
    own=lambda: hurt("json", "flac"), refused=SHARD, outcome={"hurt": "ok|partial"})  # fmt: skip
tar("only-an-end", 6, "an archive without members", lambda: END, keep=(), opens=False, may=(("", "", "shard|empty"),))

# --- damaged headers ---


def _flipped_header(place: int, ending: str = "txt") -> bytes:
    return around(swapped(ending, flipped(member(f"hurt.{ending}", sound_sample("hurt")[ending]), place)))


for _field, _place in {
    "name": 2,
    "mode": 104,
    "size": 131,
    "time": 140,
    "checksum": 150,
    "type": 156,
    "magic": 259,
}.items():
    tar(f"flip-{_field}", 3, f"one bit of a header's {_field} flipped", functools.partial(_flipped_header, _place),
        own=lambda: hurt("txt"), refused=SHARD, outcome=PARTIAL)  # fmt: skip
tar("flip-large", 3, "one bit of the header of a member of many blocks flipped", lambda: _flipped_header(5, "flac"),
    own=lambda: hurt("flac"), refused=SHARD, outcome=PARTIAL)  # fmt: skip
tar("flip-first", 3, "one bit of the very first header flipped",
    lambda: flipped(around(whole("hurt")), 1), keep=("a1", *AFTER), refused=SHARD,
    outcome={"hurt": "ok", "a0": "partial"},
    own=lambda: hurt() | {"a0": {e: d for e, d in sound_sample("a0").items() if e != "jpg"}})  # fmt: skip
tar("flip-three", 3, "three headers damaged, one in each of three samples",
    lambda: b"".join(flipped(whole(key), 0) for key in ("a0", "hurt", "b0")) + whole("b1") + END, keep=("b1",),
    own=lambda: {k: {e: d for e, d in sound_sample(k).items() if e != "jpg"} for k in ("a0", "hurt", "b0")},
    refused=SHARD * 3, outcome=dict.fromkeys(("a0", "hurt", "b0"), "partial"))  # fmt: skip
tar("header-of-noise", 3, "a header overwritten with random bytes",
    lambda: around(swapped("txt", random.Random(2).randbytes(BLOCK) + padded(sound_sample("hurt")["txt"]))),
    own=lambda: hurt("txt"), refused=SHARD, outcome=PARTIAL)  # fmt: skip


def _odd_size(size_field: bytes) -> bytes:
    text = sound_sample("hurt")["txt"]
    return around(swapped("txt", header(b"hurt.txt", size_field=size_field) + padded(text)))


for _name, _says, _field in (
    ("size-base256-huge", "a base-256 size of 2^80", b"\x80" + (2**80).to_bytes(11, "big")),
    ("size-base256-negative", "a base-256 size of -1024", b"\xff" + (2**88 - 1024).to_bytes(11, "big")),
    ("size-garbage", "a size that is no number", b"0000012x456\0"),
    ("size-minus", "a size with a minus sign", b"-0000001000\0"),
    ("size-underscore", "a size as Python, not tar, would read it", b"0o00_000_10\0"),
    ("size-past-end", "a size larger than the file", b"00004000000\0"),
    ("size-5-GB", "a size of 5 GB in a file of some KB", b"%011o\0" % (5 * 10**9)),
):
    tar(_name, 3, _says, functools.partial(_odd_size, _field), own=lambda: hurt("txt"),
        refused=(("", "", "shard"),), outcome=PARTIAL)  # fmt: skip
tar("size-base256-fine", 0, "a small size in base 256, as GNU tar may write it",
    lambda: _odd_size(b"\x80" + len(sound_sample("hurt")["txt"]).to_bytes(11, "big")), own=hurt,
    outcome={"hurt": "ok"})  # fmt: skip


def _lying_size(change: int) -> bytes:
    data = sound_sample("hurt")["jpg"]
    return around(swapped("jpg", header(b"hurt.jpg", len(data) + change) + padded(data)))


tar("size-too-small", 3, "a size 600 bytes too small: the next header is not where it should be",
    lambda: _lying_size(-600), own=lambda: hurt("jpg"), refused=(("", "", "shard"), ("hurt", "image", "decode")),
    outcome=PARTIAL, damaged={"hurt": {}}, loose=frozenset(["hurt"]))  # fmt: skip


def _swallowing() -> bytes:
    """The picture's content is one block; its size also covers the text's header and the first blocks of the text."""
    swallowed = (
        header(b"hurt.jpg", 5 * BLOCK + 100) + padded(b"\xff\xd8\xff" * 50) + member("hurt.txt", b"plain text " * 512)
    )
    rest = (member(f"hurt.{e}", sound_sample("hurt")[e]) for e in ("json", "flac"))
    return around(swallowed + b"".join(rest))


tar("size-too-large", 3, "a size that swallows the next header and ends inside its content", _swallowing,
    own=lambda: hurt("jpg", "txt"), refused=(("", "", "shard"), ("hurt", "image", "decode")), outcome=PARTIAL,
    loose=frozenset(["hurt"]))  # fmt: skip

# --- what is no archive ---

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>" + b"<p>no such object</p>\n" * 400


def _zipped(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


for _name, _fault, _says, _content in (
    ("zero-bytes", 6, "a shard of no bytes", lambda: b""),
    ("html", 7, "an error page saved as a shard", lambda: HTML),
    ("short", 6, "a shard of ten bytes", lambda: b"not a tar."),
    ("gzip", 0, "a compressed archive under a plain name", lambda: gzip.compress(around(whole("hurt")), mtime=0)),
    ("zip", 0, "a zip archive under a tar's name", lambda: _zipped("hurt.txt", b"text")),
    ("noise", 0, "random bytes", lambda: random.Random(3).randbytes(20_000)),
):
    tar(f"shard-{_name}", _fault, _says, _content, keep=(), refused=SHARD, opens=False)
tar("compressed", 0, "an honest .tar.gz: no random access, refused before anything is read",
    lambda: gzip.compress(around(whole("hurt")), mtime=0), file="compressed.tar.gz", keep=(), opens=False)  # fmt: skip

# --- keys and parts that come again ---

tar("key-twice-adjacent", 11, "a sample's members all twice in a row", lambda: around(whole("hurt", "hurt")),
    own=hurt, refused=tuple(("hurt", e, "duplicate") for e in ("jpg", "txt", "json", "flac")),
    outcome={"hurt": "ok|partial"})  # fmt: skip
tar("key-again", 12, "a key that comes again after other samples, with another part: all of it is left out",
    lambda: whole(*BEFORE) + member("hurt.txt", b"the first") + whole("b0") + member("hurt.jpg", picture())
    + member("hurt.txt", b"the second") + whole("b1") + END,
    own=lambda: {"hurt": {"txt": b"the first"}}, refused=(("hurt", "", "duplicate"),),
    outcome={"hurt": "ok|partial"})  # fmt: skip


def _by_ending() -> bytes:
    keys = (*BEFORE, *AFTER)
    return b"".join(member(f"{k}.{e}", sound_sample(k)[e]) for e in sound_sample("a0") for k in keys) + END


tar("sorted-by-ending", 13, "members sorted by ending: no sample's lie together", _by_ending, keep=(),
    own=lambda: {key: {"jpg": sound_sample(key)["jpg"]} for key in BEFORE + AFTER},
    refused=tuple((key, "", "duplicate") for key in BEFORE + AFTER) * 3,
    outcome=dict.fromkeys(BEFORE + AFTER, "ok|partial"))  # fmt: skip
tar("part-twice", 14, "two pictures under one name: the first one counts",
    lambda: around(member("hurt.jpg", sound_sample("hurt")["jpg"]) + member("hurt.jpg", picture(seed=9))
                   + member("hurt.txt", b"two pictures")),
    own=lambda: {"hurt": {"jpg": sound_sample("hurt")["jpg"], "txt": b"two pictures"}},
    refused=(("hurt", "jpg", "duplicate"),), outcome={"hurt": "ok|partial"})  # fmt: skip
tar("part-twice-by-case", 14, "x.jpg and x.JPG are one part",
    lambda: around(member("hurt.jpg", sound_sample("hurt")["jpg"]) + member("hurt.JPG", picture(seed=9))),
    own=lambda: {"hurt": {"jpg": sound_sample("hurt")["jpg"]}}, refused=(("hurt", "jpg", "duplicate"),),
    outcome={"hurt": "ok|partial"})  # fmt: skip

# --- names and types that no sample has ---


def _beside(piece: bytes) -> bytes:
    """The damaged sample as it should be, and a stranger after it."""
    return around(whole("hurt") + piece)


OK = {"hurt": "ok"}
PHOTO = picture(seed=7)
for _name, _says, _piece in (
    ("climbs", "../ in front", member(f"../{ESCAPE}.jpg", PHOTO)),
    ("climbs-inside", "../ in the middle", member(f"x/../../{ESCAPE}.jpg", PHOTO)),
    ("climbs-backwards", "..\\ in front, as another system climbs", member(f"..\\{ESCAPE}.jpg", PHOTO)),
    ("absolute", "a name from the root", member(f"/tmp/{ESCAPE}.jpg", PHOTO)),
    ("absolute-by-prefix", "the root in ustar's prefix field", member(f"{ESCAPE}.jpg", PHOTO, prefix=b"/tmp")),
    ("not-utf8", "a name that is not UTF-8", member(f"{ESCAPE}-caf\xe9.jpg".encode("latin-1"), PHOTO)),
    ("nul", "a NUL in the name, by pax", pax(("path", b"evil\0.txt.jpg")) + member("evil.jpg", PHOTO)),
    ("4-KB", "a name of 4 KB, by pax", pax(("path", b"n" * 4096 + b".jpg")) + member("long.jpg", PHOTO)),
    ("pax-climbs", "a harmless name that pax changes to ../", pax(("path", f"../{ESCAPE}.jpg".encode()))
     + member("stranger.jpg", PHOTO)),
    ("gnu-climbs", "a harmless name that a GNU long name changes to ../",
     member("././@LongLink", f"../{ESCAPE}.jpg\0".encode(), b"L") + member("stranger.jpg", PHOTO)),
    ("symlink", "a symbolic link", member("stranger.jpg", b"", b"2", link=b"/etc/passwd")),
    ("hardlink", "a hard link", member("stranger.jpg", b"", b"1", link=b"a0.jpg")),
    ("character-device", "a character device", member("stranger.jpg", b"", b"3")),
    ("block-device", "a block device", member("stranger.jpg", b"", b"4")),
    ("fifo", "a pipe", member("stranger.jpg", b"", b"6")),
    ("sparse", "a GNU sparse file", member("stranger.jpg", PHOTO, b"S", magic=b"ustar  \0")),
    ("pax-sparse", "a sparse file by pax", pax(("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"),
     ("GNU.sparse.name", b"stranger.jpg"), ("GNU.sparse.realsize", b"99999999999")) + member("stranger.jpg", PHOTO)),
    ("unknown-type", "a type that nobody knows", member("stranger.jpg", PHOTO, b"Z")),
):  # fmt: skip
    tar(f"name-{_name}", 16, _says, functools.partial(_beside, _piece), own=hurt, refused=NAME, outcome=OK)
tar("name-link-in-sample", 16, "a symbolic link in place of one of the sample's members",
    lambda: around(swapped("txt", member("hurt.txt", b"", b"2", link=b"a0.txt"))), own=lambda: hurt("txt"),
    refused=NAME, outcome={"hurt": "ok|partial"})  # fmt: skip
tar("name-link-then-file", 16, "a link out of the folder, then a file through it",
    lambda: _beside(member("out", b"", b"2", link=b"../..") + member(f"out/{ESCAPE}.jpg", PHOTO)),
    own=lambda: hurt() | {f"out/{ESCAPE}": {"jpg": PHOTO}}, refused=NAME, outcome=OK)  # fmt: skip

for _name, _says, _piece in (
    ("empty", "no name at all", member("", PHOTO)),
    ("only-ending", "a name that is all ending", member(".jpg", PHOTO)),
    ("only-ending-in-folder", "the same in a folder", member("folder/.jpg", PHOTO)),
    ("no-ending", "a name without an ending", member("README", b"read me")),
    ("dot-at-end", "a name that ends with its dot", member("stranger.", PHOTO)),
    ("macos", "what macOS leaves beside each file", member("._hurt.jpg", b"\0\5\x16\7" + bytes(200))),
    ("nul-in-field", "rubbish behind the NUL that ends a name", member(b"stranger\0.jpg", PHOTO)),
):
    tar(f"name-{_name}", 16, f"{_says}: no member of a sample, passed over", functools.partial(_beside, _piece),
        own=hurt, outcome=OK, may=NAME)  # fmt: skip
tar("directories", 0, "directories as members",
    lambda: around(member("x/", b"", b"5") + member("x/y", b"", b"5") + member("x/y/hurt.jpg", PHOTO) + member("z/")),
    own=lambda: {"x/y/hurt": {"jpg": PHOTO}}, outcome={"x/y/hurt": "ok"})  # fmt: skip
tar("upper-case", 0, "endings in capitals", lambda: around(member("hurt.JPG", PHOTO) + member("hurt.Txt", b"capitals")),
    own=lambda: {"hurt": {"jpg": PHOTO, "txt": b"capitals"}}, outcome=OK)  # fmt: skip
tar("name-backslash", 16, "a backslash in a name is a character",
    lambda: around(member("folder\\hurt.jpg", PHOTO)), own=lambda: {"folder\\hurt": {"jpg": PHOTO}},
    outcome={"folder\\hurt": "ok"})  # fmt: skip
tar("name-shell", 18, "a name that a shell would run",
    lambda: around(member(f"$(touch {SENTINEL})`touch {SENTINEL}`;hurt.jpg", PHOTO)),
    own=lambda: {f"$(touch {SENTINEL})`touch {SENTINEL}`;hurt": {"jpg": PHOTO}},
    outcome={f"$(touch {SENTINEL})`touch {SENTINEL}`;hurt": "ok"})  # fmt: skip
SCRIPTS = "d\u00e9j\u00e0/\u65e5\u672c\u8a9e"
tar("name-unicode", 0, "a name in other scripts", lambda: around(member(f"{SCRIPTS}.jpg", PHOTO)),
    own=lambda: {SCRIPTS: {"jpg": PHOTO}}, outcome={SCRIPTS: "ok"})  # fmt: skip

# --- long names, old formats, pax ---

LONG = "folder/" * 30 + "hurt"
tar("gnu-long-name", 0, "a GNU long name of 200 characters",
    lambda: around(member("././@LongLink", f"{LONG}.jpg\0".encode(), b"L", magic=b"ustar  \0")
                   + member("x.jpg", PHOTO)),
    own=lambda: {LONG: {"jpg": PHOTO}}, outcome={LONG: "ok"})  # fmt: skip
tar("pax-long-name", 0, "a pax path of 200 characters",
    lambda: around(pax(("mtime", b"1.5"), ("path", f"{LONG}.jpg".encode())) + member("x.jpg", PHOTO)),
    own=lambda: {LONG: {"jpg": PHOTO}}, outcome={LONG: "ok"})  # fmt: skip
tar("ustar-prefix", 0, "a name in two fields, as ustar has it",
    lambda: around(member("hurt.jpg", PHOTO, prefix=b"folder")),
    own=lambda: {"folder/hurt": {"jpg": PHOTO}}, outcome={"folder/hurt": "ok"})  # fmt: skip
tar("before-ustar", 0, "headers without the word ustar, as tar wrote until 1988",
    lambda: around(member("hurt.jpg", PHOTO, b"\0", magic=bytes(8))
                   + member("hurt.txt", b"old", b"\0", magic=bytes(8))),
    own=lambda: {"hurt": {"jpg": PHOTO, "txt": b"old"}}, outcome=OK)  # fmt: skip
tar("pax-global", 0, "a global pax header with a comment, as git writes",
    lambda: pax(("comment", b"0123456789abcdef"), kind=b"g") + around(whole("hurt")), own=hurt, outcome=OK)  # fmt: skip
tar("pax-global-path", 16, "a global pax header that would give every member one name: not obeyed",
    lambda: whole(*BEFORE) + pax(("path", f"../{ESCAPE}.jpg".encode()), kind=b"g") + whole("hurt", *AFTER) + END,
    own=hurt, outcome=OK)  # fmt: skip


def _with_pax(piece: bytes) -> bytes:
    """The text of the damaged sample behind a pax header; the name that it would have without it is another."""
    return around(swapped("txt", piece + member("wrong.txt", sound_sample("hurt")["txt"])))


PATH = ("path", b"hurt.txt")
tar("pax-size", 0, "a pax header that gives the size where the field is zero, as for 9 GB",
    lambda: around(swapped("txt", pax(("size", b"%d" % len(sound_sample("hurt")["txt"])), PATH)
                           + header(b"wrong.txt") + padded(sound_sample("hurt")["txt"]))),
    own=hurt, outcome=OK)  # fmt: skip
tar("pax-size-past-end", 3, "a pax header that claims 9 GB", lambda: _with_pax(pax(("size", b"9000000000"), PATH)),
    own=lambda: hurt("txt"), refused=SHARD, outcome=PARTIAL)  # fmt: skip
tar("pax-size-negative", 3, "a pax header that claims a negative size", lambda: _with_pax(pax(("size", b"-512"), PATH)),
    own=lambda: hurt("txt"), refused=SHARD, outcome=PARTIAL)  # fmt: skip
tar("pax-size-word", 3, "a pax header whose size is a word", lambda: _with_pax(pax(("size", b"large"), PATH)),
    own=lambda: hurt("txt"), refused=SHARD, outcome=PARTIAL)  # fmt: skip
tar("pax-broken-length", 3, "a pax record that claims to be longer than its header",
    lambda: _with_pax(member("PaxHeaders/note", b"999 path=hurt.txt\n", b"x")), own=lambda: hurt("txt"),
    refused=(("", "", "shard|name"),), outcome=PARTIAL)  # fmt: skip
tar("pax-no-length", 3, "a pax record without a length",
    lambda: _with_pax(member("PaxHeaders/note", b"path=hurt.txt\n", b"x")), own=lambda: hurt("txt"),
    refused=(("", "", "shard|name"),), outcome=PARTIAL)  # fmt: skip
tar("pax-bomb", 0, "a pax header of 32 MB: refused with the member that it names",
    lambda: _with_pax(pax(("comment", b"A" * (32 * MB)), PATH)), own=lambda: hurt("txt"),
    refused=(("", "", "shard|name"),), outcome=PARTIAL)  # fmt: skip
tar("pax-many-records", 0, "a pax header of 400,000 records: refused with the member that it names",
    lambda: _with_pax(member("PaxHeaders/note", record("a", b"b") * 400_000 + record(*PATH), b"x")),
    own=lambda: hurt("txt"), refused=(("", "", "shard|name"),), outcome=PARTIAL)  # fmt: skip
tar("gnu-bomb", 0, "a GNU long name of 32 MB: refused with the member that it names",
    lambda: _with_pax(member("././@LongLink", b"n" * (32 * MB), b"L")), own=lambda: hurt("txt"),
    refused=(("", "", "shard|name"),), outcome=PARTIAL)  # fmt: skip
tar("pax-past-end", 1, "a pax header that claims 3 GB of records",
    lambda: around(swapped("txt", header(b"PaxHeaders/note", 3 * 10**9, b"x")
                           + member("hurt.txt", sound_sample("hurt")["txt"]))),
    own=lambda: hurt("txt"), refused=SHARD, outcome={"hurt": "ok|partial"}, loose=frozenset(["hurt"]))  # fmt: skip
tar("pax-chain", 0, "2,000 pax headers in a row, none with a member of its own: the last one counts",
    lambda: _with_pax(pax(("path", b"other.txt")) * 2000 + pax(PATH)), own=hurt, outcome=OK,
    may=(("", "", "shard|name"),))  # fmt: skip

# --- an archive as a member: its own members are no samples ---


def _inside() -> bytes:
    return member("smuggled.txt", b"of the archive inside") + member("smuggled.jpg", PHOTO) + END


tar("archive-inside", 0, "an archive as a member: bytes, not samples", lambda: around(member("hurt.tar", _inside())),
    own=lambda: {"hurt": {"tar": _inside()}}, outcome={"hurt": "skip"},
    may=(("hurt", "", "empty"),))  # fmt: skip
tar("archive-inside-flipped", 3, "the same with a flipped bit in the name: its members still are no samples",
    lambda: around(member("hurt.txt", b"before it") + flipped(member("hurt.tar", _inside()), 2)),
    own=lambda: {"hurt": {"txt": b"before it"}}, refused=SHARD, outcome={"hurt": "ok|partial"})  # fmt: skip
tar("part-missing", 19, "text alone among those that have all", lambda: around(member("hurt.txt", b"alone")),
    own=lambda: {"hurt": {"txt": b"alone"}}, outcome=OK)  # fmt: skip

# --- members that are never opened ---


class Bomb:
    """Unpickled, it makes a folder in the working directory."""

    def __reduce__(self):
        return os.mkdir, (SENTINEL,)


def _extra(ending: str, data: bytes) -> bytes:
    return around(whole("hurt") + member(f"hurt.{ending}", data))


def _npz(size: int) -> bytes:
    data = io.BytesIO()
    np.savez_compressed(data, big=np.zeros(size, np.uint8))
    return data.getvalue()


for _name, _fault, _ending, _says, _content in (
    ("pyd", 17, "pyd", "a pickle, under the ending that webdataset unpickles", lambda: pickle.dumps(Bomb())),
    ("pkl", 17, "pkl", "a pickle", lambda: pickle.dumps(Bomb())),
    ("pth", 17, "pth", "a pickle under PyTorch's ending", lambda: pickle.dumps(Bomb(), protocol=2)),
    ("npz-bomb", 32, "npz", "an .npz of 64 MB of zeros", lambda: _npz(64 * MB)),
    ("npy-object", 17, "npy", "an .npy whose content is a pickle",
     lambda: b"\x93NUMPY\1\0v\0" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
     + pickle.dumps([Bomb()])),
    ("gzip-bomb", 32, "txt.gz", "a text of 100 MB in 100 KB of gzip",
     lambda: gzip.compress(bytes(100 * MB), 6, mtime=0)),
    ("zip-bomb", 32, "zip", "a zip archive of 64 MB of zeros", lambda: _zipped("zeros", bytes(64 * MB))),
):  # fmt: skip
    _content = functools.cache(_content)
    tar(f"extra-{_name}", _fault, f"{_says}: delivered as bytes, never opened",
        lambda e=_ending, c=_content: _extra(e, c()),
        own=lambda e=_ending, c=_content: {"hurt": {**sound_sample("hurt"), e: c()}}, outcome=OK)  # fmt: skip

# --- text ---

part("text-empty", 20, "a text of no bytes", "txt", lambda: b"", "empty")
part("text-blank", 20, "spaces, tabs and line ends", "txt", lambda: b" \t\r\n\xc2\xa0\n" * 20, "empty")
part("text-empty-alone", 20, "a text of no bytes and nothing else", "txt", lambda: b"", "empty", beside="")
part("text-100k", 21, "100,000 characters", "txt", lambda: "long text \u00e4\u65e5 ".encode() * 8000)
part("text-one-letter", 21, "100,000 times one letter", "txt", lambda: b"a" * 100_000)
part(
    "text-not-utf8", 22, "bytes that are not UTF-8", "txt", lambda: b"good until here \xc3\x28 \xff\xfe", "text-decode"
)
part("text-latin1", 22, "Latin-1", "txt", lambda: "une id\u00e9e, d\u00e9j\u00e0 vue".encode("latin-1"), "text-decode")
part(
    "text-utf16",
    22,
    "UTF-16 with its mark",
    "txt",
    lambda: b"\xff\xfe" + "two bytes".encode("utf-16-le"),
    "text-decode",
)
part("text-cut-character", 22, "cut inside a character", "txt", lambda: "caf\u00e9".encode()[:-1], "text-decode")
part(
    "text-surrogate-bytes",
    22,
    "half a surrogate pair as bytes",
    "txt",
    lambda: b"half \xed\xa0\x80 pair",
    "text-decode",
)
part("text-overlong", 22, "a slash in two bytes where one would do", "txt", lambda: b"over\xc0\xaflong", "text-decode")
part("text-nul", 22, "NUL characters", "txt", lambda: b"zero\0and\0zero")
part("text-bom", 22, "UTF-8 with a byte order mark", "txt", lambda: b"\xef\xbb\xbfmarked")
part("text-controls", 22, "control and bidirectional characters", "txt", lambda: "\x1b[2J\u202eback\u0007".encode())
part("text-picture", 22, "a JPEG under the name of a text", "txt", lambda: PHOTO, "text-decode")

part("json-broken", 0, "JSON that ends too early", "json", lambda: b'{"caption": "a picture", ', "json")
part("json-empty", 0, "JSON of no bytes", "json", lambda: b"", "json|empty")
part("json-html", 0, "an error page under JSON's name", "json", lambda: HTML, "json")
part("json-deep", 0, "100,000 brackets inside each other", "json", lambda: b"[" * 100_000 + b"]" * 100_000, "json")
part("json-deep-objects", 0, "100,000 maps inside each other", "json",
     lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "json")  # fmt: skip
part("json-big-number", 0, "a number of 100,000 digits", "json",
     lambda: b'{"caption": "x", "n": ' + b"9" * 100_000 + b"}", "json")  # fmt: skip
part("json-not-utf8", 22, "a caption that is not UTF-8", "json", lambda: b'{"caption": "caf\xe9"}', "json|text-decode")
part(
    "json-list",
    0,
    "a list where a map should be: it holds no caption",
    "json",
    lambda: b'["a caption"]',
    may="json|empty",
)
part("json-string", 0, "a string where a map should be", "json", lambda: b'"a caption"', may="json|empty")
part("json-null-caption", 0, "a caption that is null", "json", lambda: b'{"caption": null}', may="json|empty")
part("json-number-caption", 0, "a caption that is a number", "json", lambda: b'{"caption": 7}', may="json|empty")
part("json-blank-caption", 20, "a caption of spaces", "json", lambda: b'{"caption": "   "}', "empty")
part("json-same-key", 0, "one key twice: the last one counts", "json", lambda: b'{"caption": "one", "caption": "two"}')
part("json-nan", 0, "NaN and Infinity, which are not JSON", "json",
     lambda: b'{"caption": "x", "a": NaN, "b": -Infinity}', may="json")  # fmt: skip
part("json-surrogate", 22, "half a surrogate pair, escaped", "json", lambda: b'{"caption": "half \\ud83d of it"}')
part("json-bom", 22, "JSON with a byte order mark", "json", lambda: b'\xef\xbb\xbf{"caption": "marked"}')
part("json-10-MB", 21, "a caption of 10 MB", "json", lambda: b'{"caption": "' + b"many words " * 900_000 + b'"}',
     may="byte-limit")  # fmt: skip

# --- pictures ---


def _entropy(data: bytes) -> int:
    """Where the coded pixels of a JPEG begin."""
    start = data.rindex(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def _large(**options) -> bytes:
    return picture(seed=3, size=(256, 200), quality=90, **options)


def _noisy_scan() -> bytes:
    data, start = _large(), _entropy(_large())
    middle = (start + len(data)) // 2
    return data[:middle] + bytes(random.Random(4).choices(range(255), k=400)) + data[middle + 400 :]


def _without_tables() -> bytes:
    """Its quantisation and Huffman tables overwritten with zeros."""
    data = bytearray(_large())
    for mark in (b"\xff\xdb", b"\xff\xc4"):
        start = data.index(mark)
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        data[start + 4 : start + 2 + length] = b"\xee" * (length - 2)
    return bytes(data)


def _jpeg_of(width: int, height: int, length: int) -> bytes:
    """A JPEG of `length` bytes in all whose header announces width x height."""
    data = picture(size=(8, 8), mode="L", quality=30, optimize=True)
    start = data.index(b"\xff\xc0")
    data = data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]
    more = length - len(data)
    return data[:2] + b"\xff\xfe" + struct.pack(">H", more - 2) + b"c" * (more - 4) + data[2:]


def chunk(kind: bytes, data: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + data) if check is None else check
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _png(
    *between: bytes, wrong: bytes = b"", size: tuple[int, int] = (16, 16), rows: bytes | None = None, depth: int = 8
):
    """A grey PNG with chunks between its header and its pixels; `wrong`: the chunk whose checksum is not right."""
    rows = b"".join(b"\0" + bytes(range(i, i + size[0])) for i in range(size[1])) if rows is None else rows
    pieces = {b"IHDR": struct.pack(">IIBBBBB", *size, depth, 0, 0, 0, 0), b"IDAT": zlib.compress(rows, 9), b"IEND": b""}
    made = {kind: chunk(kind, data, 12345 if kind == wrong else None) for kind, data in pieces.items()}
    return b"\x89PNG\r\n\x1a\n" + made[b"IHDR"] + b"".join(between) + made[b"IDAT"] + made[b"IEND"]


def _tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    """A little-endian TIFF of nothing but its directory: (tag, type, count, value) each."""
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + rows + bytes(4) + bytes(64)


def _shape(width: int, height: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]


def _frames(kind: str, count: int, **options) -> bytes:
    shots = [Image.fromarray(noise(i, 24, 32, 1)[..., 0]) for i in range(count)]
    data = io.BytesIO()
    shots[0].save(data, kind, save_all=True, append_images=shots[1:], **options)
    return data.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def _16_bit() -> bytes:
    data = io.BytesIO()
    Image.fromarray(noise(5, 20, 30, 1)[..., 0].astype(np.uint16) * 257).save(data, "PNG")
    return data.getvalue()


def _palette() -> bytes:
    data = io.BytesIO()
    Image.fromarray(noise(6, 20, 30)).quantize(16).save(data, "PNG", transparency=3)
    return data.getvalue()


def _cut_to(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><image href="file:///etc/passwd"/></svg>'

part("jpeg-scan", 23, "random bytes among the coded pixels", "jpg", _noisy_scan, "decode")
part("jpeg-tables", 23, "its tables overwritten", "jpg", _without_tables, "decode")
part("jpeg-alone", 23, "a broken JPEG and nothing else in the sample", "jpg", _without_tables, "decode", beside="")
part("jpeg-half", 24, "the first half of a JPEG", "jpg", lambda: _cut_to(_large(), 0.5), "decode")
part("jpeg-nearly", 24, "a JPEG without its last 400 bytes", "jpg", lambda: _large()[:-400], "decode")
part("jpeg-ends-early", 24, "half the pixels, then a proper end: the rest would be grey", "jpg",
     lambda: _cut_to(_large(), 0.5).rstrip(b"\xff") + b"\xff\xd9", "decode")  # fmt: skip
part("jpeg-progressive-half", 24, "the first half of a progressive JPEG", "jpg",
     lambda: _cut_to(_large(progressive=True), 0.5), "decode")  # fmt: skip
part(
    "jpeg-header-only", 24, "a JPEG cut where its pixels begin", "jpg", lambda: _large()[: _entropy(_large())], "decode"
)
part("jpeg-three-bytes", 24, "a JPEG's first three bytes", "jpg", lambda: b"\xff\xd8\xff", "decode")
part(
    "jpeg-65000",
    27,
    "335 bytes that announce 65,000 x 65,000",
    "jpg",
    lambda: _jpeg_of(65_000, 65_000, 335),
    "pixel-limit",
)
part("jpeg-65500-by-1", 25, "a picture of 65,500 x 1", "jpg", lambda: picture(size=(65_500, 1)))
part("jpeg-no-pixels", 24, "a JPEG of 0 x 8", "jpg", lambda: _jpeg_of(0, 8, 335), "decode|empty")
part("jpeg-cmyk", 25, "CMYK", "jpg", lambda: picture(mode="CMYK"))
part("jpeg-grey", 25, "grey", "jpg", lambda: picture(mode="L"))
part("jpeg-rotated", 25, "turned by its EXIF", "jpg", _rotated)
part("jpeg-1-by-1", 25, "one pixel", "jpg", lambda: picture(size=(1, 1)))
part("jpeg-rubbish-behind", 25, "100 KB of rubbish behind the end", "jpg", lambda: PHOTO + bytes(100_000))
part("image-zero-bytes", 24, "a picture of no bytes", "jpg", lambda: b"", "decode|empty")
part("image-html", 24, "an error page under a picture's name", "jpg", lambda: HTML, "decode")
part("image-svg", 24, "a drawing that names other files, under .png", "png", lambda: SVG, "decode")
part("image-eps", 24, "PostScript, which would be run, under .png", "png",
     lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + SENTINEL.encode() + b") (w) file\n%%EOF\n",
     "decode")  # fmt: skip
part("png-as-jpg", 0, "a PNG under .jpg", "jpg", lambda: picture("PNG"))
part("gif-200", 31, "200 frames under .jpg: the first one counts", "jpg", lambda: _frames("GIF", 200))
part("gif-bomb", 31, "a GIF screen of 65,535 x 65,535", "jpg",
     lambda: b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
     "pixel-limit")  # fmt: skip
part("png-animated", 31, "an animated PNG: the first frame counts", "png", lambda: _frames("PNG", 5))
part("png-bomb", 26, "20,000 x 20,000 pixels in some KB", "png",
     lambda: _png(size=(20_000, 20_000), rows=bytes(20_000 * 2501), depth=1), "pixel-limit")  # fmt: skip
part("png-unlimited", 26, "2^31-1 x 2^31-1 pixels announced", "png",
     lambda: _png(size=(2**31 - 1, 2**31 - 1), rows=b"\0"), "pixel-limit|decode")  # fmt: skip
part("png-no-pixels", 26, "a PNG of 0 x 16", "png", lambda: _png(size=(0, 16), rows=bytes(16)), "decode|empty")
part("png-16-bit", 25, "16 bits a pixel", "png", _16_bit)
part("png-palette", 25, "a palette with a transparent color", "png", _palette)
part("png-1-by-1", 25, "one grey pixel with transparency", "png", lambda: picture("PNG", size=(1, 1), mode="LA"))
part("png-header-checksum", 23, "a wrong checksum of its header", "png", lambda: _png(wrong=b"IHDR"), "decode")
part("png-pixel-checksum", 23, "a wrong checksum of its pixels", "png", lambda: _png(wrong=b"IDAT"), "decode")
part("png-half", 24, "the first half of a PNG", "png", lambda: _cut_to(picture("PNG"), 0.5), "decode")
part("png-few-rows", 24, "too few rows in a whole chunk: Pillow gives black ones and says nothing", "png",
     lambda: _png(rows=bytes(17 * 4)), may="decode")  # fmt: skip
part("png-ztxt-bomb", 26, "a note that unpacks to 100 MB", "png",
     lambda: _png(chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100 * MB), 9))),
     may="decode|byte-limit")  # fmt: skip
part("png-iccp-bomb", 26, "a color profile that unpacks to 100 MB", "png",
     lambda: _png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100 * MB), 9))),
     may="decode|byte-limit")  # fmt: skip
part("png-claims-2-GB", 26, "a chunk that claims 2 GB", "png",
     lambda: _png(struct.pack(">I", 2**31 - 1) + b"tEXtnote"), "decode")  # fmt: skip
part("tiff-large", 26, "a TIFF of 100,000 x 100,000 under .jpg", "jpg",
     lambda: _tiff([*_shape(100_000, 100_000), (273, 4, 1, 8), (279, 4, 1, 64)]), "pixel-limit")  # fmt: skip
part("tiff-tags", 26, "a TIFF under .jpg whose tags point far outside", "jpg",
     lambda: _tiff([*_shape(64, 64), (270, 2, 0xFFFFFFF0, 8), (273, 4, 1, 0xFFFFFF00), (278, 4, 1, 64),
                    (279, 4, 1, 0xFFFFFFF0)]), "decode")  # fmt: skip
part("tiff-strips", 26, "a TIFF under .jpg with four thousand million strips", "jpg",
     lambda: _tiff([*_shape(64, 64), (273, 4, 0xFFFFFFFF, 8), (278, 4, 1, 1), (279, 4, 0xFFFFFFFF, 8)]),
     "decode")  # fmt: skip
part("webp-cut", 24, "half a WebP", "webp", lambda: _cut_to(picture("WEBP", size=(200, 160)), 0.5), "decode")
part("webp-fine", 25, "a WebP with transparency", "webp", lambda: picture("WEBP", mode="RGBA", lossless=True))

# --- sounds ---


def wav(
    frames: bytes, channels: int = 1, rate: int = 16_000, kind: int = 1, bits: int = 16, claimed: int | None = None
):
    """A WAV file; `claimed`: the bytes of sound that its header announces."""
    block = channels * bits // 8 % 2**16
    length = len(frames) if claimed is None else claimed
    fmt = struct.pack("<HHIIHH", kind, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", length) + frames
    return b"RIFF" + struct.pack("<I", min(36 + length, 2**32 - 1)) + body


def _floats(*odd: float) -> bytes:
    values = np.sin(np.arange(8000) / 5).astype("<f4")
    values[4000 : 4000 + len(odd)] = odd
    return wav(values.tobytes(), kind=3, bits=32)


PCM = (np.sin(np.arange(8000) / 5) * 9000).astype("<i2").tobytes()


@functools.cache
def _silence(seconds: int, rate: int, channels: int) -> bytes:
    data = io.BytesIO()
    piece = np.zeros((rate * 10, channels), np.int16)
    with soundfile.SoundFile(data, "w", rate, channels, "PCM_16", format="FLAC") as file:
        for _ in range(seconds // 10):
            file.write(piece)
    return data.getvalue()


part("flac-bomb", 28, "600 s of silence on 8 channels, 0.9 GB when decoded whole: below the limit of duration", "flac",
     lambda: _silence(600, 48_000, 8), may="byte-limit|duration-limit")  # fmt: skip
part("flac-too-long", 28, "3,700 s of silence", "flac", lambda: _silence(3700, 8000, 1), "duration-limit")
part("wav-claims-2e9", 29, "a header that claims 2,000,000,000 frames", "wav",
     lambda: wav(PCM, claimed=4_000_000_000), may="decode|duration-limit")  # fmt: skip
part("audio-zero-bytes", 30, "a sound of no bytes", "flac", lambda: b"", "decode|empty")
part("wav-no-samples", 30, "a WAV of no samples", "wav", lambda: wav(b""), "empty")
part("wav-nan", 30, "NaN among the samples", "wav", lambda: _floats(float("nan")), "not-finite")
part(
    "wav-infinite", 30, "infinity among the samples", "wav", lambda: _floats(float("inf"), float("-inf")), "not-finite"
)
part(
    "wav-huge-values",
    30,
    "finite samples whose spectrum is not",
    "wav",
    lambda: _floats(*[3e38, -3e38] * 400),
    "not-finite",
)
part("wav-8k", 30, "8,000 samples a second", "wav", lambda: wav(PCM, rate=8000))
part("wav-192k", 30, "192,000 samples a second", "wav", lambda: wav(PCM, rate=192_000))
part("wav-one-sample", 30, "one sample", "wav", lambda: wav(b"\1\0"))
part("wav-8-bit", 30, "8 bits a sample", "wav", lambda: wav(bytes(range(256)) * 20, bits=8))
part("wav-half-frame", 30, "a frame cut in half at the end", "wav", lambda: wav(PCM[:-1], channels=2), may="decode")
part("wav-no-channels", 30, "no channels", "wav", lambda: wav(PCM, channels=0), "decode")
part("wav-65535-channels", 30, "65,535 channels", "wav", lambda: wav(PCM, channels=65_535), "decode")
part("wav-rate-0", 30, "no samples a second", "wav", lambda: wav(PCM, rate=0), "decode")
part("wav-rate-1e9", 30, "1,000,000,000 samples a second", "wav", lambda: wav(PCM, rate=10**9), "decode")
part("wav-odd-code", 30, "a code that nobody knows", "wav", lambda: wav(PCM, kind=0x7777), "decode")
part("wav-header-only", 29, "a WAV cut before its samples", "wav", lambda: wav(PCM)[:36], "decode|empty")
part("flac-half", 24, "the first half of a FLAC", "flac", lambda: _cut_to(sound(seconds=2), 0.5), "decode")
part("flac-header-only", 24, "a FLAC's header", "flac", lambda: sound(seconds=1)[:42], "decode|empty")
part("flac-noise", 23, "random bytes among the coded samples", "flac",
     lambda: sound(seconds=2)[:20_000] + random.Random(5).randbytes(9000) + sound(seconds=2)[29_000:],
     "decode")  # fmt: skip
part("ogg-half", 24, "the first half of an Ogg", "ogg", lambda: _cut_to(sound("OGG", seconds=2), 0.5), may="decode")
part("ogg-header-only", 24, "an Ogg's first page", "ogg", lambda: sound("OGG", seconds=1)[:58], "decode|empty")
part("mp3-half", 24, "the first half of an MP3", "mp3", lambda: _cut_to(sound("MP3", seconds=2), 0.5), may="decode")
part("audio-html", 24, "an error page under a sound's name", "flac", lambda: HTML, "decode")
part(
    "audio-alone", 24, "an error page under a sound's name and nothing else", "flac", lambda: HTML, "decode", beside=""
)
part("wav-as-flac", 0, "a WAV under .flac", "flac", lambda: wav(PCM))

part("sound-wave", 0, "an ordinary sound of 44,100 samples a second", "wav", lambda: wav(PCM, rate=44_100))

# --- lines of JSON ---


def lines(
    name: str,
    fault: int,
    says: str,
    odd: bytes,
    reason: str = "",
    may: str = "",
    end: bytes = b"\n",
    last: bytes = b"\n",
):
    """Two sound lines, an odd one, two sound ones. `reason`: why the odd one is lost (empty: it is fine)."""

    def recipe(folder: Path) -> Case:
        rows = [json.dumps({"text": f"line {i} of the file"}).encode() for i in range(5)]
        rows[2] = odd
        path = folder / f"{name}.jsonl"
        path.write_bytes(end.join(rows) + last)
        healthy = {str(i): {"json": row} for i, row in enumerate(rows) if i != 2 or (not reason and odd.strip())}
        refused = (("2", "", reason),) if reason else ()
        damaged = {"2": {"json": odd}} if reason else {}
        outcome = {"2": "skip" if reason else "ok|skip" if may else "ok"} if odd.strip() else {}
        allowed = (("2", "", may),) if may else ()
        return Case(name, fault, str(path), says, healthy, refused, outcome, True, allowed, damaged)

    _register(name, recipe)


GOOD = b'{"text": "a good line"}'
lines("lines-broken", 22, "a line that is no JSON", b'{"text": "a line that', "json")
lines("lines-empty", 20, "an empty line is passed over", b"")
lines("lines-blank", 20, "a line of spaces is passed over", b"   ")
lines("lines-list", 20, "a line that is no map", b'["text"]', "empty|json")
lines("lines-no-text", 19, "a line without any text", b'{"label": 3}', "empty")
lines("lines-5-MB", 21, "a line of 5 MB", b'{"text": "' + b"many words " * 450_000 + b'"}', may="byte-limit")
lines("lines-not-utf8", 22, "a line that is not UTF-8", b'{"text": "caf\xe9"}', "json|text-decode")
lines("lines-no-final-end", 0, "no line end after the last line", GOOD, last=b"")
lines("lines-crlf", 0, "line ends of two characters", GOOD, end=b"\r\n", last=b"\r\n")
lines("lines-nul", 22, "NUL characters in place of a line", bytes(100), "json")
lines("lines-separator", 0, "U+2028 within a line ends no line", '{"text": "one\u2028line"}'.encode())

# --- plain text ---


def text(
    name: str, fault: int, says: str, content: Callable[[], tuple[bytes, list[bytes]]], refused=(), opens: bool = True
):
    """`content()`: the file, and its stretches that are delivered in whatever pieces. They are keyed by their place."""

    def recipe(folder: Path) -> Case:
        data, sound_ones = content()
        path = folder / f"{name}.txt"
        path.write_bytes(data)
        return Case(
            name, fault, str(path), says, {str(data.index(s)): {"txt": s} for s in sound_ones}, refused, opens=opens
        )

    _register(name, recipe)


PARAGRAPHS = [(f"Paragraph {i} has its own words. " * 56).strip().encode() for i in range(6)]


def _around_binary() -> tuple[bytes, list[bytes]]:
    binary = bytes(byte | 0x80 for byte in random.Random(6).randbytes(9000))
    data = b"\n\n".join([*PARAGRAPHS[:3], binary, *PARAGRAPHS[3:]]) + b"\n"
    return data, PARAGRAPHS[:2] + PARAGRAPHS[4:]


@functools.cache
def _long_line() -> tuple[bytes, list[bytes]]:
    line = "".join(random.Random(7).choices("abcdefgh\u00e4\u65e5", k=4 * MB)).encode()
    return b"\n\n".join([*PARAGRAPHS[:2], line, *PARAGRAPHS[2:]]), [PARAGRAPHS[0], line, PARAGRAPHS[-1]]


text("plain-binary", 22, "9,000 bytes of no text among paragraphs", _around_binary, (("", "text", "text-decode"),))
text("plain-long-line", 21, "one line of 5 MB without a space", _long_line)
text("plain-empty", 20, "a text file of no bytes", lambda: (b"", []), (("", "", "empty"),), opens=False)
text("plain-line-ends", 20, "a text file of nothing but line ends", lambda: (b"\n" * 5000, []), (("", "", "empty"),),
     opens=False)  # fmt: skip
text("plain-crlf", 0, "line ends of two characters", lambda: (b"\r\n\r\n".join(PARAGRAPHS), PARAGRAPHS))
text("plain-nul", 22, "NUL characters between paragraphs",
     lambda: (b"\n\n".join([PARAGRAPHS[0], bytes(50), PARAGRAPHS[1]]), PARAGRAPHS[:2]))  # fmt: skip

# --- names of shards ---

for _name, _fault, _says, _file in (
    (
        "file-shell",
        18,
        "a shard's name that a shell would run",
        f"x;touch {SENTINEL} $(touch {SENTINEL})`touch {SENTINEL}`.tar",
    ),
    ("file-pipe", 18, "a shard's name that ends like a pipe's command", f"touch {SENTINEL} |.tar"),
    ("file-brackets", 0, "a shard's name that is also a pattern", "shard[0]*?.tar"),
    ("file-newline", 18, "a line end in a shard's name", "two\nlines.tar"),
):
    tar(_name, _fault, _says, lambda: around(whole("hurt")), file=_file, own=hurt, outcome=OK)


def pattern(name: str, fault: int, says: str, what: str):
    """What a user might write where a shard's name belongs; {} is the folder."""
    _register(name, lambda folder: Case(name, fault, what.replace("{}", str(folder)), says, {}, opens=False))


pattern("pipe-url", 18, "a command that webdataset would run", f"pipe:touch {SENTINEL}")
pattern("pipe-url-tar", 18, "the same with a tar's ending", f"pipe:touch {SENTINEL}; cat a.tar")
pattern("missing", 8, "a shard that is not there", "{}/there-is-no-such-shard.tar")
pattern("missing-pattern", 8, "a pattern that nothing matches", "{}/there-are-no-such-shards-*.tar")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    cases = make(parser.parse_args().folder)
    for case in cases:
        refused = ", ".join("/".join(filter(None, row)) for row in case.refused) or "-"
        outcome = ", ".join(f"{k[:12]} {v}" for k, v in case.outcome.items()) if case.opens else "exit 2"
        print(f"{case.name:24} {case.fault or '':>3}  {outcome[:40]:40} {refused[:60]:60} {case.says}")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
