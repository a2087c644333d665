"""A collection in PostgreSQL with pgvector (0.8 or newer): several machines read and write it, filters are SQL.

A database holds any number of collections. `mmfm_collections` has a row for each; its items are in a table of its own,
`mmfm_items_NUMBER`, with a partition for each modality, because the modality gap would make an approximate search for
the pictures near a text walk through all texts first. E dimensions of a vector, Q queries.

What `add` has returned from is committed, and a call is committed whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import numpy as np

from ..errors import UserError, printable
from .base import Hit, Index, Item, Where
from .collection import check_queries, check_vectors

T = TypeVar("T")
SCHEMES = ("postgresql", "postgres")
COLLECTION = "collection"  # the parameter of a URL that names a collection; all others are libpq's
REGISTRY, ITEMS = "mmfm_collections", "mmfm_items"
LOCK = 0x6D6D666D  # of the changes of tables: the advisory lock's number
MAX_VECTOR, MAX_DIM = 2000, 4000  # dimensions that pgvector's HNSW takes as vector and as halfvec
EXACT_ROWS = 10_000  # a search among so few rows is exact: it reads them all, in some milliseconds
EF_SEARCH = 200  # candidates of an approximate search, at least; pgvector's own 40 find too few
MAX_EF_SEARCH = 1000
MAX_SCANNED = 1_000_000  # rows that an approximate search goes through where a filter lets few pass
CONNECT_SECONDS = 10
IDLE_CONNECTIONS = 8
MAX_DEPTH = 16  # of maps in maps, in fields that a filter can name
CHUNK = 500  # rows of one statement
ITEM = tuple(field.name for field in fields(Item))


def parse_url(url: str) -> tuple[str, str]:
    """What libpq takes of a URL, and the name of the collection, empty where it names none. Raises UserError."""
    parts = urlsplit(str(url))
    if parts.scheme not in SCHEMES:
        raise UserError(
            f"{parts.scheme or 'this'} is no URL of PostgreSQL: postgresql://USER@HOST/DATABASE?collection=NAME"
        )
    given = parse_qsl(parts.query, keep_blank_values=True)
    name = next((value for key, value in given if key == COLLECTION), "")
    others = urlencode([pair for pair in given if pair[0] != COLLECTION], quote_via=quote)
    return f"{parts.scheme}://{parts.netloc}{parts.path}{'?' if others else ''}{others}", name


def shown(url: str) -> str:
    """A URL without its password and its settings, for messages."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user.split(':')[0]}{at}{host}{parts.path}"


class PostgresIndex(Index):
    """An `Index`; see `create` and `open`. May be used from several threads, each call by a connection of its own.

    A connection that was lost, as when the server was restarted, is made again once.
    """

    def __init__(self, url: str, row: tuple[int, str, str, str, int]):
        self.url = url
        self._number, self.name, self.model, self.run, self.dim = row
        self._idle: queue.LifoQueue = queue.LifoQueue(IDLE_CONNECTIONS)
        self._table = f"{ITEMS}_{self._number}"
        self._type = "vector" if self.dim <= MAX_VECTOR else "halfvec"

    # collections

    @classmethod
    def create(cls, url: str, name: str, model: str, run: str, dim: int) -> PostgresIndex:
        """Begin a collection, or go on with it where it is of the same model and dimension. Makes the extension and
        the tables where there are none.

        name: what the collection is called where the URL does not say collection=NAME. Raises UserError.
        """
        address, named = parse_url(url)
        name = named or name
        if not name or not name.isprintable() or len(name) > 200:
            raise UserError("name the collection: postgresql://...?collection=NAME")
        if not 1 <= dim <= MAX_DIM:
            raise UserError(f"pgvector's HNSW takes 1 to {MAX_DIM} dimensions, not {dim}: train a smaller "
                            "heads.retrieval.embed_dim")  # fmt: skip

        def work(connection) -> PostgresIndex:
            with connection.transaction():
                _lock(connection)
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
                _check_extension(connection, address)
                connection.execute(
                    f"CREATE TABLE IF NOT EXISTS {REGISTRY} (number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
                    "name text UNIQUE NOT NULL, model text NOT NULL, run text NOT NULL, dim integer NOT NULL, "
                    "made timestamptz NOT NULL DEFAULT now())"
                )
                connection.execute(
                    f"INSERT INTO {REGISTRY} (name, model, run, dim) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                    (name, model, run, dim),
                )
                index = cls(address, _find(connection, name))
                index._create_table(connection)
            if (index.model, index.dim) != (model, dim):
                raise UserError(
                    f"the collection {name} was made by another model ({index.run}, hash {index.model[:12]}, "
                    f"{index.dim} dimensions; this one {model[:12]}, {dim}): give another collection=NAME"
                )
            return index

        return _once(address, work)

    @classmethod
    def open(cls, url: str) -> PostgresIndex:
        """The collection that a URL names, or the only one of the database. Raises UserError."""
        address, name = parse_url(url)

        def work(connection) -> PostgresIndex:
            _check_extension(connection, address)
            return cls(address, _find(connection, name))

        return _once(address, work)

    @classmethod
    def drop(cls, url: str) -> None:
        """Delete the collection that a URL names, with all its items. Raises UserError."""
        address, name = parse_url(url)
        if not name:
            raise UserError("name the collection that is to be deleted: postgresql://...?collection=NAME")

        def work(connection) -> None:
            with connection.transaction():
                _lock(connection)
                number = _find(connection, name)[0]
                connection.execute(_sql("DROP TABLE IF EXISTS {}", f"{ITEMS}_{number}"))
                connection.execute(f"DELETE FROM {REGISTRY} WHERE number = %s", (number,))

        _once(address, work)

    def _create_table(self, connection) -> None:
        """`item` is JSON with every item as it was given; the other columns are for filters and for people."""
        connection.execute(
            _sql(
                "CREATE TABLE IF NOT EXISTS {} (modality text NOT NULL, id text NOT NULL, source text NOT NULL, "
                "fields jsonb NOT NULL, item bytea NOT NULL, embedding {} NOT NULL, PRIMARY KEY (modality, id)) "
                "PARTITION BY LIST (modality)",
                self._table,
                _sql(f"{self._type}({self.dim})"),
            )
        )
        for column, using in (("id", "btree (id)"), ("fields", "gin (fields jsonb_path_ops)")):
            name = f"{self._table}_{column}"
            connection.execute(_sql("CREATE INDEX IF NOT EXISTS {} ON {} USING {}", name, self._table, _sql(using)))

    # connections

    @contextlib.contextmanager
    def _connection(self, fresh: bool = False) -> Iterator[Any]:
        """A connection, which is kept for later calls unless it broke."""
        connection = None
        with contextlib.suppress(queue.Empty):
            while connection is None and not fresh:
                connection = self._idle.get_nowait()
        connection = connection or _connect(self.url)
        try:
            yield connection
            if not connection.closed:
                self._idle.put_nowait(connection)
                connection = None
        except queue.Full:
            pass
        finally:
            if connection is not None:
                connection.close()

    def _run(self, work: Callable[[Any], T]) -> T:
        """What `work` makes of a connection; once more where an idle one turns out to be lost. Raises UserError."""
        import psycopg

        for fresh in (False, True):
            try:
                with self._connection(fresh) as connection:
                    return work(connection)
            except psycopg.OperationalError as error:
                if fresh:
                    raise _explain(error, self.url) from None
            except psycopg.Error as error:
                raise _explain(error, self.url) from None
        raise AssertionError

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    # what an index answers

    def __len__(self) -> int:
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        statement = _sql("SELECT modality, count(*) FROM {} GROUP BY modality ORDER BY modality", self._table)
        return dict(self._run(lambda connection: connection.execute(statement).fetchall()))

    def search(self, vectors: np.ndarray, top: int, modality: str = "", where: Where | None = None) -> list[list[Hit]]:
        vectors = check_queries(vectors, self.dim, top)
        condition, values = _condition(modality, where)
        few = _sql("SELECT count(*) FROM (SELECT 1 FROM {} WHERE {} LIMIT %s)", self._table, condition)

        def work(connection) -> list[list[Hit]]:
            with connection.transaction():
                count = connection.execute(few, (*values, EXACT_ROWS + 1), prepare=False).fetchone()[0]
                exact = count <= EXACT_ROWS
                if not exact:
                    settings = {"iterative_scan": "strict_order", "max_scan_tuples": str(MAX_SCANNED),
                                "ef_search": str(min(max(2 * top, EF_SEARCH), MAX_EF_SEARCH))}  # fmt: skip
                    settings = {f"hnsw.{name}": value for name, value in settings.items()}
                    # Whatever the planner thinks of a table it has not analyzed yet: an HNSW index alone needs no sort.
                    for name, value in {**settings, "enable_sort": "off"}.items():
                        connection.execute("SELECT set_config(%s, %s, true)", (name, value))
                found = []
                for vector in vectors:
                    hits = self._nearest(connection, vector, top, condition, values, exact)
                    if not exact and len(hits) < top:  # the approximate search gave up before it had found them all
                        hits = self._nearest(connection, vector, top, condition, values, True)
                    found.append(hits)
                return found

        return self._run(work)

    def _nearest(self, connection, vector, top: int, condition, values: list, exact: bool) -> list[Hit]:
        """The nearest rows. Where it is to be exact, the order is by an expression that no HNSW index knows."""
        from psycopg import sql

        distance = sql.SQL("(embedding <=> %s) + 0" if exact else "embedding <=> %s")
        statement = _sql("SELECT item, embedding <=> %s FROM {} WHERE {} ORDER BY {} LIMIT %s",
                         self._table, condition, distance)  # fmt: skip
        given = self._to_vector(vector)
        # Not prepared: such a plan would be made without knowing how many rows the filter keeps.
        rows = connection.execute(statement, (given, *values, given, top), binary=True, prepare=False).fetchall()
        return [Hit(_to_item(item), 1.0 - float(distance)) for item, distance in rows]

    def get(self, ids: Sequence[str]) -> list[tuple[Item, np.ndarray]]:
        statement = _sql("SELECT item, embedding FROM {} WHERE id = ANY(%s)", self._table)
        known = [one for one in dict.fromkeys(ids) if "\0" not in one and _is_utf8(one)]
        rows = self._run(lambda connection: connection.execute(statement, (known,), binary=True).fetchall())
        found = {item.id: (item, _to_array(vector)) for item, vector in ((_to_item(r[0]), r[1]) for r in rows)}
        return [found[one] for one in ids if one in found]

    def sample(self, modality: str, count: int) -> np.ndarray:
        statement = _sql("SELECT embedding FROM {} WHERE modality = %s ORDER BY hashtextextended(id, 0) LIMIT %s",
                         self._table)  # fmt: skip
        rows = self._run(lambda connection: connection.execute(statement, (modality, count), binary=True).fetchall())
        return np.stack([_to_array(row[0]) for row in rows]) if rows else np.empty((0, self.dim), np.float32)

    def add(self, items: Iterable[Item], vectors: np.ndarray) -> None:
        items = list(items)
        vectors = check_vectors(vectors, len(items), self.dim)
        rows = [_to_row(item, self._to_vector(vector))
                for item, vector in sorted(zip(items, vectors, strict=True), key=lambda pair: pair[0].id)]  # fmt: skip
        rows = list({row[1]: row for row in rows}.values())  # of one id the last; in one order, so that none deadlock
        moved = _sql("DELETE FROM {} AS old USING unnest(%s::text[], %s::text[]) AS new(id, modality) "
                     "WHERE old.id = new.id AND old.modality <> new.modality", self._table)  # fmt: skip
        upsert = _sql(
            "INSERT INTO {} (modality, id, source, fields, item, embedding) VALUES (%s, %s, %s, %s::jsonb, %s, %s) "
            "ON CONFLICT (modality, id) DO UPDATE SET source = excluded.source, fields = excluded.fields, "
            "item = excluded.item, embedding = excluded.embedding", self._table)  # fmt: skip

        def work(connection) -> None:
            with connection.transaction():
                self._create_partitions(connection, {row[0] for row in rows})
                connection.execute(moved, ([row[1] for row in rows], [row[0] for row in rows]))
                with connection.cursor() as cursor:
                    for start in range(0, len(rows), CHUNK):
                        cursor.executemany(upsert, rows[start : start + CHUNK])

        if rows:
            self._run(work)

    def delete(self, ids: Sequence[str]) -> int:
        statement = _sql("DELETE FROM {} WHERE id = ANY(%s)", self._table)
        known = [one for one in ids if "\0" not in one and _is_utf8(one)]
        return self._run(lambda connection: connection.execute(statement, (known,)).rowcount)

    def build(self) -> None:
        """Make the HNSW indexes, by the cosine, of the modalities that are too large for an exact search.

        To be called when a collection has been filled: what is added later goes into them by itself, but more slowly
        than here. Who writes waits meanwhile. Without them every answer is exact, and slow. The vectors should fit
        into the server's `maintenance_work_mem`. Raises UserError.
        """

        def work(connection) -> None:
            for modality, count in self.counts().items():
                if count > EXACT_ROWS:
                    name = self._partition(modality)
                    connection.execute(
                        _sql(
                            "CREATE INDEX IF NOT EXISTS {} ON {} USING hnsw (embedding {})",
                            f"{name}_hnsw",
                            name,
                            _sql(f"{self._type}_cosine_ops"),
                        )
                    )
            connection.execute(_sql("ANALYZE {}", self._table))

        self._run(work)

    def _partition(self, modality: str) -> str:
        if not modality.isidentifier() or len(modality.encode()) > 30:
            raise UserError(f"the modality {modality[:40]!r} is no name of at most 30 letters, digits and _")
        return f"{self._table}_{modality}"

    def _create_partitions(self, connection, modalities: set[str]) -> None:
        from psycopg import sql

        for modality in sorted(modalities):
            name = self._partition(modality)
            if connection.execute("SELECT to_regclass(%s)", (f'"{name}"',)).fetchone()[0] is None:
                _lock(connection)
                connection.execute(_sql("CREATE TABLE IF NOT EXISTS {} PARTITION OF {} FOR VALUES IN ({})", name,
                                        self._table, sql.Literal(modality)))  # fmt: skip

    def _to_vector(self, vector: np.ndarray) -> Any:
        from pgvector import HalfVector, Vector

        return Vector(vector) if self._type == "vector" else HalfVector(vector)


def _sql(statement: str, *parts: Any) -> Any:
    """A statement with names of tables (str), which are quoted, and pieces of SQL in place of {}."""
    from psycopg import sql

    quoted = (sql.Identifier(part) if isinstance(part, str) else part for part in parts)
    return sql.SQL(cast(Any, statement)).format(*quoted)


def _condition(modality: str, where: Where | None) -> tuple[Any, list]:
    """The condition of a filter, and the values that are bound to it.

    As `corpus.fields.matches` has it: fields are compared as Python's text of them, and one that is missing is None.
    """
    from psycopg import sql

    terms, values = ["TRUE"], []
    if modality:
        terms, values = [*terms, "modality = %s"], [modality]
    for name, value in (where or {}).items():
        name, value = _escape(name), _escape(str(value))
        if value == "None":
            terms, values = [*terms, "COALESCE(fields ->> %s, 'None') = 'None'"], [*values, name]
        else:
            terms, values = [*terms, "fields @> %s::jsonb"], [*values, json.dumps({name: value})]
    return sql.SQL(cast(Any, " AND ".join(terms))), values


def _to_row(item: Item, vector: Any) -> tuple:
    if "\0" in item.id or not _is_utf8(item.id) or len(item.id) > 1000:
        raise UserError(f"the item {item.id[:50]!r} has an id that PostgreSQL cannot hold")
    data = json.dumps(vars(item), default=str).encode()  # ASCII: halves of characters and NUL are escaped
    return item.modality, item.id, _escape(item.source), json.dumps(_flatten(item.fields)), data, vector


def _flatten(row: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Every field that a filter can name, by the path with dots that names it, and the text that it is compared as."""
    flat = {}
    for key, value in row.items():
        if "." in str(key):
            continue  # no path leads there
        is_map = isinstance(value, dict)
        flat[_escape(f"{prefix}{key}")] = "{...}" if is_map else _escape(str(value))  # no value, but not missing either
        if is_map and depth < MAX_DEPTH:
            flat |= _flatten(value, f"{prefix}{key}.", depth + 1)
    return flat


def _escape(text: str) -> str:
    """A text that PostgreSQL can hold: without NUL and halves of characters. Different ones stay different."""
    text = text.replace("\\", "\\\\").replace("\0", "\\0")
    return text.encode("utf-8", "backslashreplace").decode()


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _to_item(data: bytes) -> Item:
    row = json.loads(data)
    return Item(**{name: row[name] for name in ITEM})


def _to_array(vector: Any) -> np.ndarray:
    return np.asarray(vector.to_numpy(), dtype=np.float32)


# the server


def _connect(url: str) -> Any:
    """A connection in autocommit, on which vectors are known where the extension is there. Raises UserError."""
    try:
        import psycopg
        from pgvector.psycopg import register_vector
    except ImportError:
        raise UserError('a collection in PostgreSQL needs psycopg: pip install "multimodal_fm[postgresql]"') from None
    try:
        connection = psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS)
        with contextlib.suppress(psycopg.ProgrammingError):  # there is no extension yet
            register_vector(connection)
    except psycopg.Error as error:
        raise _explain(error, url) from None
    return connection


def _once(url: str, work: Callable[[Any], T]) -> T:
    """What `work` makes of a connection of its own. Raises UserError."""
    connection = _connect(url)
    import psycopg

    try:
        return work(connection)
    except psycopg.Error as error:
        raise _explain(error, url) from None
    finally:
        connection.close()


def _explain(error: Exception, url: str) -> UserError:
    """One line of what the server says, and what mends it."""
    from psycopg import errors

    said = " ".join(str(error).split())
    mend = ""
    if isinstance(error, (errors.UndefinedFile, errors.FeatureNotSupported)) and "vector" in said:
        mend = "; install pgvector 0.8 or newer on the server"
    elif isinstance(error, errors.InsufficientPrivilege) and "extension" in said:
        mend = "; let an administrator run CREATE EXTENSION vector in this database once"
    elif isinstance(error, errors.UndefinedTable):
        mend = "; the collection was deleted meanwhile"
    return UserError(printable(f"{shown(url)}: {said}{mend}"))


def _check_extension(connection, url: str) -> None:
    row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    if row is None:
        raise UserError(
            f"{shown(url)}: the database has no pgvector and so no collection: mmfm index DIR --to URL makes one"
        )
    if tuple(map(int, row[0].split(".")[:2])) < (0, 8):
        raise UserError(f"{shown(url)}: pgvector {row[0]} is too old: 0.8 or newer searches under filters")


def _find(connection, name: str) -> tuple[int, str, str, str, int]:
    """The row of a collection; without a name that of the only one. Raises UserError."""
    rows = []
    if connection.execute("SELECT to_regclass(%s)", (REGISTRY,)).fetchone()[0] is not None:
        rows = connection.execute(f"SELECT number, name, model, run, dim FROM {REGISTRY} ORDER BY name").fetchall()
    chosen = [row for row in rows if row[1] == name or not name]
    if len(chosen) == 1:
        return chosen[0]
    have = ", ".join(row[1] for row in rows[:20]) or "none"
    what = f"there is no collection {name!r}" if name else "name a collection with ?collection=NAME"
    raise UserError(f"{what}; the database has: {have}")


def _lock(connection) -> None:
    """Until the transaction ends nobody else changes tables of collections."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
