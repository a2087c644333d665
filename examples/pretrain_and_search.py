"""Pretrain a tiny model on text, images and audio, then search for images and audio by words. Some seconds.

python examples/pretrain_and_search.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import toy_corpus

import multimodal_fm as mmfm
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.search.memory import CorpusIndex
from multimodal_fm.train import config, loop


def main(folder: Path) -> None:
    toy_corpus.write(folder, "train-0.tar", 128)
    held_out = toy_corpus.write(folder, "validation-0.tar", 16, seed=1)

    overrides = [f"sources.squares.shards={folder}/train-*.tar", f"run_dir={folder}/run"]
    loop.pretrain(config.load(Path(__file__).with_name("squares.yaml"), overrides))  # as `mmfm pretrain` does

    model = mmfm.load(folder / "run")  # the newest whole checkpoint, averaged weights
    index = CorpusIndex(model, Corpus(Config([str(held_out)])))  # in memory, as `mmfm search RUN --in SHARDS` does
    print(mmfm.search(index, "a small shiny red square", model=model, top=3, fold=False))

    vectors = model.embed(text=["a small shiny red square"], image=[toy_corpus.image("red"), toy_corpus.image("blue")])
    red, blue = (vectors["text"] @ vectors["image"].T)[0].tolist()
    print(f"\nthe words and a red image: {red:.2f}, and a blue one: {blue:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
