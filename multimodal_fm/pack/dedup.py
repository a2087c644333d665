"""Copies, near copies, and clusters of samples that share something.

Near copies are found by locality-sensitive hashing: two hashes that differ in few bits agree in at least one of the
bands that they are cut into, so only hashes that share a band are compared. For images this finds every pair; for text
every pair whose signatures agree in more than three quarters, and nearly all others (at a similarity of 0.65 all but
0.2 %).
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

MIN_SIDE = 64  # pixels of the shorter side; a smaller image has no perceptual hash
MAX_BITS = 4  # near copies differ in at most so many of the 64 bits of their perceptual hashes
MAX_COLOR = 24  # and in no sixteenth of the image by more of 255 in a mean color; both are kept otherwise, in one split
NEAR_TEXT = 0.8  # Jaccard similarity of the shingles of near copies
TIED_TEXT = 0.65  # texts of this similarity stay in one split: an estimate has an error
SHINGLE = 5  # characters
NUM_PERM, BANDS = 128, 32  # of a MinHash signature
WINDOW = 2000  # where more rows share a band, each is compared with as many as this that follow it
MAX_TEXTS = 64  # of a sample that are compared one by one


def digest(*parts: bytes) -> str:
    """128 bits of a hash of the parts, as 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def short_digest(*parts: bytes) -> str:
    return digest(*parts)[:16]


def normalize(text: str) -> str:
    """The text without differences of case, width, composition of accents and spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def perceptual_hash(image) -> str:
    """phash of imagehash: 64 bits as 16 hexadecimal digits."""
    import imagehash

    return str(imagehash.phash(image))


def mean_colors(image) -> str:
    """The mean colors of a 4 x 4 grid, 48 bytes as hexadecimal digits: a perceptual hash is blind to color."""
    from PIL import Image

    return image.resize((4, 4), Image.Resampling.BOX).tobytes().hex()


def mix_bits(words: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014) of 64-bit numbers."""
    words = words.astype(np.uint64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str) -> np.ndarray:
    """The distinct 32-bit hashes (S,) of all runs of `SHINGLE` characters."""
    letters = np.frombuffer(normalize(text).encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
    count = max(1, len(letters) - SHINGLE + 1)
    letters = np.pad(letters, (0, max(0, SHINGLE - len(letters))))
    hashes = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * GOLDEN + letters[offset : offset + count]
    return np.unique(mix_bits(hashes) >> np.uint64(32))


@functools.cache
def _empty_minhash():
    import datasketch

    return datasketch.MinHash(num_perm=NUM_PERM, seed=1, hashfunc=int)


def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash of datasketch, (NUM_PERM,) uint32: the share of equal words estimates the Jaccard similarity."""
    minhash = _empty_minhash().copy()
    for start in range(0, len(hashes), 4096):
        minhash.update_batch(hashes[start : start + 4096])
    return minhash.hashvalues.astype(np.uint32)


def signatures(texts: list[str]) -> np.ndarray:
    """(1 or 1 + T, NUM_PERM): of all texts together and, where there are several, of each of the first `MAX_TEXTS`."""
    each = [shingles(text) for text in texts]
    whole = [signature(np.unique(np.concatenate(each)))]
    return np.stack(whole + ([signature(one) for one in each[:MAX_TEXTS]] if len(each) > 1 else []))


# ---------------------------------------------------------------------------------------------------- over all samples


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """For each row of `hashes` (N, 2) the number (N,) of the first row that equals it."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable
    new = np.ones(len(order), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    first = np.empty(len(order), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def count_before(keys: np.ndarray) -> np.ndarray:
    """For each of `keys` (N,) how many equal ones precede it: (N,)."""
    order = np.argsort(keys, kind="stable")
    new = np.ones(len(order), bool)
    new[1:] = keys[order[1:]] != keys[order[:-1]]
    counts = np.empty(len(order), np.int64)
    counts[order] = np.arange(len(order)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    return counts


def equal_pairs(keys: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Pairs (E, 2) of owners that connect all those whose keys (M,) are equal."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return np.stack([owners[order[:-1]][same], owners[order[1:]][same]], 1)


def near_pairs(bands: Iterable[np.ndarray], is_near: Callable, window: int | None = None) -> np.ndarray:
    """Pairs (E, 2) of rows that share a band, (R,) each, and for which `is_near(a, b)`, rows -> bool, holds."""
    pairs = [np.zeros((0, 2), np.int64)]
    for band in bands:
        order = np.argsort(band, kind="stable")
        keys = band[order]
        alive = np.arange(len(order))
        step = 0
        while len(alive) and (window is None or step < window):
            step += 1
            alive = alive[alive + step < len(order)]
            alive = alive[keys[alive] == keys[alive + step]]
            for start in range(0, len(alive), 1 << 16):
                rows = alive[start : start + (1 << 16)]
                a, b = order[rows], order[rows + step]
                near = is_near(a, b)
                pairs.append(np.stack([a[near], b[near]], 1))
    return np.concatenate(pairs)


def image_bands(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """The MAX_BITS + 1 bands, (R,) each, of perceptual hashes (R,) uint64."""
    edges = np.linspace(0, 64, MAX_BITS + 2).astype(int)
    for start, end in zip(edges[:-1], edges[1:]):
        yield (hashes >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)


def text_bands(words: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The BANDS bands, (R,) each, of the signatures in `rows` (R,) of words (T, NUM_PERM)."""
    width = NUM_PERM // BANDS
    for first in range(0, NUM_PERM, width):
        band = np.zeros(len(rows), np.uint64)
        for start in range(0, len(rows), 1 << 16):
            some = slice(start, start + (1 << 16))
            for word in range(first, first + width):
                band[some] = mix_bits(band[some] + GOLDEN + words[rows[some], word])
        yield band


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bits differ."""
    return np.bitwise_count(a ^ b)


def similarity(words: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of equal words of the signatures in rows `a` and `b`."""
    return (words[a] == words[b]).mean(1)


def clusters(count: int, edges: np.ndarray) -> np.ndarray:
    """The smallest member (N,) of the connected component that each of `count` nodes is in; edges (E, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(edges):
        return np.arange(count)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    label = connected_components(graph, directed=False)[1]
    _, first = np.unique(label, return_index=True)
    return first[label]
