"""Build the shards: python -m data.emoji --seed 0 [--without SHARDS] [--from DIR] [--to FOLDER] [--cache FOLDER]."""

import glob
import json
import re
import sys
import tarfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import debian, writing
from data.writing import BAD_ARGUMENT, NO_SOURCE, RecipeError, digest, jpeg_bytes

VERSION = 1  # raise it when the items change, so that an older build is replaced
FONT = debian.Package("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto", 9_900_000)
NAMES = debian.Package("unicode-cldr-core", "usr/share/unicode/cldr/common/annotations", 16_900_000)
SOURCE = f"Noto Color Emoji and Unicode CLDR, Debian packages {FONT.name} and {NAMES.name}"
LICENSE = "OFL-1.1 (pictures), Unicode-3.0 (names)"
STRIKE, SIZE = 109, (136, 128)  # the font's pictures come in one size: what to ask for, and pixels
SKIN = range(0x1F3FB, 0x1F400)  # colours of skin, which are no things


def main(argv=None):
    """Build the shards of one seed, unless they are there."""
    start = time.monotonic()
    options = parse(argv)
    folder = options.to / str(options.seed)
    held_out = captions_in(options.without)
    recipe = {"name": "emoji", "version": VERSION, "seed": options.seed, "without": digest(*sorted(held_out))}
    recipe["languages"] = options.languages
    if writing.is_complete(folder, recipe):
        return writing.already_there(folder)
    font, names = (debian.find(package, options.given, options.cache) for package in (FONT, NAMES))
    left_out, code = Counter(), BAD_ARGUMENT if options.given else NO_SOURCE
    items = make_items(
        read_names(names, options.languages), draw_with(font / "NotoColorEmoji.ttf", code), held_out, left_out
    )
    items.sort(key=lambda item: digest(options.seed, item["key"]))
    if not items:
        raise RecipeError(f"{font} draws none of the emoji that {names} names", code)
    with writing.building(folder) as part:
        splits = {"train": writing.write_split(part, "train", items)}
        about = {"source": SOURCE, "license": LICENSE, "left_out": {k: n for k, n in sorted(left_out.items()) if n}}
        card = writing.write_card(part, recipe, about, splits)
    writing.summary(folder, card, time.monotonic() - start)


def parse(argv):
    """The command's options."""
    parser = writing.Parser(prog="python -m data.emoji", description=sys.modules["data.emoji"].__doc__)
    parser.add_argument("--seed", type=writing.number(0), default=0, help="of the order")
    without = "shards whose captions are held out: no emoji with such a name (a pattern)"
    parser.add_argument("--without", default="", help=without)
    languages = "codes of the languages to keep, with commas between them (default: all)"
    parser.add_argument("--languages", type=lambda text: sorted({"en", *text.split(",")}), help=languages)
    source = "folder with the two packages, or with both unpacked (else download)"
    parser.add_argument("--from", dest="given", type=Path, help=source)
    to, cache = (writing.default_folder(__file__, name) for name in ("shards", "cache"))
    parser.add_argument("--to", type=Path, default=to, help=f"shards go to TO/SEED (default {to})")
    parser.add_argument("--cache", type=Path, default=cache, help=f"downloads (default {cache})")
    return parser.parse_args(argv)


def normal(text):
    """A name or caption as they are compared: without case, outer spaces and a full stop."""
    return text.casefold().strip(" .")


def captions_in(pattern):
    """The captions, in all languages, of the items of some shards. Raises RecipeError where there are no shards."""
    found, shards = set(), sorted(glob.glob(pattern))
    if pattern and not shards:
        raise RecipeError(f"--without {pattern}: no such file")
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.loads(tar.extractfile(member).read())
                    found |= {normal(text) for text in (about["caption"], *about.get("captions", {}).values())}
    return found


def read_names(folder, languages=None):
    """{language: {emoji: its name}} of these languages, or of all by their code alone (no countries, no scripts)."""
    names = {}
    for file in sorted(folder.glob("*.xml")):
        if file.stem in languages if languages else re.fullmatch("[a-z]{2,3}", file.stem):
            found = {one.get("cp"): one.text for one in xml.parse(file).iter("annotation") if one.get("type") == "tts"}
            names[file.stem] = {emoji: name for emoji, name in found.items() if name and "↑" not in name}
    return names


def draw_with(file, code=BAD_ARGUMENT):
    """A function from an emoji to its picture on white, None where the font has none. Raises RecipeError of `code`."""
    try:
        font = ImageFont.truetype(file, STRIKE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise RecipeError(f"{file}: {error}", code) from None

    def draw(emoji):
        picture = Image.new("RGBA", SIZE, (255, 255, 255, 0))
        ImageDraw.Draw(picture).text((0, 0), emoji, "black", font, embedded_color=True)
        if not picture.getextrema()[3][1]:
            return None
        return Image.alpha_composite(Image.new("RGBA", SIZE, "white"), picture)

    return draw


def make_items(names, draw, held_out, left_out):
    """The items of all emoji of one code point that the font draws, less what is held out."""
    items = []
    for emoji, name in sorted(names.get("en", {}).items()):
        if len(emoji) > 1 or ord(emoji) in SKIN or (picture := draw(emoji)) is None:
            continue
        captions = {language: own[emoji] for language, own in names.items() if emoji in own}
        kept = {language: text for language, text in captions.items() if normal(text) not in held_out}
        if "en" not in kept:
            left_out["emoji with a caption that is held out"] += 1
            continue
        left_out["name that is held out"] += len(captions) - len(kept)
        about = {
            "role": "picture",
            "stamp": f"{ord(emoji):04x}",
            "language": "en",
            "caption": name,
            "captions": kept,
            "license": LICENSE,
            "source": SOURCE,
        }
        items.append({"key": f"{ord(emoji):04x}", "txt": name, "json": about, "jpg": jpeg_bytes(picture)})
    return items


if __name__ == "__main__":
    sys.exit(writing.run("data.emoji", main))
