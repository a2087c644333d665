"""A folder of embeddings: Parquet files, and a manifest that says which of them count.

    DIR/collection.json              the manifest: model, run, dim, dtype, sources, parts with bytes and SHA-256
    DIR/embeddings/part-*.parquet    items and their vectors
    DIR/embeddings/deleted-*.json    ids that were deleted
    DIR/quarantine.jsonl             what could not be read
    DIR/index/                       made of the above (`segment.py`)

The parts and deletions are a log: what comes later replaces or deletes what came before under the same id. Each file is
written, synced and named before the manifest that counts it is; what no manifest counts does not exist. So a process
may be killed at any instant, and what `append` and `delete` have returned from is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus import storage
from ..errors import UserError
from .base import Item

FORMAT = 1
FILE, EMBEDDINGS = "collection.json", "embeddings"
DTYPES = {"float16": np.float16, "float32": np.float32}
COLUMNS = tuple(one.name for one in dataclasses.fields(Item))
WAIT = 30.0  # seconds for another process that writes
NAMES = re.compile(r"part-\d{6,}\.parquet|deleted-\d{6,}\.json")  # nothing else is opened, whatever a manifest says


_held: set = set()  # files of locks


def _let_go() -> None:
    """Worker processes do not hold their parent's locks: they may outlive it, where it is killed, for some seconds."""
    for file in _held:
        with contextlib.suppress(OSError):
            file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Part:
    """A file of the log: items with vectors, or, with `deletes`, ids."""

    name: str
    bytes: int
    sha256: str
    rows: int
    counts: dict[str, int] = field(default_factory=dict)  # items by modality
    source: str = ""  # the source that it was read from; empty: `append` was called with the items themselves
    version: str = ""  # of that source
    ranges: list[list[int]] = field(default_factory=list)  # the samples [start, stop) of the source that it stands for
    deletes: bool = False


@dataclass
class SourceState:
    """How far a source has been embedded. A source that changed is embedded anew beside what is there, as `following`,
    which takes its place when it is complete."""

    kind: str
    version: str
    count: int  # samples
    following: str = ""
    following_count: int = 0


@dataclass
class Manifest:
    """What collection.json says."""

    model: str  # `model_hash` of the model that made the vectors
    run: str
    dim: int
    dtype: str = "float16"
    head: str = "retrieval"
    sources: dict[str, SourceState] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    next: int = 1  # number of the next file of the log

    def visible(self) -> list[Part]:
        """The log: all parts but those of a source that is being embedded anew."""
        return [p for p in self.parts if not p.source or p.version == self.sources[p.source].version]

    def counts(self) -> dict[str, int]:
        """Items of each modality in the log; replaced and deleted ones are counted."""
        total = sum((Counter(part.counts) for part in self.visible()), Counter())
        return dict(sorted(total.items()))

    def missing(self, source: str, version: str, count: int) -> list[tuple[int, int]]:
        """The ranges of samples [start, stop) of a source that no part stands for yet."""
        covered = sorted(
            tuple(one) for p in self.parts if (p.source, p.version) == (source, version) for one in p.ranges
        )
        missing, at = [], 0
        for start, stop in covered:
            if start > at:
                missing.append((at, start))
            at = max(at, stop)
        return missing + ([(at, count)] if at < count else [])

    def to_bytes(self) -> bytes:
        data = {"format": FORMAT, **dataclasses.asdict(self), "counts": self.counts()}
        return seal(data)


def seal(data: dict) -> bytes:
    """JSON that carries its own SHA-256."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return json.dumps({**data, "sha256": digest}, indent=1, ensure_ascii=False).encode() + b"\n"


def unseal(raw: bytes, file: Path, mend: str) -> dict:
    """What `seal` was given. Raises UserError where a bit of it has changed, or it is of another format."""
    try:
        data = json.loads(raw)
        digest = data.pop("sha256")
        if digest != hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest():
            raise ValueError("its hash is not that of its content")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error or type(error).__name__}): {mend}") from None
    if data.pop("format", None) != FORMAT:
        raise UserError(f"{file}: its format is not {FORMAT}, which this version of multimodal_fm reads: {mend}")
    return data


def model_hash(model) -> str:
    """A hash of all that a model's vectors depend on: weights, adapters, the retrieval head and the tokenizers.

    Unlike `lora.base_hash`, which is of the backbone and the embedders alone: two models that give different vectors
    have different hashes. Heads for other uses, augmentation, and where files lie do not count.
    """
    import torch

    from ..config import to_data

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith("heads.retrieval.") or not name.startswith(("heads.", "mask_tokens.")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for modality, tokenizer in model.tokenizers.items():
        other = ("file", *tokenizer.augmentations)
        settings = {name: value for name, value in to_data(tokenizer).items() if name not in other}
        digest.update(json.dumps([modality, settings], sort_keys=True, default=str).encode())
        if tokenizer.file:
            digest.update(Path(tokenizer.file).read_bytes())
    return digest.hexdigest()


class Collection:
    """The folder of a collection. Methods read its manifest anew, so that several processes may work on it.

    Raises UserError where the folder holds no collection, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.embeddings = self.folder / EMBEDDINGS

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def manifest(self) -> Manifest:
        try:
            raw = self.file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.folder}: no collection in it: make one with mmfm embed RUN SOURCE --out "
                            f"{self.folder}") from None  # fmt: skip
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}") from None
        data = unseal(raw, self.file, "embed into another folder")
        data.pop("counts", None)
        try:
            data["sources"] = {name: SourceState(**one) for name, one in data["sources"].items()}
            data["parts"] = [Part(**one) for one in data["parts"]]
            found = Manifest(**data)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.file}: {error}: embed into another folder") from None
        if found.dtype not in DTYPES or not all(NAMES.fullmatch(part.name) for part in found.parts):
            raise UserError(f"{self.file} names what no collection holds: embed into another folder")
        return found

    def create(self, model: str, run: str, dim: int, dtype: str) -> Manifest:
        """Begin a collection, or go on with one. Raises UserError where it is of another model, dimension or type."""
        if dtype not in DTYPES:
            raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        try:
            self.embeddings.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}") from None
        with self.locked():
            if not self.file.exists():
                self._write(Manifest(model, run, dim, dtype))
            found = self.manifest()
            self._remove_strays(found)
        if found.model != model:
            raise UserError(f"{self.folder} was embedded by another model ({found.run}, {found.model[:12]}) than this "
                            f"one ({run}, {model[:12]}): give another --out")  # fmt: skip
        if (found.dim, found.dtype) != (dim, dtype):
            raise UserError(f"{self.folder} holds {found.dtype} vectors of {found.dim} dimensions, not {dtype} of "
                            f"{dim}: give another --out")  # fmt: skip
        return found

    @contextlib.contextmanager
    def locked(self, name: str = ".lock", wait: float = WAIT) -> Iterator[None]:
        """Waits for other writers. Raises UserError where they take too long."""
        until = time.monotonic() + wait
        with open(self.folder / name, "a+") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() >= until:
                        file.seek(0)
                        who = file.read().strip() or "another process"
                        raise UserError(f"{self.folder}: {who} is writing there: wait until it has ended") from None
                    time.sleep(0.02)
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            _held.add(file)
            try:
                yield
            finally:
                _held.discard(file)

    def update(self, change: Callable[[Manifest], Any]) -> Manifest:
        """Read the manifest, change it and write it, while nobody else does."""
        with self.locked():
            manifest = self.manifest()
            change(manifest)
            self._write(manifest)
        return manifest

    def _write(self, manifest: Manifest) -> None:
        storage.write_atomic(self.file, manifest.to_bytes())
        storage.sync_folder(self.folder)

    def _remove_strays(self, manifest: Manifest) -> None:
        """Files that a killed process left before the manifest counted them."""
        known = {part.name for part in manifest.parts}
        for file in [*self.embeddings.iterdir(), *self.folder.glob(".tmp-*")]:
            if file.name not in known and (NAMES.fullmatch(file.name) or file.name.startswith(".tmp-")):
                file.unlink(missing_ok=True)

    def append(
        self, items: Sequence[Item], vectors: np.ndarray, source: str = "", version: str = "", ranges: Sequence = ()
    ) -> Part:
        """Add items with their vectors (N, E) as one part, which is on the disk when this returns.

        source, version, ranges: of what was read, where it was a source. Raises UserError.
        """
        with self.locked():
            manifest = self.manifest()
            vectors = check_vectors(vectors, len(items), manifest.dim)
            data = encode(items, vectors.astype(DTYPES[manifest.dtype]))
            number = f"part-{manifest.next:06d}.parquet"
            counts = dict(Counter(item.modality for item in items))
            own = Part(number, len(data), _sha256(data), len(items), counts, source, version, [list(r) for r in ranges])
            self._commit(manifest, own, data)
        return own

    def delete(self, ids: Sequence[str]) -> Part:
        """Delete the items of these ids; it is on the disk when this returns."""
        with self.locked():
            manifest = self.manifest()
            data = json.dumps(list(ids)).encode()
            own = Part(f"deleted-{manifest.next:06d}.json", len(data), _sha256(data), len(ids), deletes=True)
            self._commit(manifest, own, data)
        return own

    def _commit(self, manifest: Manifest, part: Part, data: bytes) -> None:
        storage.write_atomic(self.embeddings / part.name, data)
        storage.sync_folder(self.embeddings)
        manifest.parts.append(part)
        manifest.next += 1
        replaced = self._complete(manifest, part.source)
        self._write(manifest)
        for one in replaced:
            (self.embeddings / one.name).unlink(missing_ok=True)

    def _complete(self, manifest: Manifest, source: str) -> list[Part]:
        """Where a source has been embedded anew to its end, that takes the place of what was there; returns the parts
        that no longer count."""
        state = manifest.sources.get(source)
        if state is None or not state.following or manifest.missing(source, state.following, state.following_count):
            return []
        replaced = [part for part in manifest.parts if part.source == source and part.version == state.version]
        kept = [part for part in manifest.parts if part not in replaced]
        manifest.parts = sorted(kept, key=lambda part: part.source == source)  # they are seen from now on: the last
        manifest.sources[source] = SourceState(state.kind, state.following, state.following_count)
        return replaced

    def begin_source(self, source: str, kind: str, version: str, count: int) -> Manifest:
        """Note that a source is to be embedded as it is now."""
        dropped: list[Part] = []

        def change(manifest: Manifest) -> None:
            state = manifest.sources.setdefault(source, SourceState(kind, version, count))
            state.following, state.following_count = ("", 0) if version == state.version else (version, count)
            kept = {state.version, state.following}
            dropped.extend(p for p in manifest.parts if p.source == source and p.version not in kept)
            manifest.parts = [part for part in manifest.parts if part not in dropped]
            dropped.extend(self._complete(manifest, source))  # where it holds nothing any more

        manifest = self.update(change)
        for part in dropped:
            (self.embeddings / part.name).unlink(missing_ok=True)
        return manifest

    def drop_damaged(self, source: str) -> int:
        """Forget the parts of a source that are damaged, so that they are made again; returns how many there were."""
        manifest = self.manifest()
        damaged = []
        for part in manifest.parts:
            if part.source == source:
                try:
                    self.read_bytes(part)
                except UserError:
                    damaged.append(part)
        if damaged:
            self.update(lambda now: now.parts.__setitem__(slice(None), [p for p in now.parts if p not in damaged]))
        return len(damaged)

    def read_bytes(self, part: Part) -> bytes:
        """The bytes of a file of the log. Raises UserError where they are not those that were written."""
        file = self.embeddings / part.name
        made = f"mmfm embed with {part.source} makes it again" if part.source else "its items have to be added again"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}: {made}") from None
        if len(data) != part.bytes or _sha256(data) != part.sha256:
            raise UserError(f"{file} is damaged: {made}")
        return data

    def read_ids(self, part: Part) -> list[str]:
        """The ids of a deletion. Raises UserError."""
        return json.loads(self.read_bytes(part))

    def read(self, part: Part, dim: int, columns: Sequence[str] = COLUMNS) -> tuple[Any, np.ndarray]:
        """A part's items as an Arrow table of these columns, and its vectors (N, E) as they are stored.

        Raises UserError where it is damaged, or does not hold what the manifest says.
        """
        table, vectors = decode(self.read_bytes(part), dim, columns, str(self.embeddings / part.name))
        if len(table) != part.rows:
            raise UserError(f"{self.embeddings / part.name} has {len(table)} rows, the manifest says {part.rows}")
        return table, vectors

    def quarantine(self, rows: Sequence[dict], replace: str | None = None) -> None:
        """Add rows to quarantine.jsonl, each once. replace: a source whose earlier rows are left out."""
        file = self.folder / "quarantine.jsonl"
        with self.locked():
            before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            if replace is not None:
                before = [line for line in before if json.loads(line).get("source") != replace]
            lines = dict.fromkeys([*before, *(json.dumps(row) for row in rows)])
            if lines or file.exists():
                storage.write_atomic(file, (f"{line}\n".encode() for line in lines))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def import_arrow() -> Any:
    """The module `pyarrow`, with `pyarrow.parquet`. Raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('embeddings are kept in Parquet: pip install "multimodal_fm[search]"') from None
    return pyarrow


def check_vectors(vectors: np.ndarray, count: int, dim: int) -> np.ndarray:
    """Vectors (N, E) as float32 of length one. Raises UserError where one of them cannot be that."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != count:
        raise UserError(f"{count} items come with vectors of the shape {vectors.shape}: give one vector for each item")
    if vectors.shape[1] != dim:
        raise UserError(f"the vectors have {vectors.shape[1]} dimensions, those of the collection {dim}")
    norms = np.linalg.norm(vectors, axis=1)
    if bad := np.flatnonzero(~np.isfinite(norms) | (norms < 1e-6)).tolist():
        raise UserError(f"vector {bad[0]} is zero or not finite, as are {len(bad) - 1} more: vectors have length one")
    return vectors / norms[:, None]


def check_queries(vectors: np.ndarray, dim: int, top: int) -> np.ndarray:
    """The vectors (Q, E) of queries as float32 of length one. Raises UserError where they cannot be compared."""
    if top < 1:
        raise UserError(f"top is at least 1, not {top}")
    return check_vectors(np.asarray(vectors), len(vectors), dim)


def encode(items: Sequence[Item], vectors: np.ndarray) -> bytes:
    """A Parquet file of items and vectors (N, E)."""
    arrow = import_arrow()
    columns = {name: [getattr(item, name) for item in items] for name in COLUMNS}
    columns["fields"] = [json.dumps(fields, ensure_ascii=True, default=str) if fields else "{}"
                         for fields in columns["fields"]]  # fmt: skip
    arrays = [arrow.array([_text(value) for value in columns[name]], arrow.string()) for name in COLUMNS]
    flat = arrow.array(np.ascontiguousarray(vectors).reshape(-1))
    arrays.append(arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(arrow.table(arrays, names=[*COLUMNS, "vector"]), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _text(value) -> str:
    return str(value).encode("utf-8", "replace").decode()  # lone surrogates are no UTF-8


def decode(data: bytes, dim: int, columns: Sequence[str], name: str) -> tuple[Any, np.ndarray]:
    """What `encode` was given: a table of these columns, and vectors (N, E). Raises UserError."""
    arrow = import_arrow()
    try:
        file = arrow.parquet.ParquetFile(arrow.BufferReader(data))
        table = file.read(columns=[*columns, "vector"], use_threads=False)
        vector, table = table["vector"].combine_chunks(), table.drop_columns(["vector"])
        if not arrow.types.is_fixed_size_list(vector.type) or vector.type.list_size != dim:
            raise UserError(f"{name}: its vectors are {vector.type}, the manifest says {dim} dimensions")
        if any(not arrow.types.is_string(kind) for kind in table.schema.types) or any(c.null_count for c in table):
            raise UserError(f"{name}: its columns are not those of a collection")
        vectors = vector.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    except (arrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
    if len(vectors) != len(table):
        raise UserError(f"{name} has {len(table)} items and {len(vectors)} vectors")
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    if not (np.abs(norms - 1) < 0.01).all():  # false for NaN too
        raise UserError(f"{name}: vector {int(np.argmin(np.abs(norms - 1) < 0.01))} is not of length one")
    return table, vectors
