"""How fast is an index searched? Ours against plain FAISS and plain usearch on the same vectors, and how much memory
and time to build each takes.

Each contestant is in a process of its own and uses all cores that it is given; they take turns at the same queries, in
batches and one by one; beside queries a second stands the least CPU time of a query in all turns, which other work on
the machine changes less. Each is searched as far as it has to be for the recall@10 that is asked for: that of exact
search, on queries that are not those of the turns, less one standard error. Ours answers with items (texts and fields
from the disk), `ours-numbers` and the others with numbers of rows.

The vectors are not embeddings: mixtures of 2,000 Gaussian clusters of unequal size on the sphere, each of 48 directions
of its own beside noise in all directions, rounded to float16. Queries are further draws of the same mixture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BLOCK = 8192
LINKS, ADDED = 32, 128  # of an item, and how many candidates are looked at for it, in all graphs: ours by default
SWEEP = (16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024)
CONTESTANTS = ("ours", "ours-numbers", "usearch", "usearch-f16", "usearch-i8", "faiss-hnsw", "faiss-ivf")


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # FAISS's threads do not spin where they wait
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--work", help="a folder to keep the data and what is built; without it, a temporary one")
    parser.add_argument("--out", default=str(HERE / "results"))
    given = parser.parse_args()
    if given.work:
        Path(given.work).mkdir(parents=True, exist_ok=True)
        results = contest(Path(given.work), given)
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = contest(Path(folder), given)
    write(Path(given.out), given, results)


def contest(work: Path, given: argparse.Namespace) -> dict[str, dict]:
    """By contestant: recall, queries/s in batches and one by one, seconds to build and open, memory."""
    prepare(work, given.n, given.dim, given.queries)
    results, players = {}, {}
    for name in given.only:
        built = work / f"{name}.json"
        if not built.exists():
            built.write_text(json.dumps(in_process(build, name, work, given.recall)))
        results[name] = json.loads(built.read_text())
        print(f"{name}: built in {results[name]['build_seconds']:.0f} s", flush=True)
    try:
        for name in given.only:
            players[name] = Player(name, work, given.recall)
            results[name] |= players[name].ask("tune")
            print(f"{name}: recall {results[name]['recall']:.4f} at {results[name]['setting']}", flush=True)
        turns: dict[str, dict[str, list[float]]] = {name: {} for name in players}
        for number in range(given.rounds):
            for name in [*players][number % len(players) :] + [*players][: number % len(players)]:
                for kind in ("batch", "single"):
                    for what, taken in zip((kind, f"{kind}_cpu"), players[name].ask(kind), strict=True):
                        turns[name].setdefault(what, []).append(taken)
        for name, player in players.items():
            for kind in ("batch", "single"):
                rates = turns[name][kind]
                results[name][f"{kind}_cpu_us"] = min(turns[name][f"{kind}_cpu"])
                results[name][f"{kind}_queries_per_second"] = statistics.median(rates)
                results[name][f"{kind}_range"] = [min(rates), max(rates)]
            results[name] |= player.ask("memory")
    finally:
        for player in players.values():
            player.close()
    return results


# ---------------------------------------------------------------------------------------------------------------- data


def prepare(work: Path, n: int, dim: int, queries: int) -> None:
    """vectors.npy (N, E) float16; queries and, to choose settings, tuning queries, with their nearest 10."""
    about = {"n": n, "dim": dim, "queries": queries}
    if (work / "data.json").exists() and json.loads((work / "data.json").read_text()) == about:
        return
    generator = np.random.default_rng(0)
    draw = Mixture(dim)
    vectors = np.lib.format.open_memmap(work / "vectors.npy", "w+", np.float16, (n, dim))
    for start in range(0, n, BLOCK):
        vectors[start : start + BLOCK] = draw(min(BLOCK, n - start), generator)
    vectors.flush()
    for name in ("queries", "tuning"):
        own = draw(queries, generator)
        np.save(work / f"{name}.npy", own)
        np.save(work / f"{name}-nearest.npy", exact(vectors, own, 10))
    (work / "data.json").write_text(json.dumps(about))


class Mixture:
    """Draws unit vectors (N, E): clusters of unequal size, each with a few directions of its own."""

    def __init__(self, dim: int, clusters: int = 2000, own: int = 48):
        generator = np.random.default_rng(1)
        self.centers = generator.standard_normal((clusters, dim)).astype(np.float32)
        self.basis = generator.standard_normal((64, own, dim)).astype(np.float32)  # shared by some of the clusters
        weights = 1 / np.arange(1, clusters + 1) ** 0.7
        self.weights = weights / weights.sum()

    def __call__(self, count: int, generator: np.random.Generator) -> np.ndarray:
        cluster = generator.choice(len(self.centers), count, p=self.weights)
        dim = self.centers.shape[1]
        out = self.centers[cluster] + 0.3 * generator.standard_normal((count, dim)).astype(np.float32)
        for number in range(len(self.basis)):
            rows = np.flatnonzero(cluster % len(self.basis) == number)
            own = self.basis[number]
            out[rows] += 0.15 * generator.standard_normal((len(rows), len(own))).astype(np.float32) @ own
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def exact(vectors: np.ndarray, queries: np.ndarray, top: int) -> np.ndarray:
    """The nearest (Q, top) by exact search."""
    import torch

    asked = torch.from_numpy(queries)
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(vectors), BLOCK):
        block = torch.from_numpy(np.asarray(vectors[start : start + BLOCK], np.float32))
        score, place = (asked @ block.T).topk(min(top, len(block)))
        score, place = torch.cat([best[0], score], 1), torch.cat([best[1], place + start], 1)
        score, order = score.topk(min(top, score.shape[1]))
        best = score, place.gather(1, order)
    return best[1].numpy()


# --------------------------------------------------------------------------------------------------------- contestants


class Ours:
    settings: tuple = (0,)  # how far it searches it has found out by itself

    @staticmethod
    def build(work: Path, recall: float) -> None:
        from multimodal_fm.search.base import Item
        from multimodal_fm.search.collection import Collection
        from multimodal_fm.search.graph import Settings
        from multimodal_fm.search.index import build_index

        vectors, folder = np.load(work / "vectors.npy", mmap_mode="r"), work / "ours"
        shutil.rmtree(folder, ignore_errors=True)
        own = Collection(folder)
        own.create("0" * 64, "benchmark", vectors.shape[1], "float16")
        for start in range(0, len(vectors), BLOCK):
            rows = range(start, min(start + BLOCK, len(vectors)))
            items = [Item(f"{i:032d}", "image", f"shard-{i // 10_000:06d}.tar", f"{i:09d}", "jpg", f"picture {i}",
                          {"label": i % 100}) for i in rows]  # fmt: skip
            own.append(items, np.asarray(vectors[rows.start : rows.stop], np.float32))
        build_index(folder, Settings(exact_below=min(20_000, len(vectors) // 2), recall=recall))

    def __init__(self, work: Path):
        self.work = work
        self.open()

    def open(self) -> None:
        from multimodal_fm.search.index import LocalIndex

        self.index = LocalIndex(self.work / "ours")

    def set(self, setting: int, recall: float) -> str:
        graph = json.loads((self.work / "ours/index/manifest.json").read_text())["graphs"]["image"]
        return f"expansion {graph['expansion']}"

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        found = self.index.search(queries, 10)
        return np.array([[int(hit.item.id) for hit in hits] for hits in found])


class OursNumbers(Ours):
    """Without the items, as far as the others go."""

    @staticmethod
    def build(work: Path, recall: float) -> None:
        assert (work / "ours").exists(), "it searches what `ours` has built"

    def open(self) -> None:
        from multimodal_fm.search.collection import Collection
        from multimodal_fm.search.segment import Segment

        own = Collection(self.work / "ours")
        self.index = Segment(own, own.manifest())
        self.every = np.ones(len(self.index), bool)

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, 10, "image", self.every, len(self.every))[1]


class Usearch:
    dtype: str | None = None
    settings: tuple = SWEEP

    @classmethod
    def build(cls, work: Path, recall: float) -> None:
        from usearch.index import Index

        vectors = np.load(work / "vectors.npy", mmap_mode="r")
        kind = {"dtype": cls.dtype} if cls.dtype else {}
        index = Index(ndim=vectors.shape[1], metric="cos", connectivity=LINKS, expansion_add=ADDED, **kind)
        for start in range(0, len(vectors), BLOCK):
            block = np.asarray(vectors[start : start + BLOCK], np.float32)
            index.add(np.arange(start, start + len(block)), block, threads=cores())
        index.save(str(work / cls.__name__))

    def __init__(self, work: Path):
        from usearch.index import Index

        self.index = Index.restore(str(work / type(self).__name__), view=True)

    def set(self, expansion: int, recall: float) -> str:
        self.index.expansion_search = expansion
        return f"expansion {expansion}"

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        return np.asarray(self.index.search(queries, 10, threads=cores()).keys).reshape(len(queries), -1)


class UsearchF16(Usearch):
    dtype = "f16"


class UsearchI8(Usearch):
    dtype = "i8"


class FaissHnsw:
    settings: tuple = SWEEP

    @staticmethod
    def make(vectors: np.ndarray):
        import faiss

        index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = ADDED
        return index

    @classmethod
    def build(cls, work: Path, recall: float) -> None:
        import faiss

        faiss.omp_set_num_threads(cores())
        vectors = np.load(work / "vectors.npy", mmap_mode="r")
        index = cls.make(vectors)
        for start in range(0, len(vectors), BLOCK):
            index.add(np.asarray(vectors[start : start + BLOCK], np.float32))
        faiss.write_index(index, str(work / cls.__name__))

    def __init__(self, work: Path):
        import faiss

        faiss.omp_set_num_threads(cores())
        self.index = faiss.read_index(str(work / type(self).__name__))

    def set(self, setting: int, recall: float) -> str:
        self.index.hnsw.efSearch = setting
        return f"efSearch {setting}"

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, 10)[1]


class FaissIvf(FaissHnsw):
    settings = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)

    @staticmethod
    def make(vectors: np.ndarray):
        import faiss

        lists = int(4 * len(vectors) ** 0.5)
        index = faiss.index_factory(vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        some = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 40 * lists), replace=False)
        index.train(np.asarray(vectors[np.sort(some)], np.float32))
        return index

    def set(self, setting: int, recall: float) -> str:
        self.index.nprobe = setting
        return f"nprobe {setting}"


CLASSES = dict(zip(CONTESTANTS, (Ours, OursNumbers, Usearch, UsearchF16, UsearchI8, FaissHnsw, FaissIvf), strict=True))


def cores() -> int:
    return len(os.sched_getaffinity(0))


# ----------------------------------------------------------------------------------------------------------- processes


def in_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def build(name: str, work: Path, recall: float) -> dict:
    began = time.perf_counter()
    CLASSES[name].build(work, recall)
    took = time.perf_counter() - began
    return {"build_seconds": took, "build_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class Player:
    """A contestant in a process of its own, which answers one question at a time."""

    def __init__(self, name: str, work: Path, recall: float):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=play, args=(other, name, work, recall), daemon=True)
        self.process.start()

    def ask(self, question: str):
        self.connection.send(question)
        return self.connection.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def play(connection, name: str, work: Path, recall: float) -> None:
    queries, tuning = np.load(work / "queries.npy"), np.load(work / "tuning.npy")
    nearest = {kind: np.load(work / f"{kind}-nearest.npy") for kind in ("queries", "tuning")}
    CLASSES[name](work)  # imports what it needs
    began = time.perf_counter()
    player = CLASSES[name](work)
    opened = time.perf_counter() - began
    while True:
        question = connection.recv()
        if question == "tune":
            for setting in player.settings:
                said = player.set(setting, recall)
                if surely(player(tuning), nearest["tuning"]) >= recall:
                    break
            found = recall_of(player(queries), nearest["queries"])
            connection.send({"open_seconds": opened, "setting": said, "recall": found})
        elif question == "memory":
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            gib = {key: int(status[key].split()[0]) / 2**20 for key in ("VmHWM", "RssAnon")}
            connection.send({"search_peak_gib": gib["VmHWM"], "search_own_gib": gib["RssAnon"]})
        else:
            asked = queries if question == "batch" else queries[:: max(1, len(queries) // 100)]
            began, used = time.perf_counter(), time.process_time()
            if question == "batch":
                player(asked)
            else:
                for query in asked:
                    player(query[None])
            took, used = time.perf_counter() - began, time.process_time() - used
            connection.send((len(asked) / took, 1e6 * used / len(asked)))


def recalls(found: np.ndarray, nearest: np.ndarray) -> list[float]:
    return [len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]


def recall_of(found: np.ndarray, nearest: np.ndarray) -> float:
    return float(np.mean(recalls(found, nearest)))


def surely(found: np.ndarray, nearest: np.ndarray) -> float:
    """The recall less one standard error, by which an index of ours chooses how far it searches."""
    own = recalls(found, nearest)
    return float(np.mean(own) - np.std(own) / len(own) ** 0.5)


def write(out: Path, given: argparse.Namespace, results: dict[str, dict]) -> None:
    from common import markdown

    rows = [["", "recall@10", "setting", "queries/s, batches", "one by one", "CPU µs, batches",
             "one by one", "own memory GiB", "peak, mapped files too",
             "open s", "build s", "build peak GiB"]]  # fmt: skip
    for name, one in results.items():
        rates = []
        for kind in ("batch", "single"):
            least, most = one[f"{kind}_range"]
            rates.append(f"{one[f'{kind}_queries_per_second']:.0f} ({least:.0f}-{most:.0f})")
        rows.append([name, f"{one['recall']:.4f}", one["setting"], *rates, f"{one['batch_cpu_us']:.0f}",
                     f"{one['single_cpu_us']:.0f}", f"{one['search_own_gib']:.2f}",
                     f"{one['search_peak_gib']:.2f}", f"{one['open_seconds']:.1f}", f"{one['build_seconds']:.0f}",
                     f"{one['build_peak_gib']:.2f}"])  # fmt: skip
    ratios = {}
    for kind in ("batch", "single", "batch by CPU time", "single by CPU time"):
        key, _, by_cpu = kind.partition(" ")
        rate = {name: 1 / one[f"{key}_cpu_us"] if by_cpu else one[f"{key}_queries_per_second"]
                for name, one in results.items() if one["recall"] >= given.recall - 0.002}  # fmt: skip
        peers = {name: value for name, value in rate.items() if not name.startswith("ours")}
        if peers:
            best = max(peers, key=peers.__getitem__)
            ratios |= {f"{name}, {kind}": {"best_peer": best, "ratio": rate[name] / peers[best]}
                       for name in ("ours", "ours-numbers") if name in rate}  # fmt: skip
    about = {"n": given.n, "dim": given.dim, "queries": given.queries, "recall": given.recall, "cores": cores(),
             "load": os.getloadavg()[0]}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    data = {"about": about, "ratios": ratios, "results": results}
    (out / "search.json").write_text(json.dumps(data, indent=1) + "\n")
    said = "; ".join(f"{kind}: {one['ratio']:.2f} of {one['best_peer']}" for kind, one in ratios.items())
    said = said or "none, for want of two that reach the recall"
    text = (f"# Search: {given.n:,} vectors of {given.dim} dimensions, {cores()} cores\n\n"
            f"{__doc__}\n{markdown(rows)}\n\nOurs, of the best other at the same recall: {said}.\n")  # fmt: skip
    (out / "search.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
