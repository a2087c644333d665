"""Build the shards: python -m data.tuxpaint --seed 0 [--from DIR] [--to FOLDER] [--cache FOLDER]."""

import os
import re
import sys
import time
from pathlib import Path

from data import writing
from data.tuxpaint.convert import convert_all
from data.tuxpaint.source import find_stamps
from data.tuxpaint.stamps import ENGLISH, Sound, file_digest, read_stamps, validation_stamps, without_leaks
from data.writing import Progress, RecipeError, digest

VERSION = 2  # raise it when the items change, so that an older build is replaced
LICENSE = "GPL-2"
SOURCE = "Tux Paint stamps, Debian package tuxpaint-stamps-default"


def main(argv=None):
    """Build the shards of one seed, unless they are there."""
    start = time.monotonic()
    options = parse(argv)
    folder = options.to / str(options.seed)
    recipe = {"name": "tuxpaint", "version": VERSION, "seed": options.seed}
    if writing.is_complete(folder, recipe):
        return writing.already_there(folder)
    stamps, left_out = read_source(options.given, options.cache)
    digests = digest_files(stamps)
    held_out = validation_stamps(stamps, options.seed)
    sources = [(sound.role, sound.path, digests[sound.path]) for _, sound in pairs(stamps)]
    files = convert_all(sources, options.cache, options.workers)
    stamps = without_leaks(stamps, held_out, digests, left_out)
    specs = usable(pairs(stamps), digests, files, left_out)
    specs.sort(key=lambda spec: digest(options.seed, spec[0]))  # mixes the roles and stamps in each shard
    progress = Progress("packing", len(specs))
    with writing.building(folder) as part:
        splits = {}
        for split in writing.SPLITS:
            mine = [spec for spec in specs if (spec[1].name in held_out) == (split == "validation")]
            splits[split] = writing.write_split(part, split, make_items(mine, progress))
        about = {
            "source": SOURCE,
            "license": LICENSE,
            "left_out": {reason: n for reason, n in sorted(left_out.items()) if n},
        }
        card = writing.write_card(part, recipe, about, splits)
    writing.summary(folder, card, time.monotonic() - start)


def parse(argv):
    """The command's options."""
    parser = writing.Parser(prog="python -m data.tuxpaint", description=sys.modules["data.tuxpaint"].__doc__)
    parser.add_argument("--seed", type=writing.number(0), default=0, help="of the split and the order")
    source_help = "unpacked package, its stamps, or a .deb (else download)"
    parser.add_argument("--from", dest="given", type=Path, help=source_help)
    to, cache = (writing.default_folder(__file__, name) for name in ("shards", "cache"))
    parser.add_argument("--to", type=Path, default=to, help=f"shards go to TO/SEED (default {to})")
    parser.add_argument("--cache", type=Path, default=cache, help=f"download, conversions (default {cache})")
    parser.add_argument("--workers", type=writing.number(1), default=os.cpu_count(), help="processes")
    return parser.parse_args(argv)


def read_source(given, cache):
    """The stamps and the count of what is left out. Raises RecipeError where there are none."""
    folder = find_stamps(given, cache)
    stamps, left_out = read_stamps(folder)
    if not stamps:
        raise RecipeError(f"{folder} has no stamps (NAME.png or NAME.svg with NAME.txt)")
    return stamps, left_out


def digest_files(stamps):
    """{path: digest} of every picture and sound."""
    return {sound.path: file_digest(sound.path) for _, sound in pairs(stamps)}


def pairs(stamps):
    """(stamp, Sound) of every item to be; a `picture` item has the picture in the sound's place."""
    for stamp in stamps:
        yield stamp, Sound(stamp.picture, "picture", ENGLISH)
        for sound in stamp.sounds:
            yield stamp, sound


def usable(found, digests, files, left_out):
    """[(key, stamp, role, language, jpeg file, sound file)] of the items whose files convert."""
    specs = []
    for number, (stamp, sound) in enumerate(found):
        image = files["picture", digests[stamp.picture]]
        file = files[sound.role, digests[sound.path]]
        if bad := next((path for path in (image, file) if path.suffix == ".bad"), None):
            left_out[bad.read_text(encoding="utf-8")] += 1
            continue
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(stamp.name).name)[:40]
        key = f"{number:06d}-{name}-{sound.role}-{sound.language}"
        specs.append((key, stamp, sound.role, sound.language, image, file))
    return specs


def make_items(specs, progress):
    """Yield the items as written to the shards."""
    for key, stamp, role, language, image, sound in specs:
        about = {
            "role": role,
            "stamp": stamp.name,
            "language": language,
            "caption": stamp.texts[ENGLISH],
            "folder": stamp.name.split("/")[0],
            "license": LICENSE,
            "source": SOURCE,
        }
        item = {"key": key, "txt": stamp.texts[language], "json": about, "jpg": image.read_bytes()}
        if role == "picture":
            about["captions"] = stamp.texts
        else:
            item["flac"] = sound.read_bytes()
        yield item
        progress.step()


if __name__ == "__main__":
    sys.exit(writing.run("data.tuxpaint", main))
