"""`TextEncoder` on an engine to compute by hand: its tokens are words, and a word decides one component of a vector."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.encoders import EncoderSettings, Input, Space, TextEncoder, text_encoder
from gemma_rag.encoders.engine import Batches, Reading
from gemma_rag.errors import EmbeddingServerError, InputError
from gemma_rag.prompts import E5, NO_PROMPTS, PromptProfile, Task

NATIVE = 8


class WordsEngine:
    """An engine whose tokens are words.

    The vector of a text is a 1 for `NATIVE`'s last component and a count for each word; it yields its batches backwards.

    Args:
        max_tokens: Its context in words.
        batch_texts: Most texts of a batch.
        profile: Its prompts.
        fails: A batch with a text that has this word fails.
    """

    batch_tokens = 1000

    def __init__(
        self, max_tokens: int = 50, batch_texts: int | None = None, profile: PromptProfile = NO_PROMPTS, fails: str = "\0"
    ) -> None:
        self.native = NATIVE
        self.batch_texts = batch_texts
        self.profile = profile
        self.fails = fails
        self.reads: list[list[str]] = []
        self.readers: set[int] = set()
        self.computed: list[str] = []
        self.space = Space(
            model="words",
            weights="none",
            prompts=profile.name,
            dimensions=NATIVE,
            max_tokens=max_tokens,
            overflow="truncate",
            runtime="test",
            precision="float32",
        )

    def read(self, texts) -> list[Reading]:
        self.reads.append(list(texts))
        self.readers.add(threading.get_ident())
        return [Reading(len(text.split()), text) for text in texts]

    def cut(self, text: str) -> Reading:
        return Reading(self.space.max_tokens, " ".join(text.split()[: self.space.max_tokens]))

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]

    def run(self, batches: Batches) -> Iterator[tuple[int, np.ndarray]]:
        failed = False
        for place in reversed(range(len(batches))):
            texts = [reading.payload for reading in batches[place]]
            if any(self.fails in text.split() for text in texts):
                failed = True
                continue
            self.computed += texts
            yield place, self.rows(texts)
        if failed:
            raise EmbeddingServerError("a batch failed", url="http://localhost", status=500)

    def rows(self, texts: list[str]) -> np.ndarray:
        return np.stack([direction(text) for text in texts])


class RemoteWords(WordsEngine):
    """The same, which can be awaited, and only so."""

    def run(self, batches: Batches) -> Iterator[tuple[int, np.ndarray]]:
        raise AssertionError("a server is awaited")

    async def arun(self, batches: Batches) -> AsyncIterator[tuple[int, np.ndarray]]:
        for place, rows in WordsEngine.run(self, batches):
            await asyncio.sleep(0)
            yield place, rows


def direction(text: str) -> np.ndarray:
    """What the engine says of a text: neither cut nor of norm 1."""
    row = np.zeros(NATIVE, dtype=np.float32)
    row[-1] = 1.0
    for word in text.split():
        row[zlib.crc32(word.encode()) % (NATIVE - 1)] += 1.0
    return row


def right(texts: list[str]) -> np.ndarray:
    """The vectors of texts that carry their prompts, and fit."""
    rows = np.stack([direction(text) for text in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def encoder(engine: WordsEngine, **settings) -> TextEncoder:
    return TextEncoder(EncoderSettings(show_progress=False, **settings), lambda: engine)


def documents(*texts: str) -> list[Input]:
    return [Input(text, Task.DOCUMENT) for text in texts]


def encode(on: TextEncoder, inputs: list[Input], how: str) -> np.ndarray:
    return on.encode(inputs) if how == "encode" else asyncio.run(on.aencode(inputs))


both_ways = pytest.mark.parametrize(
    ("how", "kind"), [("encode", WordsEngine), ("aencode", WordsEngine), ("aencode", RemoteWords)]
)


@pytest.fixture
def window(monkeypatch):
    """Windows of 3 texts."""
    monkeypatch.setattr(text_encoder, "WINDOW", 3)
    return 3


# -- windows ------------------------------------------------------------------------------------------------------------


@both_ways
def test_texts_of_several_windows_come_back_in_their_order(window, how, kind):
    texts = [f"{'word ' * (i % 4)}text{i}" for i in range(11)]
    rows = encode(encoder(kind(batch_texts=2)), documents(*texts), how)
    assert rows.dtype == np.float32
    assert np.abs(rows - right(texts)).max() < 1e-6


@both_ways
def test_no_more_than_a_window_is_read_at_a_time(window, how, kind):
    engine = kind()
    encode(encoder(engine), documents(*"abcdefgh"), how)
    assert engine.reads == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]


@both_ways
def test_equal_texts_are_read_and_computed_once_in_each_window(window, how, kind):
    engine = kind()
    rows = encode(encoder(engine), documents("a", "b", "a", "a", "a", "c"), how)
    assert engine.reads == [["a", "b"], ["a", "c"]]
    assert sorted(engine.computed) == ["a", "a", "b", "c"]
    assert np.abs(rows - right(["a", "b", "a", "a", "a", "c"])).max() < 1e-6


def test_one_text_for_two_tasks_is_two_texts():
    engine = WordsEngine(profile=E5)
    rows = encoder(engine).encode([Input("dog", Task.QUERY), Input("dog", Task.DOCUMENT), Input("dog", Task.DOCUMENT, "Pets")])
    assert np.abs(rows - right(["query: dog", "passage: dog", "passage: Pets\ndog"])).max() < 1e-6


def test_two_tasks_of_one_prompt_are_one_text():
    engine = WordsEngine(profile=E5)
    encoder(engine).encode([Input("dog", Task.QUERY), Input("dog", Task.FACT_CHECKING)])
    assert engine.computed == ["query: dog"]


@both_ways
def test_nothing_gives_no_rows_and_computes_nothing(how, kind):
    engine = kind()
    assert encode(encoder(engine), [], how).shape == (0, NATIVE)
    assert engine.reads == []


word = st.sampled_from(["red", "green", "blue", "car", "bus"])
text = st.lists(word, min_size=1, max_size=6).map(" ".join)


@given(
    texts=st.lists(text, max_size=12),
    at_a_time=st.integers(1, 5),
    batch_texts=st.integers(1, 4),
    budget=st.integers(1, 12),
    context=st.integers(6, 20),
)
def test_how_texts_are_grouped_changes_nothing(texts, at_a_time, batch_texts, budget, context):
    engine = WordsEngine(context, batch_texts)
    engine.batch_tokens = budget
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "WINDOW", at_a_time)
        rows = encoder(engine).encode(documents(*texts))
    wanted = right(texts) if texts else np.empty((0, NATIVE))
    assert rows.shape == wanted.shape
    assert np.abs(rows - wanted).max(initial=0.0) < 1e-6


@both_ways
def test_a_faulty_text_in_the_last_window_is_refused_before_anything_is_read(window, how, kind):
    engine = kind()
    with pytest.raises(InputError, match="index 7 is empty"):
        encode(encoder(engine), documents(*"abcdefg", " "), how)
    assert engine.reads == []


def test_tokens_are_counted_without_prompts_and_beyond_the_context():
    assert encoder(WordsEngine(max_tokens=8, profile=E5)).count_tokens(["one two", "w " * 20]) == [2, 20]


def test_no_texts_have_no_tokens():
    engine = WordsEngine()
    assert encoder(engine).count_tokens([]) == []


# -- streams ------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_rows_in_order_a_window_at_a_time():
    texts = [f"text{i}" for i in range(8)]
    batches = list(encoder(WordsEngine()).stream((Input(text, Task.DOCUMENT) for text in texts), window=3))
    assert [batch.shape for batch in batches] == [(3, NATIVE), (3, NATIVE), (2, NATIVE)]
    assert all(batch.dtype == np.float32 for batch in batches)
    assert np.abs(np.concatenate(batches) - right(texts)).max() < 1e-6


def test_a_stream_reads_no_further_than_it_must():
    read: list[int] = []

    def endless() -> Iterator[Input]:
        for i in itertools.count():
            read.append(i)
            yield Input(f"text{i}", Task.DOCUMENT)

    stream = encoder(WordsEngine()).stream(endless(), window=5)
    assert read == []
    next(stream)
    assert len(read) == 5
    next(stream)
    assert len(read) == 10


def test_a_stream_of_nothing_is_empty():
    assert list(encoder(WordsEngine()).stream(iter([]), window=2)) == []


def test_a_stream_that_ends_with_a_window_gives_no_empty_batch():
    assert [len(batch) for batch in encoder(WordsEngine()).stream(documents(*"abcd"), window=2)] == [2, 2]


def test_the_windows_of_a_stream_may_be_larger_than_those_of_encode(window):
    texts = [f"text{i}" for i in range(10)]
    batches = list(encoder(WordsEngine()).stream(documents(*texts), window=7))
    assert [len(batch) for batch in batches] == [7, 3]
    assert np.abs(np.concatenate(batches) - right(texts)).max() < 1e-6


def test_an_error_in_a_stream_names_where_its_window_starts():
    stream = encoder(WordsEngine()).stream(documents(*"abcdefg", " "), window=3)
    assert [len(next(stream)), len(next(stream))] == [3, 3]
    with pytest.raises(InputError, match="in the texts from 6: the text at index 1 is empty"):
        next(stream)


def test_a_text_beyond_the_context_in_a_stream_is_named_too():
    stream = encoder(WordsEngine(max_tokens=8), on_overflow="error").stream(documents("a", "b", "c", "w " * 9), window=2)
    next(stream)
    with pytest.raises(InputError, match=r"in the texts from 2: 1 of 2 texts are longer .* index 1 "):
        next(stream)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_window_of_no_texts_is_refused(wrong):
    with pytest.raises(InputError, match=f"at least 1 text, and {wrong} was asked for"):
        list(encoder(WordsEngine()).stream(documents("a"), window=wrong))


def test_a_long_stream_takes_no_more_memory_than_a_short_one():
    engine = WordsEngine()
    engine.read = lambda texts: [Reading(2, text) for text in texts]  # type: ignore[method-assign]  # what counts calls, grows
    rows = np.tile(direction("a"), (4096, 1))

    def run(batches: Batches) -> Iterator[tuple[int, np.ndarray]]:
        for place, batch in enumerate(batches):
            yield place, rows[: len(batch)]

    engine.run = run  # type: ignore[method-assign]

    def peak(texts: int) -> int:
        stream = encoder(engine).stream((Input(f"text {i}", Task.DOCUMENT) for i in range(texts)), window=1024)
        tracemalloc.start()
        try:
            assert sum(len(batch) for batch in stream) == texts
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short = peak(5_000)
    assert peak(200_000) < 1.2 * short + 100_000  # the texts alone would be 14 MB, the rows 6 MB
    assert short < 3_000_000


# -- texts beyond the context -------------------------------------------------------------------------------------------

LONG = [f"{'long ' * n}text{n}" for n in (9, 14, 11)]


@both_ways
def test_long_texts_of_several_windows_give_one_warning_that_counts_them(window, caplog, how, kind):
    engine = kind(max_tokens=8)
    inputs = documents("a", LONG[0], "b", LONG[1], "c", "d", LONG[2], LONG[2])
    rows = encode(encoder(engine), inputs, how)
    (record,) = caplog.records
    assert record.getMessage() == (
        "4 of 8 texts are longer than the context of 8 tokens and were cut there (the longest has 15)"
    )
    assert np.abs(rows - right(["a", "long " * 8, "b", "long " * 8, "c", "d", "long " * 8, "long " * 8])).max() < 1e-6


@both_ways
def test_on_overflow_error_names_long_texts_of_every_window_before_it_computes(window, how, kind):
    engine = kind(max_tokens=8)
    inputs = documents("a", LONG[0], "b", LONG[1], "c", "d", LONG[2])
    with pytest.raises(
        InputError, match=r"3 of 7 texts are longer than the context of 8 tokens.*: index 1, 3, 6 \(the longest has 15\)"
    ):
        encode(encoder(engine, on_overflow="error"), inputs, how)
    assert engine.computed == []
    assert max(len(texts) for texts in engine.reads) == window


def test_on_overflow_error_names_the_first_twenty():
    with pytest.raises(InputError, match=r"25 of 25 texts .* 18, 19 \.\.\. \("):
        encoder(WordsEngine(max_tokens=8), on_overflow="error").encode(documents(*[LONG[0]] * 25))


@both_ways
def test_long_texts_of_several_windows_are_averaged_by_the_tokens_of_their_parts(window, caplog, how, kind):
    words = [f"w{i}" for i in range(14)]
    inputs = [Input(" ".join(words), Task.QUERY), *documents("a", "b", "c", "d"), Input(" ".join(words), Task.QUERY)]
    rows = encode(encoder(kind(max_tokens=8, profile=E5), on_overflow="average"), inputs, how)
    parts = [f"query: {' '.join(words[i : i + 6])}" for i in (0, 6, 12)]  # "query: ", and a word's margin
    mean = np.array([7, 7, 3]) @ right(parts)
    mean /= np.linalg.norm(mean)
    assert np.abs(rows[[0, 5]] - mean).max() < 1e-6
    assert np.abs(rows[1:5] - right([f"passage: {text}" for text in "abcd"])).max() < 1e-6
    assert not caplog.records


def test_every_part_of_a_long_text_that_brings_its_prompt_has_it():
    engine = WordsEngine(max_tokens=8, profile=E5)
    encoder(engine, on_overflow="average").encode([Input("query: " + "w " * 20, Task.QUERY)])
    assert all(text.startswith("query: ") for text in engine.computed)


@both_ways
def test_texts_of_several_windows_that_bring_their_prompts_give_one_warning(window, caplog, how, kind):
    inputs = [Input(text, Task.QUERY) for text in ("query: a", "b", "c", "d", "passage: e", "f", "query: a")]
    rows = encode(encoder(kind(profile=E5)), inputs, how)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 7 texts already start with one of the model's prompts")
    assert np.abs(rows[[0, 4]] - right(["query: a", "passage: e"])).max() < 1e-6


def test_texts_that_fit_give_no_warning(window, caplog):
    encoder(WordsEngine(max_tokens=8, profile=E5)).encode(documents("w " * 7, "a", "b", "c"))
    assert not caplog.records


# -- a server that fails ------------------------------------------------------------------------------------------------

failing = pytest.mark.parametrize(("how", "kind"), [("encode", WordsEngine), ("aencode", RemoteWords)])


def failure(on: TextEncoder, inputs: list[Input], how: str) -> EmbeddingServerError:
    with pytest.raises(EmbeddingServerError) as caught:
        encode(on, inputs, how)
    return caught.value


@failing
def test_what_was_finished_is_kept_by_its_place_over_all_windows(window, how, kind):
    texts = ["a", "b", "c", "d", "bad", "e", "f"]
    error = failure(encoder(kind(batch_texts=1, fails="bad")), documents(*texts), how)
    assert sorted(error.finished) == [0, 1, 2, 3, 5]
    for i, row in error.finished.items():
        assert np.abs(row - right([texts[i]])[0]).max() < 1e-6


@failing
def test_equal_texts_are_finished_together_or_not_at_all(window, how, kind):
    error = failure(encoder(kind(batch_texts=1, fails="bad")), documents("x", "y", "z", "bad", "a", "bad"), how)
    assert sorted(error.finished) == [0, 1, 2, 4]
    error = failure(encoder(kind(batch_texts=1, fails="bad")), documents("a", "a", "bad"), how)
    assert sorted(error.finished) == [0, 1]
    assert np.array_equal(error.finished[0], error.finished[1])


@failing
def test_a_failed_batch_takes_its_other_texts_with_it(how, kind):
    error = failure(encoder(kind(batch_texts=2, fails="bad")), documents("a a a", "b b b", "c c", "bad c"), how)
    assert sorted(error.finished) == [0, 1]


@failing
def test_nothing_is_finished_where_the_first_batch_fails(window, how, kind):
    assert failure(encoder(kind(fails="bad")), documents("bad", "a", "b", "c"), how).finished == {}


@failing
def test_an_averaged_text_is_finished_only_with_all_its_parts(window, how, kind):
    whole = " ".join(f"w{i}" for i in range(10))
    broken = " ".join(["v"] * 10 + ["bad"])
    inputs = documents("a", whole, "b", broken, whole, "c", "d")
    on = encoder(kind(max_tokens=8, batch_texts=1, fails="bad"), on_overflow="average")
    error = failure(on, inputs, how)
    assert sorted(error.finished) == [0, 1, 2, 4, 5]
    alone = encoder(WordsEngine(max_tokens=8), on_overflow="average").encode(documents(whole))[0]
    assert np.abs(error.finished[1] - alone).max() < 1e-6
    assert np.abs(error.finished[4] - alone).max() < 1e-6


@failing
def test_finished_rows_are_cut_to_the_dimensions_asked_for(how, kind):
    on = encoder(kind(batch_texts=1, fails="bad"), dimensions=3, untrained_dimensions=True)
    row = failure(on, documents("car bus red", "bad"), how).finished[0]
    wanted = direction("car bus red")[:3]
    assert np.abs(row - wanted / np.linalg.norm(wanted)).max() < 1e-6


# -- an event loop ------------------------------------------------------------------------------------------------------


def test_a_server_is_awaited_and_its_texts_are_counted_in_another_thread(window):
    engine = RemoteWords()
    on = encoder(engine, on_overflow="error")
    rows = asyncio.run(on.aencode(documents(*"abcde")))
    assert np.abs(rows - right(list("abcde"))).max() < 1e-6
    assert threading.get_ident() not in engine.readers


def test_several_calls_at_a_time_do_not_mix_their_rows(window):
    on = encoder(RemoteWords(batch_texts=1))
    groups = [[f"text{i} w{j}" for j in range(i + 1)] for i in range(9)]

    async def all_at_once() -> list[np.ndarray]:
        return await asyncio.gather(*(on.aencode(documents(*texts)) for texts in groups))

    for rows, texts in zip(asyncio.run(all_at_once()), groups, strict=True):
        assert np.abs(rows - right(texts)).max() < 1e-6


def test_a_call_that_is_cancelled_leaves_the_encoder_usable():
    on = encoder(RemoteWords())

    async def cancel() -> None:
        task = asyncio.create_task(on.aencode(documents("a")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert np.abs(asyncio.run(on.aencode(documents("a"))) - right(["a"])).max() < 1e-6


def test_two_event_loops_one_after_the_other_give_the_vectors_of_embed(minilm):
    texts = ["How do I reset my password?", "The cat sleeps."]
    titles = ["Passwords", None]

    async def twins() -> tuple[list[float], list[list[float]], np.ndarray]:
        return (
            await minilm.aembed_query(texts[0]),
            await minilm.aembed_documents(texts, titles=titles),
            await minilm.aembed(texts, "clustering"),
        )

    for query, rows, clustering in (asyncio.run(twins()), asyncio.run(twins())):
        assert np.abs(np.array(query) - minilm.embed_query(texts[0])).max() < 1e-6
        assert np.abs(np.array(rows) - minilm.embed_documents(texts, titles=titles)).max() < 1e-6
        assert np.abs(clustering - minilm.embed(texts, "clustering")).max() < 1e-6


# -- dimensions ---------------------------------------------------------------------------------------------------------

CUTTABLE = PromptProfile("cuttable", matryoshka=(768, 4, 2))
WORDS = " ".join(f"w{i}" for i in range(20))


@pytest.mark.parametrize("dimensions", [8, 4, 2])
def test_another_dimension_shares_the_loaded_engine(dimensions):
    loads: list[int] = []

    def load() -> WordsEngine:
        loads.append(1)
        return WordsEngine(profile=CUTTABLE)

    whole = TextEncoder(EncoderSettings(show_progress=False), load)
    cut = whole.at(dimensions)
    assert cut.space == whole.space.model_copy(update={"dimensions": dimensions})
    assert whole.space.dimensions == NATIVE
    assert cut.engine is whole.engine
    assert loads == [1]
    wanted = direction(WORDS)[:dimensions]
    assert wanted.any()
    assert np.abs(cut.encode(documents(WORDS))[0] - wanted / np.linalg.norm(wanted)).max() < 1e-6


def test_another_dimension_of_a_cut_encoder_may_be_larger():
    cut = encoder(WordsEngine(profile=CUTTABLE), dimensions=2)
    assert cut.space.dimensions == 2
    assert cut.at(4).space.dimensions == 4


def test_a_dimension_that_the_model_was_not_trained_for_is_refused_at_once():
    with pytest.raises(InputError, match=r"words was not trained to be cut to 3 dimensions, only 8, 4, 2\."):
        encoder(WordsEngine(profile=CUTTABLE)).at(3)
    assert encoder(WordsEngine(profile=CUTTABLE), untrained_dimensions=True).at(3).space.dimensions == 3


@pytest.mark.parametrize("wrong", [0, -1, 9])
def test_a_dimension_that_no_vector_can_have_is_refused_at_once(wrong):
    with pytest.raises(InputError, match=str(wrong)):
        encoder(WordsEngine(profile=CUTTABLE), untrained_dimensions=True).at(wrong)


def test_the_settings_of_another_dimension_name_it():
    cut = encoder(WordsEngine(profile=CUTTABLE)).at(4)
    assert cut.settings.dimensions == 4  # a knowledge base writes them down, to load the same encoder again


# -- loading ------------------------------------------------------------------------------------------------------------


def test_eight_threads_load_the_engine_once():
    together = threading.Barrier(8)
    loads: list[WordsEngine] = []

    def load() -> WordsEngine:
        loads.append(WordsEngine())
        return loads[-1]

    on = TextEncoder(EncoderSettings(show_progress=False), load)
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        together.wait(30)
        found[i] = on.encode(documents(f"text{i}"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loads) == 1
    assert np.abs(np.concatenate([found[i] for i in range(8)]) - right([f"text{i}" for i in range(8)])).max() < 1e-6


def test_nothing_is_loaded_before_it_is_needed():
    loads: list[int] = []

    def load() -> WordsEngine:
        loads.append(1)
        return WordsEngine()

    on = TextEncoder(EncoderSettings(), load)
    stream = on.stream(documents("a"))
    assert loads == []
    next(stream)
    _ = on.space, on.profile, on.engine
    assert loads == [1]


def test_loading_that_failed_is_tried_again():
    answers = iter([OSError("busy"), WordsEngine()])

    def load() -> WordsEngine:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    on = TextEncoder(EncoderSettings(show_progress=False), load)
    with pytest.raises(OSError, match="busy"):
        on.encode(documents("a"))
    assert on.encode(documents("a")).shape == (1, NATIVE)
