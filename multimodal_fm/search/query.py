"""Search a corpus by a text, a picture or a sound."""

from __future__ import annotations

from ..corpus.shards import Config as Source
from ..corpus.shards import Corpus
from ..evals.embed_corpus import encode
from ..model import Model


def search(model: Model, given: dict, shards: list[str], where: dict[str, str], top: int = 5) -> None:
    """Print the `top` nearest things of every modality to the one thing given, with their samples."""
    query = next(iter(model.embed(**{modality: [value] for modality, value in given.items()}).values()))[0].cpu()
    encoded = encode(model, Corpus(Source(shards, where=where), "in"))
    for modality, things in encoded.things.items():
        scores, found = (things.vectors @ query).topk(min(top, len(things.raw)))
        print(f"\n{modality}")
        for score, thing in zip(scores.tolist(), found.tolist(), strict=True):
            sample = things.samples[thing][0]
            text = things.raw[thing] if modality == "text" else next(iter(encoded.texts(sample)), "")
            more = f"  (and {len(things.samples[thing]) - 1} more)" if len(things.samples[thing]) > 1 else ""
            print(f"  {score:6.3f}  {encoded.key(sample)}  {_short(text)}{more}")


def _short(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
