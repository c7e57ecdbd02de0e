"""The tables of a store's database, and what is done to all rows of a generation at once."""

from __future__ import annotations

import sqlite3

SCHEMA = """
CREATE TABLE names (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, category INTEGER NOT NULL REFERENCES names (number),
    also_in TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL, hash TEXT NOT NULL,
    born INTEGER NOT NULL, died INTEGER, dropped INTEGER);
CREATE INDEX documents_by_id ON documents (id);
CREATE INDEX documents_by_birth ON documents (born);
CREATE INDEX documents_by_category ON documents (category) WHERE died IS NULL;
CREATE INDEX documents_dead ON documents (died) WHERE died IS NOT NULL;
CREATE INDEX documents_with_text ON documents (died) WHERE died IS NOT NULL AND hash <> '';
CREATE INDEX documents_dropped ON documents (dropped) WHERE dropped IS NOT NULL;
CREATE TABLE guests (
    category INTEGER NOT NULL, document INTEGER NOT NULL, PRIMARY KEY (category, document)) WITHOUT ROWID;
CREATE TABLE chunks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents (seq),
    start INTEGER NOT NULL, stop INTEGER NOT NULL, headings TEXT NOT NULL);
CREATE INDEX chunks_by_document ON chunks (document);
CREATE TABLE categories (
    name TEXT NOT NULL, description TEXT NOT NULL, examples TEXT NOT NULL, vectors BLOB NOT NULL, born INTEGER NOT NULL,
    died INTEGER);
"""
# A dead document has no text, and an empty hash, once nobody reads its generation any more (`purge`); the row goes
# when no segment holds its vectors: `dropped` is the generation that left them out of a merge.


def number_of(database: sqlite3.Connection, name: str) -> int:
    """The number of a category, given now if it has none."""
    row = database.execute("SELECT number FROM names WHERE name = ?", (name,)).fetchone()
    if row is None:
        row = database.execute("INSERT INTO names (name) VALUES (?) RETURNING number", (name,)).fetchone()
    return int(row[0])


def used_categories(database: sqlite3.Connection) -> int:
    """How many categories have documents; looks at one document of each, not at all."""
    return int(
        database.execute(
            "SELECT count(*) FROM names WHERE EXISTS (SELECT 1 FROM documents WHERE category = number AND died IS NULL) OR "
            "EXISTS (SELECT 1 FROM guests JOIN documents ON seq = document WHERE guests.category = number AND died IS NULL)"
        ).fetchone()[0]
    )


def undo_after(database: sqlite3.Connection, generation: int) -> None:
    """Take back rows of generations that were never published (a writer was killed)."""
    run = database.execute
    unborn = "(SELECT seq FROM documents WHERE born > ?)"
    run(f"DELETE FROM chunks WHERE document IN {unborn}", (generation,))
    run(f"DELETE FROM guests WHERE document IN {unborn}", (generation,))
    run("DELETE FROM documents WHERE born > ?", (generation,))
    run("DELETE FROM categories WHERE born > ?", (generation,))
    run("UPDATE documents SET died = NULL WHERE died > ?", (generation,))
    run("UPDATE documents SET dropped = NULL WHERE dropped > ?", (generation,))
    run("UPDATE categories SET died = NULL WHERE died > ?", (generation,))


def purge(database: sqlite3.Connection, horizon: int) -> None:
    """Forget the texts of documents that died in that generation or before, and their rows where no segment needs them."""
    run = database.execute
    gone = "(SELECT seq FROM documents WHERE died <= ? AND hash <> '')"
    touched = run(f"SELECT EXISTS {gone}", (horizon,)).fetchone()[0]
    run(f"DELETE FROM chunks WHERE document IN {gone}", (horizon,))
    run(f"DELETE FROM guests WHERE document IN {gone}", (horizon,))
    run(
        "UPDATE documents SET id = '', title = '', text = '', metadata = '{}', hash = '' WHERE died <= ? AND hash <> ''",
        (horizon,),
    )
    run("DELETE FROM documents WHERE dropped <= ? AND hash = ''", (horizon,))
    touched += run("DELETE FROM categories WHERE died <= ?", (horizon,)).rowcount
    if touched:
        run(f"PRAGMA user_version = {int(horizon)}")  # generations before this one are no longer whole
