"""Copies: what is equal, what is nearly equal, and what two samples share.

Near copies are found by bands: two hashes that differ in few places agree in at least one of the bands that they are
cut into, so only what shares a band is compared. For pictures that finds every pair; for text every pair whose
signatures agree in more than three quarters, and nearly all others (at a similarity of 0.65 all but 0.2 %).
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

SMALLEST = 64  # pixels of the shorter side: smaller pictures have no perceptual hash
BITS = 4  # perceptual hashes (64 bits) that differ in no more are near
SHADE = 24  # and no sixteenth of the pictures differs in a color by more (of 255): else both are kept, on one side
JACCARD = 0.8  # texts whose sets of shingles are this similar are near copies
TIED = 0.65  # and those that are this similar stay on one side of the split: an estimate has an error
SHINGLE = 5  # characters
WORDS, BANDS = 128, 32  # of a MinHash signature
WINDOW = 2000  # where more share a band, each is compared with so many that follow it
TEXTS = 64  # of a sample that are compared one by one


def digest(*parts: bytes) -> str:
    """128 bits of the parts, as 32 hexadecimal digits."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()


def plain(text: str) -> str:
    """The text as copies are told by: case, width, accents' spelling and spaces aside."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def picture_hash(picture) -> str:
    """imagehash's phash: 64 bits as 16 hexadecimal digits."""
    import imagehash

    return str(imagehash.phash(picture))


def colors(picture) -> str:
    """The mean colors of sixteen fields, 48 bytes as hexadecimal digits: a perceptual hash sees no color."""
    from PIL import Image

    return picture.resize((4, 4), Image.Resampling.BOX).tobytes().hex()


def shingles(text: str) -> np.ndarray:
    """A hash (S,) of 32 bits for each run of `SHINGLE` characters, each once."""
    letters = np.frombuffer(plain(text).encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
    count = max(1, len(letters) - SHINGLE + 1)
    letters = np.pad(letters, (0, max(0, SHINGLE - len(letters))))
    made = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        made = made * np.uint64(0x9E3779B97F4A7C15) + letters[place : place + count]
    return np.unique(mixed(made) >> np.uint64(32))


def mixed(words: np.ndarray) -> np.ndarray:
    """Well-mixed 64-bit numbers of `words` (the finalizer of splitmix64, Steele et al. 2014)."""
    words = words.astype(np.uint64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@functools.cache
def _empty():
    import datasketch

    return datasketch.MinHash(num_perm=WORDS, seed=1, hashfunc=int)


def signature(found: np.ndarray) -> np.ndarray:
    """datasketch's MinHash of hashed shingles, (WORDS,) uint32: the share of equal words estimates the similarity."""
    made = _empty().copy()
    for start in range(0, len(found), 4096):
        made.update_batch(found[start : start + 4096])
    return made.hashvalues.astype(np.uint32)


def signatures(texts: list[str]) -> np.ndarray:
    """(1 or 1 + T, WORDS): of all the texts together, and where there are several of each (the first `TEXTS`)."""
    each = [shingles(text) for text in texts]
    whole = [signature(np.unique(np.concatenate(each)))]
    return np.stack(whole + ([signature(one) for one in each[:TEXTS]] if len(each) > 1 else []))


# ------------------------------------------------------------------------------------------------------------- settling


def repeated(hashes: np.ndarray) -> np.ndarray:
    """For each row of `hashes` (N, 2) the first row that is equal to it: (N,), its own number where it is the first."""
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    firsts = order[new][np.cumsum(new) - 1]
    made = np.empty(len(order), np.int64)
    made[order] = firsts
    return made


def equal_pairs(keys: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Pairs (E, 2) of owners that tie together all those whose keys (M,) are equal."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return np.stack([owner[order[:-1]][same], owner[order[1:]][same]], 1)


def pairs(bands: Iterable[np.ndarray], near: Callable, window: int | None = None) -> np.ndarray:
    """Pairs (E, 2) of rows that agree in one of the bands, (R,) each, and are near: `near(a, b)`, rows -> bool."""
    made = [np.zeros((0, 2), np.int64)]
    for band in bands:
        order = np.argsort(band, kind="stable")
        key = band[order]
        alive = np.arange(len(order))
        step = 0
        while len(alive) and (window is None or step < window):
            step += 1
            alive = alive[alive + step < len(order)]
            alive = alive[key[alive] == key[alive + step]]
            for start in range(0, len(alive), 1 << 16):
                some = alive[start : start + (1 << 16)]
                a, b = order[some], order[some + step]
                fits = near(a, b)
                made.append(np.stack([a[fits], b[fits]], 1))
    return np.concatenate(made)


def picture_bands(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """The BITS + 1 bands, (R,) each, of perceptual hashes (R,) of 64 bits."""
    edges = np.linspace(0, 64, BITS + 2).astype(int)
    for start, end in zip(edges[:-1], edges[1:]):
        yield (hashes >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)


def text_bands(words: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The BANDS bands, (R,) each, of the signatures in `rows` (R,) of words (T, WORDS)."""
    width = WORDS // BANDS
    for band in range(BANDS):
        made = np.zeros(len(rows), np.uint64)
        for start in range(0, len(rows), 1 << 16):
            some = slice(start, start + (1 << 16))
            for place in range(band * width, (band + 1) * width):
                made[some] = mixed(made[some] + np.uint64(0x9E3779B97F4A7C15) + words[rows[some], place])
        yield made


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ."""
    return np.bitwise_count(a ^ b)


def similarity(words: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of equal words of the signatures in rows `a` and `b`."""
    return (words[a] == words[b]).mean(1)


def clusters(count: int, edges: np.ndarray) -> np.ndarray:
    """The smallest member (N,) of everything's cluster, where `edges` (E, 2) tie."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(edges):
        return np.arange(count)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    label = connected_components(graph, directed=False)[1]
    _, first = np.unique(label, return_index=True)
    return first[label]
