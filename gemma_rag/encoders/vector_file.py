"""The SQLite file under `gemma_rag.encoders.cached`: vectors by key, the least recently used ones removed.

It holds no texts, only hashes of them, and vectors of any number of models:

    totals     one row: a clock that counts what was stored or used again, the entries, and their bytes
    entries    key, id, when last used by that clock, bytes of the vector
    vectors    id, the vector as little-endian float32 or float16
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gemma_rag.errors import InputError

BUSY_SECONDS = 10.0
"""How long to wait for another process that writes."""

_APPLICATION = 0x47524543  # "GREC", SQLite's application_id of our files
_FORMAT = 1
_CHUNK = 500  # parameters of a statement; SQLite before 3.32 takes 999
_PAGE_BYTES = 1024  # measured at 768 float32: with the holes of eviction 1.1 times the vectors' bytes, in 8 KiB pages 1.8
_CHECKPOINT_PAGES = 8192
_AFTER_EVICTION = 0.9


class VectorFile:
    """The SQLite file. Each method is one transaction; one thread at a time."""

    def __init__(self, file: Path, max_bytes: int) -> None:
        self.file, self.max_bytes = file, max_bytes
        self.evicted = 0
        self.lock = threading.RLock()
        self._closed = False
        self._release: weakref.finalize[[], VectorFile] | None = None
        self._connection: sqlite3.Connection | None = None
        with self._held():
            _OPEN.add(self)

    @contextlib.contextmanager
    def _held(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            if self._closed:
                raise InputError(f"the embedding cache {self.file} is closed: make another CachedEncoder")
            if self._connection is None:
                with refusing(self.file, "opened"):
                    self._connection = _connect(self.file)
                self._release = weakref.finalize(self, self._connection.close)
            yield self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._held() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def find(self, keys: Sequence[bytes]) -> list[tuple[bytes, bytes | None, bool]]:
        """Of the keys that are there: key, vector, and whether the entry's use is worth writing down."""
        with self._held() as db:
            return db.execute(
                "SELECT e.key, v.vector, e.used < (SELECT clock - entries / 8 FROM totals) "
                f"FROM entries e LEFT JOIN vectors v USING (id) WHERE e.key IN ({_marks(keys)})",
                keys,
            ).fetchall()

    def touch(self, keys: Sequence[bytes]) -> None:
        """Write down that entries were used, unless another process is writing just now."""
        if not keys:
            return
        with self._held() as db:
            db.execute("PRAGMA busy_timeout = 0")
            try:
                with contextlib.suppress(sqlite3.OperationalError), self._writing():
                    db.execute("UPDATE totals SET clock = clock + ?", (len(keys),))
                    for chunk in chunks(keys):
                        used = f"UPDATE entries SET used = (SELECT clock FROM totals) WHERE key IN ({_marks(chunk)})"
                        db.execute(used, chunk)
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}")

    def put(self, rows: Mapping[bytes, bytes], since: int | None) -> int | None:
        """Store vectors by key, in place of those there are, and evict.

        Returns:
            The id from which on entries are the call's own: `since`, or the first of these.
        """
        if not rows:
            return since
        with self._writing() as db:
            for chunk in chunks(list(rows)):
                old = db.execute(f"SELECT key, id, bytes FROM entries WHERE key IN ({_marks(chunk)})", chunk)
                _remove(db, old.fetchall())
            (clock,) = db.execute("SELECT clock FROM totals").fetchone()
            entries = [(key, i, i, len(vector)) for i, (key, vector) in enumerate(rows.items(), clock + 1)]
            db.executemany("INSERT INTO entries (key, id, used, bytes) VALUES (?, ?, ?, ?)", entries)
            db.executemany("INSERT OR REPLACE INTO vectors (id, vector) VALUES (?, ?)", enumerate(rows.values(), clock + 1))
            db.execute(
                "UPDATE totals SET clock = clock + ?, entries = entries + ?, bytes = bytes + ?",
                (len(rows), len(rows), sum(map(len, rows.values()))),
            )
            since = clock + 1 if since is None else since
            evicted = self._evict(db, since)
        if evicted:
            self.evicted += evicted
            self._shrink()
        return since

    def _evict(self, db: sqlite3.Connection, since: int) -> int:
        (total,) = db.execute("SELECT bytes FROM totals").fetchone()
        if total <= self.max_bytes:
            return 0
        victims = []
        oldest = db.execute("SELECT key, id, bytes FROM entries ORDER BY id >= ?, used, id", (since,))
        for key, number, size in oldest:
            if total <= self.max_bytes * (1.0 if number >= since else _AFTER_EVICTION):
                break
            victims.append((key, number, size))
            total -= size
        oldest.close()
        _remove(db, victims)
        return len(victims)

    def _shrink(self, spare: float = 1 / 8) -> None:
        """Give room back where twice this share of the file is free; not now if another process is writing."""
        with self._held() as db, contextlib.suppress(sqlite3.OperationalError):
            (free,), (pages,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_count"))
            if free > 2 * spare * pages:
                db.executescript(f"PRAGMA incremental_vacuum({free - int(spare * pages)})")  # `execute` frees one page only

    def totals(self) -> tuple[int, int]:
        """Entries, and the bytes of their vectors."""
        with self._held() as db:
            entries, size = db.execute("SELECT entries, bytes FROM totals").fetchone()
            return entries, size

    def clear(self) -> None:
        """Remove every entry, and give the room back."""
        with self._writing() as db:
            db.execute("DELETE FROM entries")
            db.execute("DELETE FROM vectors")
            db.execute("UPDATE totals SET entries = 0, bytes = 0")
        self._shrink(spare=0.0)
        with self._held() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def rest(self) -> None:
        """Close the connection until it is needed again."""
        if self._release is not None:
            self._release()
        self._connection = self._release = None

    def close(self) -> None:
        """Close it for good."""
        with self.lock:
            self._closed = True
            self.rest()


@contextlib.contextmanager
def refusing(file: Path, done: str) -> Iterator[None]:
    """Turn errors of the file into an `InputError` that names it, and the cure."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the message about a damaged schema may be no UTF-8
        busy = "locked" in str(error)
        cure = "Try again when other processes are done" if busy else "Give another path, or delete the file if nobody needs it"
        raise InputError(f"{file} cannot be {done} as an embedding cache: {error}. {cure}") from error


def chunks(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """As many as one statement takes."""
    return (keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK))


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _remove(db: sqlite3.Connection, entries: Sequence[tuple[bytes, int, int]]) -> None:
    """Remove entries, given as key, id and bytes."""
    db.executemany("DELETE FROM entries WHERE key = ?", ((key,) for key, _, _ in entries))
    db.executemany("DELETE FROM vectors WHERE id = ?", ((number,) for _, number, _ in entries))
    size = sum(size for _, _, size in entries)
    db.execute("UPDATE totals SET entries = entries - ?, bytes = bytes - ?", (len(entries), size))


def _connect(file: Path) -> sqlite3.Connection:
    """Open a cache; make it where there is none. Waits for others who are making it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + BUSY_SECONDS
    while True:
        db = sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            _prepare(db, file)
        except sqlite3.OperationalError as error:
            db.close()
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
        except BaseException:
            db.close()
            raise
        else:
            return db


def _prepare(db: sqlite3.Connection, file: Path) -> None:
    db.execute("PRAGMA synchronous = NORMAL")  # after a power cut the last vectors may be gone, and the file is whole
    db.execute("BEGIN")
    new = _is_new(db, file)
    db.execute("COMMIT")
    if new:
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        if _is_new(db, file):  # nobody else was faster
            db.execute("CREATE TABLE entries (key BLOB PRIMARY KEY, id INTEGER, used INTEGER, bytes INTEGER) WITHOUT ROWID")
            db.execute("CREATE TABLE vectors (id INTEGER PRIMARY KEY, vector BLOB)")
            db.execute("CREATE TABLE totals (clock INTEGER, entries INTEGER, bytes INTEGER)")
            db.execute("INSERT INTO totals VALUES (0, 0, 0)")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_FORMAT}")
        db.execute("COMMIT")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    db.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES}")
    if db.execute("SELECT clock, entries, bytes FROM totals").fetchone() is None:
        raise sqlite3.DatabaseError("its table of totals is empty")


def _is_new(db: sqlite3.Connection, file: Path) -> bool:
    """Whether the file is empty; one that others wrote is refused. In a transaction, as another may be making it just now."""
    (application,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not application and not version and not tables:
        return True
    if application != _APPLICATION:
        raise InputError(f"{file} is no embedding cache but another program's database: give another path")
    if version != _FORMAT:
        raise InputError(
            f"the embedding cache {file} has format {version}, and this version of gemma-rag reads format {_FORMAT}: "
            "give another path, or delete the file"
        )
    return False


_OPEN: weakref.WeakSet[VectorFile] = weakref.WeakSet()
_FORKING: list[VectorFile] = []


def _before_fork() -> None:
    """Close every connection: SQLite's locks break where a child process inherits an open one."""
    for held in list(_OPEN):
        held.lock.acquire()
        held.rest()
        _FORKING.append(held)


def _after_fork() -> None:
    while _FORKING:
        _FORKING.pop().lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
