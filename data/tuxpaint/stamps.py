"""Reads the tree of stamps: which picture, texts and sounds belong together, and the split."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data.writing import digest

ENGLISH = "en"


@dataclass(frozen=True)
class Sound:
    path: Path
    role: str  # "spoken": a voice reads the text; "effect": what the stamp sounds like
    language: str


@dataclass
class Stamp:
    name: str  # path in the tree, without extension
    picture: Path
    texts: dict  # language -> text, "en" always there
    sounds: list = field(default_factory=list)


def read_stamps(root):
    """The stamps under `root` and a Counter of what is left out, by reason."""
    files, left_out = defaultdict(dict), Counter()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (".txt", ".png", ".svg", ".ogg", ".wav") and path.is_file():
            files[path.relative_to(root).with_suffix("").as_posix()][path.suffix.lower()] = path
    stamps = {}
    for name, found in files.items():
        picture = found.get(".png") or found.get(".svg")
        texts = read_texts(found[".txt"], left_out) if ".txt" in found else {}
        if picture and ENGLISH in texts:
            stamps[name] = Stamp(name, picture, texts)
        elif ".txt" in found:
            left_out["text without a picture" if not picture else "text without an English line"] += 1
        elif picture:
            twin = name.removesuffix("_mirror") != name
            left_out["mirrored twin of a picture" if twin else "picture without a text"] += 1
    for name, found in files.items():
        if sound := found.get(".ogg") or found.get(".wav"):
            add_sound(stamps, name, sound, left_out)
    return list(stamps.values()), left_out


def read_texts(path, left_out):
    """{language: text} of a description file: a line of English, then lines LANGUAGE.utf8=TEXT."""
    texts = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()):
        try:
            line = clean(line.decode("utf-8"))
        except UnicodeDecodeError:
            left_out["text line that is not UTF-8"] += 1
            continue
        language, text = (ENGLISH, line) if number == 0 else parse_translation(line)
        if language and text and "\ufffd" not in text:
            texts.setdefault(language, text)
        elif line:
            left_out["text line that is empty or garbled"] += 1
    return texts


def parse_translation(line):
    """("fr", "Un chat.") of "fr.utf8=Un chat."; (None, None) of anything else."""
    match = re.fullmatch(r"([A-Za-z]+(?:[_@][A-Za-z]+)?)\.utf8=(.*)", line)
    return (match[1], match[2].strip()) if match else (None, None)


def clean(text):
    """Text without control characters (a few Latvian lines have stray ones) and outer spaces."""
    return "".join(c for c in text if unicodedata.category(c) != "Cc" or c == "\t").strip()


def add_sound(stamps, name, path, left_out):
    """Add a sound file to its stamp: NAME (effect), NAME_LANGUAGE (effect), NAME_desc[_LANGUAGE] (voice)."""
    stem, rest = split_name(stamps, name)
    if stem is None:
        left_out["sound without a stamp"] += 1
        return
    spoken = rest == "desc" or rest.startswith("desc_")
    wanted = rest.removeprefix("desc").removeprefix("_") or ENGLISH
    stamp = stamps[stem]
    language = next((code for code in stamp.texts if code.casefold() == wanted.casefold()), None)
    if language is None:
        left_out["sound without a text in its language"] += 1
    else:
        stamp.sounds.append(Sound(path, "spoken" if spoken else "effect", language))


def split_name(stamps, name):
    """("animals/cat", "desc_fr") of "animals/cat_desc_fr"; the longest stamp that fits, or (None, "")."""
    if name in stamps:
        return name, ""
    for place in range(len(name) - 1, 0, -1):
        if name[place] == "_" and name[:place] in stamps:
            return name[:place], name[place + 1 :]
    return None, ""


def normal(text):
    """A text as the split compares it."""
    return text.casefold().strip()


def file_digest(path):
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def validation_stamps(stamps, seed):
    """The names of the stamps held out: those of the tenth of the English captions with the lowest hash.

    The hash is of the seed and the caption (case and outer spaces aside), so equal captions stay together.
    """
    captions = sorted({normal(stamp.texts[ENGLISH]) for stamp in stamps}, key=lambda caption: digest(seed, caption))
    held_out = set(captions[: len(captions) // 10])
    return {stamp.name for stamp in stamps if normal(stamp.texts[ENGLISH]) in held_out}


def without_leaks(stamps, held_out, digests, left_out):
    """The stamps, those of training without what validation has too (`digests`: path -> digest); a new list.

    Other stamps may have the same translation, the same recording or the same picture under another English
    caption: training loses that text with its sounds, that sound, or that stamp, and `left_out` counts it.
    """
    kept = [stamp for stamp in stamps if stamp.name in held_out]
    texts = {normal(text) for stamp in kept for text in stamp.texts.values()}
    files = {digests[path] for stamp in kept for path in (stamp.picture, *(sound.path for sound in stamp.sounds))}
    for stamp in stamps:
        if stamp.name in held_out:
            continue
        if digests[stamp.picture] in files or normal(stamp.texts[ENGLISH]) in texts:
            left_out["stamp of training with a picture or caption of validation"] += 1
            continue
        own = {language: text for language, text in stamp.texts.items() if normal(text) not in texts}
        left_out["text of training that validation has"] += len(stamp.texts) - len(own)
        sounds = [sound for sound in stamp.sounds if sound.language in own and digests[sound.path] not in files]
        left_out["sound of training that validation has, or its text"] += len(stamp.sounds) - len(sounds)
        kept.append(Stamp(stamp.name, stamp.picture, own, sounds))
    return sorted(kept, key=lambda stamp: stamp.name)
