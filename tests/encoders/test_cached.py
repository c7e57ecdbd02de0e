"""Vectors kept on disk: what is shared and what is not, what goes first, and what happens when the file fails."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_rag.documents import Document
from gemma_rag.encoders import EncoderSettings, Input, Space, TextEncoder, is_encoder, load_encoder, vector_file
from gemma_rag.encoders.cached import CachedEncoder, CacheStatistics
from gemma_rag.errors import EmbeddingServerError, InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.vectors import unit

DIMENSIONS = 4
ROW = 4 * DIMENSIONS


class HashEncoder:
    """Every different input has another vector, drawn by its hash; what came is kept in `calls`."""

    profile = NO_PROMPTS

    def __init__(self, dimensions: int = 4, **space: object) -> None:
        fields = {"model": "hash", "weights": "w", "prompts": "p", "dimensions": dimensions, "max_tokens": 9}
        fields |= {"overflow": "truncate", "runtime": "test", "precision": "float32"}
        self.space = Space(**{**fields, **space})
        self.calls: list[list[Input]] = []

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        self.calls.append(list(inputs))
        rows = np.empty((len(inputs), self.space.dimensions), dtype=np.float32)
        for row, (text, task, title) in zip(rows, inputs, strict=True):
            title = " ".join((title or "").split()) if task is Task.DOCUMENT else ""
            seed = sha256(repr((self.space.fingerprint, task.value, title, text)).encode()).digest()
            row[:] = np.random.default_rng(list(seed)).standard_normal(len(row))
        return unit(rows)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def queries(*texts: str) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def asked(encoder: HashEncoder) -> list[str]:
    """The texts that were computed since the last time."""
    texts = [item.text for call in encoder.calls for item in call]
    encoder.calls.clear()
    return texts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture
def inner() -> HashEncoder:
    return HashEncoder()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """A cache for all examples of a property."""
    with CachedEncoder(HashEncoder(), tmp_path_factory.mktemp("caches")) as encoder:
        yield encoder


# -- what is shared -------------------------------------------------------------------------------------------------


def test_a_text_is_computed_once_and_found_again_by_the_next_who_opens_the_file(inner, file):
    with CachedEncoder(inner, file) as encoder:
        assert is_encoder(encoder)
        first = encoder.encode(queries("a", "b", "a"))
        assert asked(inner) == ["a", "b"]
        assert encoder.encode(queries("b", "c")).shape == (2, DIMENSIONS)
        assert asked(inner) == ["c"]
    with CachedEncoder(inner, file) as encoder:
        again = encoder.encode(queries("a", "b", "a"))
        assert asked(inner) == []
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(again, HashEncoder().encode(queries("a", "b", "a")))


def test_what_a_caller_does_to_its_rows_does_not_reach_the_file(inner, file):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries("a"))[:] = 7.0
        encoder.encode(queries("a"))[:] = 8.0
        np.testing.assert_array_equal(encoder.encode(queries("a")), inner.encode(queries("a")))


def test_only_what_the_prompt_would_differ_in_makes_another_entry(inner, file):
    same = [Input("x", Task.DOCUMENT, title) for title in ("A  b", " A\nb ", "A b")]
    untitled = [Input("x", Task.DOCUMENT, title) for title in (None, "", " \t\n")]
    as_query = [Input("x", Task.QUERY, title) for title in (None, "A b")]
    with CachedEncoder(inner, file) as encoder:
        rows = encoder.encode([*same, *untitled, *as_query])
    assert len(asked(inner)) == 3
    assert np.unique(rows, axis=0).shape == (3, DIMENSIONS)
    assert (rows[:3] == rows[0]).all()
    assert (rows[3:6] == rows[3]).all()


def test_where_a_title_ends_and_the_text_begins_makes_a_difference(inner, file):
    pairs = [("b", "a"), ("ab", None), ("b", "a 1"), ("1 b", "a"), ("\x001\x00a", "b"), ("a", "b \x001\x00")]
    with CachedEncoder(inner, file) as encoder:
        encoder.encode([Input(text, Task.DOCUMENT, title) for text, title in pairs])
        encoder.encode([Input("ab", Task.DOCUMENT, "c"), Input("b", Task.DOCUMENT, "ca")])
        assert encoder.statistics().entries == len(pairs) + 2


def test_every_task_has_entries_of_its_own_even_where_no_prompt_tells_them_apart(inner, file):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode([Input("x", task) for task in Task])
        assert encoder.statistics().entries == len(Task) == len(asked(inner))


@given(
    st.lists(
        st.builds(
            Input,
            st.text(alphabet="ab1\0\n |:", min_size=1).filter(str.strip),
            st.sampled_from([Task.QUERY, Task.DOCUMENT]),
            st.one_of(st.none(), st.text(alphabet="ab1\0\n |:")),
        ),
        max_size=30,
    )
)
def test_two_inputs_share_a_key_only_if_they_are_the_same_to_the_model(shared, inputs):
    keys = shared._keys(inputs)
    seen = [(task, " ".join((title or "").split()) if task is Task.DOCUMENT else "", text) for text, task, title in inputs]
    assert [keys.index(key) for key in keys] == [seen.index(item) for item in seen]


def test_a_lone_surrogate_has_a_key_and_another_than_the_character_it_is_half_of(inner, file):
    with CachedEncoder(inner, file) as encoder:
        keys = encoder._keys(queries("\ud83d\ude00", "\U0001f600", "\ud83d"))
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "other"},
        {"prompts": "other"},
        {"dimensions": 5},
        {"max_tokens": 8},
        {"overflow": "average"},
        {"runtime": "other"},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_space_has_entries_of_its_own_in_the_same_file(inner, file, change):
    other = HashEncoder(**change)
    with CachedEncoder(inner, file) as mine, CachedEncoder(other, file) as theirs:
        mine.encode(queries("a"))
        np.testing.assert_array_equal(theirs.encode(queries("a")), HashEncoder(**change).encode(queries("a")))
        assert asked(other) == ["a"]
        assert mine.statistics().entries == 2


def test_the_models_mere_name_makes_no_difference(inner, file):
    other = HashEncoder(model="a copy of hash")
    with CachedEncoder(inner, file) as mine, CachedEncoder(other, file) as theirs:
        mine.encode(queries("a"))
        theirs.encode(queries("a"))
    assert asked(other) == []


@given(
    st.lists(
        st.lists(
            st.builds(
                Input, st.sampled_from("abcdefgh"), st.sampled_from([Task.QUERY, Task.DOCUMENT]), st.sampled_from([None, "T"])
            ),
            max_size=12,
        ),
        max_size=8,
    ),
    st.integers(1, 5),
    st.sampled_from([1, 3 * ROW, 8 * ROW, 2**20]),
)
@settings(max_examples=40)
def test_any_calls_give_exactly_what_the_encoder_gives(shared, calls, window, max_bytes):
    with CachedEncoder(HashEncoder(), shared.file, window=window, max_bytes=max_bytes) as encoder:
        for inputs in calls:
            np.testing.assert_array_equal(encoder.encode(inputs), HashEncoder().encode(inputs))
        statistics = encoder.statistics()
        assert statistics.bytes <= max_bytes or statistics.misses == 0


def test_nothing_in_nothing_out(inner, file):
    with CachedEncoder(inner, file) as encoder:
        assert encoder.encode([]).shape == (0, DIMENSIONS)


# -- statistics, opening and closing --------------------------------------------------------------------------------


def test_different_inputs_are_counted_as_hits_and_misses(inner, file):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries("a", "a", "b"))
        encoder.encode(queries("a", "c", "c", "a"))
        assert encoder.statistics() == CacheStatistics(hits=1, misses=3, evicted=0, entries=3, bytes=3 * ROW)
    with CachedEncoder(inner, file) as encoder:
        assert encoder.statistics() == CacheStatistics(hits=0, misses=0, evicted=0, entries=3, bytes=3 * ROW)


def test_clearing_removes_everything_and_gives_the_space_back(file):
    inner = HashEncoder(64)
    with CachedEncoder(inner, file) as encoder:
        texts = queries(*map(str, range(2000)))
        encoder.encode(texts)
        encoder.clear()
        assert (encoder.statistics().entries, encoder.statistics().bytes) == (0, 0)
        assert file.stat().st_size < 20_000
        asked(inner)
        encoder.encode(texts[:5])
        assert len(asked(inner)) == 5


def test_a_closed_cache_says_so_and_closing_twice_is_no_error(inner, file):
    encoder = CachedEncoder(inner, file)
    encoder.close()
    encoder.close()
    with pytest.raises(InputError, match=r"cache\.sqlite is closed"):
        encoder.encode(queries("a"))
    with pytest.raises(InputError, match=r"cache\.sqlite is closed"):
        encoder.clear()


def test_a_cache_that_nobody_closed_is_closed_when_it_is_collected(inner, file):
    encoder = CachedEncoder(inner, file)
    encoder.encode(queries("a"))
    journal = file.with_name("cache.sqlite-wal")
    assert journal.exists()
    del encoder
    gc.collect()
    assert not journal.exists()


def test_a_folder_a_file_and_what_does_not_exist_yet(inner, tmp_path):
    (tmp_path / "there.is").mkdir()
    (tmp_path / "plain").touch()
    places = {
        "there.is": "there.is/embeddings.sqlite",
        "new/folder": "new/folder/embeddings.sqlite",
        "new/file.db": "new/file.db",
        "plain": "plain",
    }
    for given_path, expected in places.items():
        with CachedEncoder(inner, tmp_path / given_path) as encoder:
            encoder.encode(queries("a"))
            assert encoder.file == tmp_path / expected
            assert encoder.file.stat().st_size > 0


def test_the_file_has_no_text_in_it(inner, file):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode([Input("a secret question", Task.DOCUMENT, "a secret title")])
    assert b"secret" not in file.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "keeps float32 or float16, not 'int8'"),
        ({"max_bytes": 0}, "max_bytes and window are at least 1, and 0 and 2048 came"),
        ({"window": 0}, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(inner, file, options, message):
    with pytest.raises(InputError, match=message):
        CachedEncoder(inner, file, **options)


def test_what_is_no_encoder_is_refused(file):
    with pytest.raises(InputError, match="a cache needs an Encoder or GemmaEmbeddings to compute what is missing, not str"):
        CachedEncoder("embeddinggemma", file)


def test_space_profile_and_token_counts_are_those_of_the_encoder_inside(inner, file):
    with CachedEncoder(inner, file, precision="float16") as encoder:
        assert encoder.space == inner.space
        assert encoder.profile is inner.profile
        assert encoder.count_tokens(["a b", "c"]) == [2, 1]


def test_a_pickled_cache_opens_the_same_file(inner, file):
    with CachedEncoder(inner, file, precision="float16", max_bytes=99, window=3) as encoder:
        rows = encoder.encode(queries("a"))
        with pickle.loads(pickle.dumps(encoder)) as other:
            assert (other.file, other.precision, other.max_bytes, other.window) == (file, "float16", 99, 3)
            np.testing.assert_array_equal(other.encode(queries("a")), rows)
            assert other.statistics().hits == 1


# -- float16 --------------------------------------------------------------------------------------------------------


def test_float16_takes_half_the_room_and_loses_less_than_it_says(file):
    inner = HashEncoder(256)
    texts = queries(*map(str, range(500)))
    with CachedEncoder(inner, file, precision="float16") as encoder:
        rows = encoder.encode(texts)
        assert encoder.statistics().bytes == 500 * 2 * 256
    exact = inner.encode(texts).astype(np.float64)
    rounded = rows.astype(np.float64)
    cosines = (exact * rounded).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert 1e-9 < 1.0 - cosines.min() < 1.2e-7
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1.0, atol=2e-7)


def test_with_float16_a_row_is_the_same_whether_it_was_there_or_not(inner, file):
    with CachedEncoder(inner, file, precision="float16") as encoder:
        computed = encoder.encode(queries("a", "b", "c"))
        for texts, places in (("a", [0]), ("cab", [2, 0, 1]), ("bxa", [1, None, 0])):
            rows = encoder.encode(queries(*texts))
            for row, place in zip(rows, places, strict=True):
                if place is not None:
                    np.testing.assert_array_equal(row, computed[place])
    assert not np.array_equal(computed, inner.encode(queries("a", "b", "c")))


def test_the_two_precisions_share_no_entry(inner, file):
    with CachedEncoder(inner, file, precision="float16") as half, CachedEncoder(inner, file) as full:
        half.encode(queries("a"))
        np.testing.assert_array_equal(full.encode(queries("a")), inner.encode(queries("a")))
        assert full.statistics().entries == 2


# -- what goes first ------------------------------------------------------------------------------------------------


def kept(file: Path, encoder: HashEncoder, texts: str) -> str:
    """Which of these texts the file has, without using them."""
    with CachedEncoder(encoder, file) as other:
        found = {key for key, _, _ in other._vectors.find(other._keys(queries(*texts)))}
        return "".join(text for text, key in zip(texts, other._keys(queries(*texts)), strict=True) if key in found)


def test_the_least_recently_used_goes_first_down_to_nine_tenths(inner, file):
    with CachedEncoder(inner, file, max_bytes=5 * ROW) as encoder:
        for text in "abcde":
            encoder.encode(queries(text))
        encoder.encode(queries("a"))
        encoder.encode(queries("c"))
        encoder.encode(queries("f"))  # six rows; b and d leave four, which is less than nine tenths of five
        assert kept(file, inner, "abcdef") == "acef"
        encoder.encode(queries("e"))
        encoder.encode(queries("g", "h"))  # six again: a and c are the oldest now
        assert kept(file, inner, "abcdefgh") == "efgh"
        assert encoder.statistics() == CacheStatistics(hits=3, misses=8, evicted=4, entries=4, bytes=4 * ROW)


@pytest.mark.parametrize("window", [1, 2, 10])
@pytest.mark.parametrize(("texts", "stay"), [("xy", "xy"), ("wxyz", "wxyz"), ("uvwxyz", "wxyz")])
def test_what_a_call_stores_stays_and_of_too_much_the_newest(inner, file, window, texts, stay):
    with CachedEncoder(inner, file, max_bytes=4 * ROW, window=window) as encoder:
        encoder.encode(queries("a", "b", "c"))
        encoder.encode(queries(*texts))
        others = "c" if texts == "xy" else ""  # five rows, down to 3.6
        assert kept(file, inner, "abc" + texts) == others + stay


def test_what_a_call_stores_stays_even_where_others_were_used_meanwhile(inner, file):
    class Meanwhile(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            if inputs[0].text == "y":
                with CachedEncoder(inner, file) as other:
                    other.encode(queries("a", "b", "c"))
            return super().encode(inputs)

    with CachedEncoder(Meanwhile(), file, max_bytes=4 * ROW, window=1) as encoder:
        encoder.encode(queries("a", "b", "c"))
        encoder.encode(queries("x", "y"))
        assert kept(file, inner, "abcxy") == "cxy"
    assert asked(inner) == []


def test_a_bound_below_one_vector_keeps_nothing(inner, file):
    with CachedEncoder(inner, file, max_bytes=ROW - 1) as encoder:
        np.testing.assert_array_equal(encoder.encode(queries("a", "b")), inner.encode(queries("a", "b")))
        assert encoder.statistics().entries == 0


def test_a_smaller_bound_on_a_full_file_holds_from_the_next_store_and_shrinks_it(file):
    inner = HashEncoder(64)
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries(*map(str, range(2000))))
    before = file.stat().st_size
    with CachedEncoder(inner, file, max_bytes=100 * 256) as encoder:
        assert encoder.statistics().entries == 2000
        encoder.encode(queries("new"))
        assert encoder.statistics().entries == 90
        assert encoder.statistics().evicted == 1911
    assert file.stat().st_size < before / 2


def test_the_vectors_never_pass_the_bound_and_the_file_stays_near_it(file):
    inner, bound = HashEncoder(256), 200 * 1024
    draw = np.random.default_rng(0)
    stored = 0
    with CachedEncoder(inner, file, max_bytes=bound) as encoder:
        for _ in range(60):
            encoder.encode(queries(*map(str, draw.integers(0, 1000, size=40))))
            statistics = encoder.statistics()
            assert statistics.bytes <= bound
            assert statistics.entries == statistics.misses - statistics.evicted
            stored = statistics.misses
    assert stored > 1000  # the bound was passed many times
    assert file.stat().st_size < 1.6 * bound + 20_000
    with closing(sqlite3.connect(file)) as db:
        counted = db.execute("SELECT count(*), sum(bytes), count(DISTINCT id) FROM entries").fetchone()
        assert counted == (statistics.entries, statistics.bytes, statistics.entries)
        assert db.execute("SELECT count(*), sum(length(vector)) FROM vectors").fetchone() == counted[:2]
        assert db.execute("SELECT count(*) FROM vectors JOIN entries USING (id)").fetchone() == counted[:1]


def test_the_use_of_an_entry_is_written_down_only_where_others_were_used_since(inner, file):
    with CachedEncoder(inner, file) as encoder, closing(sqlite3.connect(file)) as db:
        encoder.encode(queries(*"abcdefghijklmnop"))  # 16 entries: an eighth is 2

        def writes(text: str) -> bool:
            (before,) = db.execute("PRAGMA data_version").fetchone()
            encoder.encode(queries(text))
            return db.execute("PRAGMA data_version").fetchone() != (before,)

        assert [writes(text) for text in "pona"] == [False, False, False, True]
        assert [writes(text) for text in "aomo"] == [False, False, True, True]


# -- errors of the encoder inside -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Input(" ", Task.QUERY), "the text at index 7 is empty"),
        (Input(3, Task.QUERY), "the text at index 7 is no string but int"),
        (Input("x", "query"), "the task at index 7 is 'query'"),
    ],
)
def test_bad_input_is_named_by_its_place_in_the_callers_list(inner, file, bad, message):
    with CachedEncoder(inner, file, window=2) as encoder:
        encoder.encode(queries(*"abcde"))
        asked(inner)
        with pytest.raises(InputError, match=message):
            encoder.encode([*queries(*"abcdefg"), bad])
        assert asked(inner) == []


class Picky(HashEncoder):
    """Refuses texts of two letters, before it computes anything, as ``on_overflow="error"`` does."""

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        places = [i for i, item in enumerate(inputs) if len(item.text) > 1]
        if places:
            raise InputError(f"{len(places)} of {len(inputs)} texts are too long: {places}")
        return super().encode(inputs)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_refusal_names_places_in_the_callers_list(file, asynchronous):
    class Both(Picky):
        async def aencode(self, inputs: Sequence[Input]) -> np.ndarray:
            return self.encode(inputs)

    inner = Both()
    with CachedEncoder(inner, file, window=2) as encoder:
        encoder.encode(queries("a", "b"))
        inputs = queries("a", "a", "c", "d", "b", "ee", "f", "gg")
        with pytest.raises(InputError, match=r"^2 of 8 texts are too long: \[5, 7\]$"):
            await encoder.aencode(inputs) if asynchronous else encoder.encode(inputs)
        assert kept(file, inner, "abcdf") == "abcd"  # the window before the refusal is not lost


def test_an_encoder_that_refuses_once_and_then_does_not_is_taken_at_its_word(file):
    class Moody(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            if len(self.calls) == 1:
                self.calls.append([])
                raise InputError("not now")
            return super().encode(inputs)

    with CachedEncoder(Moody(), file, window=2) as encoder:
        np.testing.assert_array_equal(encoder.encode(queries(*"abcab")), HashEncoder().encode(queries(*"abcab")))
        assert encoder.statistics().entries == 3


def test_rows_of_another_shape_are_refused(file):
    class Wide(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            return np.ones((1, 7), dtype=np.float32)

    with (
        CachedEncoder(Wide(), file) as encoder,
        pytest.raises(InputError, match=r"shape \(1, 7\) for 2 texts, and its space has 4 dimensions"),
    ):
        encoder.encode(queries("a", "b"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_rows_that_are_no_unit_vectors_pass_through_and_are_not_kept(file, precision):
    class Broken(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            rows = super().encode(inputs)
            rows[0], rows[1] = np.nan, 2.0
            return rows

    with CachedEncoder(Broken(), file, precision=precision) as encoder:
        rows = encoder.encode(queries("a", "b", "c"))
        assert np.isnan(rows[0]).all()
        assert (rows[1] == 2.0).all()
        assert encoder.statistics().entries == 1


class Server(HashEncoder):
    """Computes the texts that are not in `fails`, and then fails for those that are."""

    fails = ""

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        rows = super().encode(inputs)
        done = {i: rows[i] for i, item in enumerate(inputs) if item.text not in self.fails}
        if len(done) < len(inputs):
            error = EmbeddingServerError("503", url="http://localhost", status=503)
            error.finished = done
            raise error
        return rows


class AsyncServer(Server):
    awaited = 0

    async def aencode(self, inputs: Sequence[Input]) -> np.ndarray:
        self.awaited += 1
        await asyncio.sleep(0)
        return self.encode(inputs)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16"])
async def test_when_a_server_fails_what_it_finished_is_kept_and_told_by_the_callers_places(file, asynchronous, precision):
    inner = AsyncServer()
    with CachedEncoder(inner, file, window=3, precision=precision) as encoder:
        hit = encoder.encode(queries("h"))
        inner.fails = "xy"
        asked(inner)
        inputs = queries(*"a", *"ahbxcxdyze")  # windows: a b x | then nothing: the first failure ends the call
        with pytest.raises(EmbeddingServerError, match="503") as failed:
            await encoder.aencode(inputs) if asynchronous else encoder.encode(inputs)
        assert asked(inner) == ["a", "b", "x"]
        assert sorted(failed.value.finished) == [0, 1, 2, 3]  # a, a, h, b
        np.testing.assert_array_equal(failed.value.finished[2], hit[0])
        inner.fails = ""
        rows = encoder.encode(inputs)
        assert asked(inner) == ["x", "c", "d", "y", "z", "e"]
        for place, row in failed.value.finished.items():
            np.testing.assert_array_equal(row, rows[place])


def test_a_server_that_finished_nothing_leaves_the_hits(file):
    inner = Server()
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries("h"))
        inner.fails = "x"
        with pytest.raises(EmbeddingServerError) as failed:
            encoder.encode(queries("x", "h"))
        assert list(failed.value.finished) == [1]


# -- async, streams and threads -------------------------------------------------------------------------------------


async def test_aencode_awaits_the_encoders_own(file):
    inner = AsyncServer()
    with CachedEncoder(inner, file, window=2) as encoder:
        rows = await asyncio.gather(encoder.aencode(queries(*"abc")), encoder.aencode(queries(*"cde")))
        np.testing.assert_array_equal(np.vstack(rows), HashEncoder().encode(queries(*"abccde")))
        assert inner.awaited == len(inner.calls) == 4
        asked(inner)
        await encoder.aencode(queries(*"abcde"))
        assert asked(inner) == []


async def test_aencode_of_an_encoder_without_one_works_in_a_thread(file):
    class Where(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            self.thread = threading.current_thread()
            return super().encode(inputs)

    inner = Where()
    with CachedEncoder(inner, file) as encoder:
        np.testing.assert_array_equal(await encoder.aencode(queries("a")), HashEncoder().encode(queries("a")))
    assert inner.thread is not threading.main_thread()


def test_a_stream_is_cached_window_by_window(inner, file):
    with CachedEncoder(inner, file) as encoder:
        parts = list(encoder.stream(iter(queries(*"abcde")), window=2))
        assert [len(part) for part in parts] == [2, 2, 1]
        np.testing.assert_array_equal(np.vstack(parts), HashEncoder().encode(queries(*"abcde")))
        asked(inner)
        list(encoder.stream(queries(*"abcde"), window=3))
        assert asked(inner) == []
        with pytest.raises(InputError, match="in the texts from 2: the text at index 1 is empty"):
            list(encoder.stream(queries("a", "b", "c", ""), window=2))
        with pytest.raises(InputError, match="at least 1 text, and 0"):
            next(encoder.stream([], window=0))


def test_threads_share_an_encoder_and_open_a_new_file_at_once(file):
    inner = HashEncoder()
    expected = HashEncoder().encode(queries(*map(str, range(60))))
    gate = threading.Barrier(6)

    def work(number: int) -> None:
        gate.wait()
        with CachedEncoder(inner, file, window=7) as own:
            for encoder in (own, shared):
                draw = np.random.default_rng(number)
                for _ in range(8):
                    places = draw.integers(0, 60, size=10)
                    rows = encoder.encode(queries(*map(str, places)))
                    np.testing.assert_array_equal(rows, expected[places])

    with CachedEncoder(inner, file.with_name("other.sqlite"), window=3) as shared:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        with CachedEncoder(inner, file) as encoder:
            asked(inner)
            encoder.encode(queries(*map(str, range(60))))
            assert encoder.statistics().entries == 60


# -- when the file fails --------------------------------------------------------------------------------------------


def test_a_locked_file_costs_one_warning_and_no_vector(inner, file, monkeypatch, caplog):
    monkeypatch.setattr(vector_file, "BUSY_SECONDS", 0.01)
    with CachedEncoder(inner, file, window=1) as encoder, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            np.testing.assert_array_equal(encoder.encode(queries("a", "b")), HashEncoder().encode(queries("a", "b")))
        other.execute("ROLLBACK")
        messages = [(record.levelno, record.getMessage()) for record in caplog.records]
        expected = f"the embedding cache {file} cannot be written (database is locked): going on without it"
        assert messages == [(logging.WARNING, expected)]
        encoder.encode(queries("a", "b"))
        assert encoder.statistics().entries == 2
        other.execute("BEGIN IMMEDIATE")
        encoder.encode(queries("c"))
        other.execute("ROLLBACK")
        assert [record.getMessage() for record in caplog.records] == [expected, expected]


def test_hits_do_not_wait_for_who_is_writing(inner, file, caplog):
    with CachedEncoder(inner, file) as encoder, closing(sqlite3.connect(file, isolation_level=None)) as other:
        encoder.encode(queries("a", "b"))
        other.execute("BEGIN IMMEDIATE")
        asked(inner)
        start = time.monotonic()
        encoder.encode(queries("a"))  # would be written down as used
        assert time.monotonic() - start < vector_file.BUSY_SECONDS / 2
        other.execute("ROLLBACK")
    assert asked(inner) == []
    assert caplog.records == []


def test_on_a_full_disk_the_vectors_come_all_the_same_and_the_file_stays_whole(inner, file, caplog):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries("a"))
        encoder._vectors._connection.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size where that is more
        texts = queries(*map(str, range(500)))
        np.testing.assert_array_equal(encoder.encode(texts), HashEncoder().encode(texts))
        assert [record.getMessage() for record in caplog.records] == [
            f"the embedding cache {file} cannot be written (database or disk is full): going on without it"
        ]
        assert encoder.statistics().entries == 1
        asked(inner)
        encoder.encode(queries("a"))
        assert asked(inner) == []


def test_a_cache_closed_while_a_window_is_computed_does_not_lose_it(file, caplog):
    class Closing(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            encoder.close()
            return super().encode(inputs)

    encoder = CachedEncoder(Closing(), file)
    np.testing.assert_array_equal(encoder.encode(queries("a")), HashEncoder().encode(queries("a")))
    assert "is closed" in caplog.text


def test_a_file_that_breaks_while_it_is_open_costs_a_warning(inner, file, caplog):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries(*map(str, range(300))))
    with CachedEncoder(inner, file) as encoder:
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.seek(1024)
            stream.write(b"\xff" * (size - 1024))
        texts = queries(*map(str, range(300)))
        np.testing.assert_array_equal(encoder.encode(texts), HashEncoder().encode(texts))
    assert len([record for record in caplog.records if "cannot be read" in record.getMessage()]) == 1


NAN, TWO = (np.full(DIMENSIONS, value, dtype="<f4").tobytes() for value in (np.nan, 1.0))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE vectors SET vector = x'00'",
        "UPDATE vectors SET vector = x'" + NAN.hex() + "'",
        "UPDATE vectors SET vector = x'" + TWO.hex() + "'",
        "UPDATE vectors SET vector = 'text'",
        "UPDATE vectors SET vector = NULL",
        "DELETE FROM vectors",
    ],
    ids=["size", "nan", "norm", "type", "null", "gone"],
)
def test_a_damaged_row_is_a_miss_and_is_replaced(inner, file, statement):
    with CachedEncoder(inner, file) as encoder:
        encoder.encode(queries("a", "b"))
        with closing(sqlite3.connect(file)) as db:
            db.execute(f"{statement}{' WHERE' if 'vectors' in statement else ''} id = 1")
            db.commit()
        asked(inner)
        for expected in (["a"], []):
            np.testing.assert_array_equal(encoder.encode(queries("a", "b")), HashEncoder().encode(queries("a", "b")))
            assert asked(inner) == expected
        assert encoder.statistics() == CacheStatistics(hits=3, misses=3, evicted=0, entries=2, bytes=2 * ROW)


def no_database(file: Path) -> None:
    file.write_text("not a database, but a long enough text to be read as one" * 40)


def another_programs(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE notes (text)")
        db.commit()


def marked_by_another_program(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA application_id = 5")


def of_a_later_version(file: Path) -> None:
    CachedEncoder(HashEncoder(), file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 2")


def without_its_tables(file: Path) -> None:
    CachedEncoder(HashEncoder(), file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("DROP TABLE totals")


def without_totals(file: Path) -> None:
    CachedEncoder(HashEncoder(), file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute("DELETE FROM totals")
        db.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_database, "cannot be opened as an embedding cache: file is not a database. Give another path, or delete the file"),
        (another_programs, "no embedding cache but another program's database: give another path"),
        (marked_by_another_program, "no embedding cache but another program's database: give another path"),
        (of_a_later_version, "has format 2, and this version of gemma-rag reads format 1: give another path, or delete"),
        (without_its_tables, "cannot be opened as an embedding cache: no such table: totals"),
        (without_totals, "cannot be opened as an embedding cache: its table of totals is empty"),
    ],
)
def test_a_file_that_is_no_cache_of_ours_is_refused_and_left_alone(inner, file, make, message):
    make(file)
    before = file.read_bytes()
    with pytest.raises(InputError, match=message) as refused:
        CachedEncoder(inner, file)
    assert str(file) in str(refused.value)
    assert file.read_bytes() == before


def test_a_path_through_a_file_is_refused(inner, file):
    file.touch()
    with pytest.raises(InputError, match=r"cannot be opened as an embedding cache: .* Give another path"):
        CachedEncoder(inner, file / "below")


def test_a_file_that_is_locked_on_opening_asks_to_try_again(inner, file, monkeypatch):
    monkeypatch.setattr(vector_file, "BUSY_SECONDS", 0.02)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match=r"database is locked\. Try again when other processes are done"):
            CachedEncoder(inner, file)


def test_opening_waits_for_who_is_making_the_file(inner, file, monkeypatch):
    prepare, failures = vector_file._prepare, iter([sqlite3.OperationalError("database is locked")] * 2)

    def busy_at_first(*arguments: object) -> None:
        for failure in failures:
            raise failure
        prepare(*arguments)

    monkeypatch.setattr(vector_file, "_prepare", busy_at_first)
    with CachedEncoder(inner, file) as encoder:
        assert encoder.statistics().entries == 0


# -- several processes ----------------------------------------------------------------------------------------------

HEADER = f"""
import os, sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
import numpy as np
from gemma_rag.encoders import Input, Space
from gemma_rag.encoders.cached import CachedEncoder
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.vectors import unit
{inspect.getsource(HashEncoder)}
{inspect.getsource(queries)}
"""


def start(work: object, *arguments: object) -> subprocess.Popen[str]:
    """Run a function of this module in a process of its own."""
    code = f"{HEADER}\n{inspect.getsource(work)}\n{work.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    return output


def write_and_read(file: str, number: str, max_bytes: str) -> None:
    """The child: reads and writes the same 400 texts as its siblings, in an order of its own."""
    expected = HashEncoder().encode(queries(*map(str, range(400))))
    draw = np.random.default_rng(int(number))
    with CachedEncoder(HashEncoder(), file, window=16, max_bytes=int(max_bytes)) as encoder:
        for _ in range(30):
            places = draw.integers(0, 400, size=50)
            assert (encoder.encode(queries(*map(str, places))) == expected[places]).all()
        print(encoder.statistics().evicted)


@pytest.mark.parametrize("room", [400, 150])
def test_processes_that_write_and_read_one_new_file_all_get_the_right_vectors(inner, file, room):
    children = [start(write_and_read, file, number, room * ROW) for number in range(3)]
    evicted = sum(int(finish(child)) for child in children)
    with CachedEncoder(inner, file, max_bytes=room * ROW) as encoder:
        assert (evicted > 0) == (room == 150)
        assert encoder.statistics().entries == 400 if room == 400 else 130 < encoder.statistics().entries <= 150
        texts = queries(*map(str, range(400)))
        np.testing.assert_array_equal(encoder.encode(texts), HashEncoder().encode(texts))


def embed_slowly(file: str) -> None:
    """The child that is killed: says which texts it has computed, and waits to be told to go on."""

    class Slow(HashEncoder):
        def encode(self, inputs: Sequence[Input]) -> np.ndarray:
            print(len(inputs), flush=True)
            sys.stdin.readline()
            return super().encode(inputs)

    CachedEncoder(Slow(), file, window=10).encode(queries(*map(str, range(100))))


def test_a_killed_run_goes_on_where_it_was(inner, file):
    code = f"{HEADER}\n{inspect.getsource(embed_slowly)}\nembed_slowly(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        for _ in range(3):
            assert child.stdout.readline() == "10\n"
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.stdout.readline() == "10\n"  # the fourth window is asked for: three are in the file
        child.kill()
    with CachedEncoder(inner, file) as encoder:
        texts = queries(*map(str, range(100)))
        np.testing.assert_array_equal(encoder.encode(texts), HashEncoder().encode(texts))
        assert asked(inner) == [str(i) for i in range(30, 100)]


def fork_with_an_open_cache(file: str) -> None:
    """The child that forks: both sides go on using the cache, in turns and at once."""
    encoder = CachedEncoder(HashEncoder(), file, window=5)
    encoder.encode(queries("before"))
    expected = HashEncoder().encode(queries(*map(str, range(200))))
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            fresh = encoder._vectors._connection is None
            places = np.random.default_rng(number).permutation(200)
            right = (encoder.encode(queries(*map(str, places))) == expected[places]).all()
            hits = encoder.statistics().hits
            encoder.encode(queries("before"))
            os._exit(0 if fresh and right and encoder.statistics().hits == hits + 1 else 1)
        children.append(child)
        encoder.encode(queries(f"parent {number}"))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (encoder.encode(queries(*map(str, range(200)))) == expected).all()
    print(encoder.statistics().entries, encoder.statistics().misses)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_may_fork_while_a_cache_is_open(file):
    assert finish(start(fork_with_an_open_cache, file)) == "204 4\n"


# -- a real model ---------------------------------------------------------------------------------------------------


def tiny(folder: Path, **options: object) -> TextEncoder:
    return load_encoder(EncoderSettings(model=str(folder), device="cpu", show_progress=False, **options))


def counting(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the texts that the model computes."""
    counts: Counter[str] = Counter()
    encode = encoder.encode

    def counted(inputs: Sequence[Input]) -> np.ndarray:
        counts.update(item.text for item in inputs)
        return encode(inputs)

    monkeypatch.setattr(encoder, "encode", counted)
    return counts


INPUTS = [
    Input("How do I reset my password?", Task.QUERY),
    Input("How do I reset my password?", Task.DOCUMENT),
    Input("How do I reset my password?", Task.DOCUMENT, "Passwords"),
    Input("Install the client.", Task.DOCUMENT, "VPN"),
]


def test_a_real_model_computes_once_and_its_vectors_come_back_bit_for_bit(tiny_gemma, file, monkeypatch):
    model = tiny(tiny_gemma)
    counts = counting(model, monkeypatch)
    with CachedEncoder(model, file) as encoder:
        first = encoder.encode(INPUTS)
        np.testing.assert_array_equal(encoder.encode(INPUTS), first)
        np.testing.assert_array_equal(encoder.encode(INPUTS[::-1]), first[::-1])
    np.testing.assert_allclose(first, tiny(tiny_gemma).encode(INPUTS), atol=1e-6)
    assert counts == Counter({"How do I reset my password?": 3, "Install the client.": 1})


def test_a_shorter_matryoshka_vector_is_another_entry(tiny_gemma, file):
    with (
        CachedEncoder(tiny(tiny_gemma), file) as whole,
        CachedEncoder(tiny(tiny_gemma, dimensions=16, untrained_dimensions=True), file) as short,
    ):
        rows = unit(whole.encode(INPUTS)[:, :16])
        np.testing.assert_allclose(short.encode(INPUTS), rows, atol=1e-6)
        assert (short.statistics().hits, short.statistics().entries) == (0, 8)


def test_a_text_that_is_too_long_is_refused_as_without_a_cache_even_where_a_cut_one_is_in_the_file(tiny_gemma, file):
    inputs = [*INPUTS, Input("word " * 40, Task.QUERY)]
    strict = tiny(tiny_gemma, max_tokens=24, on_overflow="error")
    with CachedEncoder(tiny(tiny_gemma, max_tokens=24), file) as cutting, CachedEncoder(strict, file, window=2) as encoder:
        cutting.encode(inputs)
        encoder.encode(INPUTS[:1])
        with pytest.raises(InputError, match=r"1 of 5 texts .* index 4 \(the longest has") as without:
            strict.encode(inputs)
        with pytest.raises(InputError) as refused:
            encoder.encode(inputs)
        assert str(refused.value) == str(without.value)


def test_a_knowledge_base_remembers_the_settings_of_the_encoder_inside(tiny_gemma, file, tmp_path):
    documents = [Document(id="vpn", text="Install the client.", category="it")]
    with CachedEncoder(tiny(tiny_gemma), file) as encoder:
        with KnowledgeBase.from_documents(documents, encoder) as base:
            base.save(tmp_path / "kb")
        assert encoder.statistics().misses > 0
    with KnowledgeBase.open(tmp_path / "kb") as base:
        assert base.encoder.space == tiny(tiny_gemma).space
