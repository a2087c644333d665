"""Is what is written, drawn and said true? On made-up scenes, whose truth is known, by readers that learned nothing.

    python benchmarks/scenes.py --codec runs/scene_codes --draw runs/dalle --captions runs/captions

Text -> picture: `data.scenes.read` finds shapes, colors, counts, sizes and places in the pixels; picture -> text and
sound -> text: `data.scenes.parse` reads the caption. Half of the scenes have only pairs of color and shape that
training had, in captions that it had not; the others are of validation, whose every scene has a pair that training
never had. A kind of shapes too many costs its share. Chance is what the same answers score against other scenes. The
ceiling is the true picture, coded and decoded.

Each part that is asked for replaces its own in scenes.json; scenes.md and the contact sheet follow from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, markdown
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

import multimodal_fm as mmfm
from data.scenes.captions import canonical
from data.scenes.parse import parse_caption
from data.scenes.picture import draw_picture
from data.scenes.read import read_picture
from data.scenes.scene import Scene, draw_scene, generator
from data.scenes.score import ATTRIBUTES, Score, score
from data.scenes.sound import play
from data.writing import SAMPLE_RATE, flac_bytes, jpeg_bytes
from multimodal_fm import generate
from multimodal_fm.errors import printable
from multimodal_fm.evals.metrics import estimate, estimate_difference
from multimodal_fm.run_dir import codec

SHUFFLES = 8  # other scenes that each answer is compared with for chance
COLUMNS = 6  # of the contact sheet
ROWS = [*ATTRIBUTES, "attributes", "background", "whole scene"]
DRAWN = [  # columns of the table: title, what was measured, figure
    ("chance", "first", "chance"),
    ("first", "first", "value"),
    ("mean of all", "all candidates", "value"),
    ("reranked", "reranked", "value"),
    ("ceiling", "ceiling", "value"),
    ("reader", "reader", "value"),
]


def main() -> None:
    given = parse_arguments()
    torch.set_num_threads(given.threads)
    unseen = [(index, "validation") for index in range(given.skip, given.skip + given.scenes)]
    places = [*seen_scenes(given), *unseen]
    scenes = [draw_scene(given.seed, split, index) for index, split in places]
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "scenes.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, part in (("ceiling", code), ("draw", draw), ("captions", describe), ("sound", sound)):
        run = getattr(given, "codec" if name == "ceiling" else name)
        if run:
            start = time.perf_counter()
            results |= part(run, scenes, places, given)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            file.write_text(json.dumps(results, indent=1))
    (given.out / "scenes.md").write_text(report(results))
    print(report(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="", help="a run of configs/scene_codes.yaml: measures the ceiling")
    parser.add_argument("--draw", default="", help="a run of configs/dalle.yaml: text -> picture")
    parser.add_argument("--captions", default="", help="a run of configs/captions.yaml: picture, sound -> text")
    parser.add_argument("--sound", default="", help="a run that writes codes of sounds after text: three are kept")
    parser.add_argument("--scenes", type=int, default=50, help="of each half, seen and unseen (50)")
    parser.add_argument("--skip", type=int, default=0, help="so many before them: choose settings on others (0)")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes that the runs were trained on")
    parser.add_argument("--train", type=int, default=12_000, help="how many of them were trained on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def seen_scenes(given: argparse.Namespace) -> list[tuple[int, str]]:
    """Scenes by the rule of training that come after those that were trained on, and whose captions were not."""
    known = {canonical(draw_scene(given.seed, "train", index)) for index in range(given.train)}
    places, index = [], given.train
    while len(places) < given.skip + given.scenes:
        if canonical(draw_scene(given.seed, "train", index)) not in known:
            places.append((index, "train"))
        index += 1
    return places[given.skip :]


def picture_of(scene: Scene, place: tuple[int, str], seed: int) -> bytes:
    """The JPEG that the shards of these scenes hold."""
    index, split = place
    return jpeg_bytes(draw_picture(scene, generator(seed, split, index, "picture")))


def sound_of(scene: Scene, place: tuple[int, str], seed: int) -> bytes:
    index, split = place
    return flac_bytes(play(scene, generator(seed, split, index, "sound")))


def code(run: str, scenes: list[Scene], places: list, given: argparse.Namespace) -> dict:
    """The reader on true pictures, and on what the codec makes of them."""
    own, raw, coded = codec.load_own(run), [], []
    for scene, place in zip(scenes, places, strict=True):
        (tokens,) = own.tokenizer.read(picture_of(scene, place, given.seed))
        raw.append(read_picture(own.tokenizer.render(tokens.content, tokens.position)))
        values = own.decode(own.encode([tokens]), [tokens.position])
        coded.append(read_picture(own.tokenizer.render(values, tokens.position)))
    return {"reader": measure(scenes, raw), "ceiling": measure(scenes, coded)}


def draw(run: str, scenes: list[Scene], places: list, given: argparse.Namespace) -> dict:
    """Text -> picture: the first candidate, the mean of all, and the one that the contrastive head likes best."""
    model = mmfm.load(run, device="cpu")
    texts = [canonical(scene) for scene in scenes]
    (target,) = [m for m in model.modalities if (g := model.tokenizers[m].generation()) is not None and g.end is None]
    how = {"to": target, "guidance_scale": given.guidance, "temperature": given.temperature, "top_p": given.top_p}
    first = model.generate(text=texts, **how)
    ranked = model.generate(text=texts, candidates=given.candidates, rerank=True, progress=tell, **how)
    of_first = [read_picture(one.value) for one in first]
    of_best = [read_picture(one.value) for one in ranked]
    others = [read_picture(other.value) for one in ranked for other in one.others]
    every = [*of_best, *others]
    owners = [*scenes, *(scene for scene in scenes for _ in range(given.candidates - 1))]
    contact_sheet([one.value for one in ranked], texts, of_best, scenes, given.out / "scenes.png")
    gains = [one.kinds.mean() for one in (score(*pair) for pair in zip(scenes, of_first, strict=True))]
    after = [one.kinds.mean() for one in (score(*pair) for pair in zip(scenes, of_best, strict=True))]
    settings = {name: value for name, value in how.items() if name != "to"} | {"candidates": given.candidates}
    return {
        "first": measure(scenes, of_first),
        "reranked": measure(scenes, of_best),
        "all candidates": measure(owners, every, chance=False),
        "gain of reranking": estimate_difference(gains, after),
        "settings": settings,
        "drawings": [{"text": text, "read": say(read)} for text, read in zip(texts, of_best)],
    }


def describe(run: str, scenes: list[Scene], places: list, given: argparse.Namespace) -> dict:
    """Picture -> text and sound -> text, word by word the likeliest."""
    model = mmfm.load(run, device="cpu")
    pictures = [picture_of(*pair, given.seed) for pair in zip(scenes, places, strict=True)]
    sounds = [sound_of(*pair, given.seed) for pair in zip(scenes, places, strict=True)]
    results: dict[str, Any] = {}
    for name, inputs in (("image to text", {"image": pictures}), ("audio to text", {"audio": sounds})):
        texts = [one.value for one in model.generate(to="text", temperature=0, **inputs)]
        results[name] = measure(scenes, [parse_caption(text) for text in texts])
        results[f"{name}, words"] = [[canonical(scene), text] for scene, text in zip(scenes, texts)]
    results["heard"] = {}
    for number in (0, len(scenes) // 2):  # of each half one, to listen to
        wave = play(scenes[number], generator(given.seed, *places[number][::-1], "sound"))
        file = f"scenes-heard-{len(results['heard'])}.ogg"
        generate.save((wave, SAMPLE_RATE), given.out / file)
        results["heard"][file] = results["audio to text, words"][number][1]
    return results


def sound(run: str, scenes: list[Scene], places: list, given: argparse.Namespace) -> dict:
    """Text -> sound: a few to listen to."""
    model = mmfm.load(run, device="cpu")
    texts = [canonical(scene) for scene in (*scenes[:2], scenes[-1])]
    names = [f"scenes-{number}.ogg" for number in range(len(texts))]
    for name, one in zip(names, model.generate(to="audio", text=texts, guidance_scale=given.guidance), strict=True):
        generate.save(one.value, given.out / name)
    return {"sounds": dict(zip(names, texts))}


def tell(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:3d} of {of}", end="" if done < of else "\n", file=sys.stderr, flush=True)


def say(scene: Scene) -> str:
    """What was read, for a person; counts may be any."""
    kinds = [f"{kind.count} {kind.size} {kind.colour} {kind.shape} {kind.place}" for kind in scene.kinds]
    return f"{', '.join(kinds) or 'nothing'}, on {scene.background}"


def measure(asked: list[Scene], answers: list[Scene], chance: bool = True) -> dict[str, dict]:
    """{"seen", "unseen"} -> {row of the table: the figure and its chance}.

    Attributes are of kinds, seen or not whatever scene they are in; backgrounds and whole scenes are seen where all
    kinds of the scene are.
    """
    own = [score(*pair) for pair in zip(asked, answers, strict=True)]
    other = shuffled(asked, answers) if chance else []
    return {part: rows(own, other, part == "unseen") for part in ("seen", "unseen")}


def shuffled(asked: list[Scene], answers: list[Scene]) -> list[Score]:
    """The answers' scores for other scenes, which are not those that were asked for."""
    rng, scores = np.random.default_rng(0), []
    for scene in asked:
        others = [i for i in range(len(asked)) if asked[i].kinds != scene.kinds]
        chosen = rng.choice(others, min(SHUFFLES, len(others)), replace=False) if others else []
        scores += [score(scene, answers[i]) for i in chosen]
    return scores


def rows(own: list[Score], other: list[Score], unseen: bool) -> dict[str, dict]:
    """The figures of one part of the kinds, with intervals over scenes."""
    kinds = [(number, one.kinds[one.unseen == unseen]) for number, one in enumerate(own)]
    owner = np.concatenate([np.full(len(right), number) for number, right in kinds])
    right = np.concatenate([right for _, right in kinds])
    guessed = [one.kinds[one.unseen == unseen] for one in other]
    guess = np.concatenate(guessed).mean(0) if guessed and sum(map(len, guessed)) else [None] * len(ATTRIBUTES)
    result = {name: estimate(right[:, i], owner, _number(guess[i])) for i, name in enumerate(ATTRIBUTES)}
    mean = None if guess[0] is None else float(np.mean(guess))
    result["attributes"] = estimate(right.mean(1), owner, mean)
    for name, field in (("background", "background"), ("whole scene", "whole")):
        values = np.array([getattr(one, field) for one in own if one.unseen.any() == unseen], float)
        guesses = [getattr(one, field) for one in other if one.unseen.any() == unseen]
        result[name] = estimate(values, np.arange(len(values)), float(np.mean(guesses)) if guesses else None)
    return result


def _number(value) -> float | None:
    return None if value is None else float(value)


def report(results: dict[str, Any]) -> str:
    """scenes.md."""
    text = ["# Generation that can be checked", " ".join((__doc__ or "").split("\n\n")[2].split())]
    text.append("Seen and unseen: kinds whose pair of color and shape training had, or never had. In brackets 95 %.")
    said = [(title, way, key) for way in ("image to text", "audio to text")
            for title, key in ((f"{way}: chance", "chance"), (way, "value"))]  # fmt: skip
    for title, columns in (("Text to picture", DRAWN), ("Picture and sound to text", said)):
        columns = [column for column in columns if column[1] in results]
        for part in ("seen", "unseen") if columns else ():
            text += [f"## {title}: {part} pairs of color and shape", table(results, columns, part)]
    if "gain of reranking" in results:
        gain, settings = results["gain of reranking"], results["settings"]
        text.append(f"The best of {settings['candidates']} by the contrastive head of the same model, less the first: "
                    f"{gain['value']:+.3f} of a scene's attributes ({gain['low']:+.3f} to {gain['high']:+.3f}). "
                    f"Settings: {', '.join(f'{name} {value:g}' for name, value in settings.items())}.")  # fmt: skip
        text.append("![The first six of each half: seen above, unseen below](scenes.png)")
    text += [f"[A sound made of the text]({name}): {words}" for name, words in results.get("sounds", {}).items()]
    for way in ("image to text", "audio to text"):
        if pairs := results.get(f"{way}, words"):
            some = [*pairs[:2], *pairs[len(pairs) // 2 :][:2]]
            lines = [[printable(word).replace("|", "/") for word in pair] for pair in some]
            text += [f"### {way.capitalize()}: two of each half", markdown([["true", "said"], *lines])]
    for name, words in results.get("heard", {}).items():
        text.append(f"[A sound]({name}), of which it was said: {printable(words)}")
    return "\n\n".join(text) + "\n"


def table(results: dict[str, Any], columns: list[tuple[str, str, str]], part: str) -> str:
    lines = []
    for row in ROWS:
        figures = [(results[name][part][row], key) for _, name, key in columns]
        lines.append(
            [row.replace("colour", "color"), results[columns[0][1]][part][row]["n"], *map(cell, *zip(*figures))]
        )
    return markdown([["", "n", *(title for title, _, _ in columns)], *lines])


def cell(figure: dict, key: str) -> str:
    if figure[key] is None:
        return ""
    return f"{figure[key]:.2f}" + (f" ({figure['low']:.2f}-{figure['high']:.2f})" if key == "value" else "")


def contact_sheet(pictures: list, texts: list[str], read: list[Scene], scenes: list[Scene], file: Path) -> None:
    """The first pictures of each half, below each what was asked for, and what the reader finds."""
    half, width, height = len(pictures) // 2, 190, 300
    places = [(row, column) for row in (0, 1) for column in range(min(COLUMNS, half))]
    sheet = Image.new("RGB", (COLUMNS * width, 2 * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for row, column in places:
        i, left, top = row * half + column, column * width, row * height
        sheet.paste(generate.picture(pictures[i]).resize((128, 128), Image.Resampling.NEAREST), (left + 8, top + 8))
        right = score(scenes[i], read[i]).kinds
        words = textwrap.wrap(texts[i], 30, max_lines=5, placeholder=" ...")
        words += [f"{right.mean():.0%} right; read:", *textwrap.wrap(say(read[i]), 30, max_lines=5, placeholder=" ...")]
        pen.multiline_text((left + 8, top + 142), "\n".join(words), fill="black", font=font, spacing=2)
    sheet.quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    main()
