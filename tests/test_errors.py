"""The exception tree, and what each message says."""

import pickle

import pytest

from gemma_rag.errors import (
    BadRow,
    BadRows,
    GemmaRagError,
    InputError,
    KnowledgeBaseError,
    LanguageModelError,
    MissingDistribution,
    MissingExtra,
    ModelUnavailable,
    SpaceMismatch,
)

ONE_ROW = [BadRow("faq.csv", 3, "the text is empty")]


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (InputError, GemmaRagError),
        (InputError, ValueError),
        (BadRows, InputError),
        (SpaceMismatch, InputError),
        (MissingExtra, GemmaRagError),
        (MissingExtra, ImportError),
        (MissingDistribution, GemmaRagError),
        (MissingDistribution, ImportError),
        (ModelUnavailable, GemmaRagError),
        (KnowledgeBaseError, GemmaRagError),
        (LanguageModelError, GemmaRagError),
    ],
)
def test_each_error_stands_where_the_tree_draws_it(error, parent):
    assert issubclass(error, parent)


@pytest.mark.parametrize("error", [MissingExtra, MissingDistribution, ModelUnavailable, KnowledgeBaseError, LanguageModelError])
def test_what_is_not_the_callers_input_is_no_input_error(error):
    assert not issubclass(error, InputError)


def test_missing_extra_gives_the_pip_command():
    message = str(MissingExtra("the sentence-transformers runtime", "local"))
    assert message == "the sentence-transformers runtime is not installed. Install it with: pip install 'gemma-rag[local]'"


def test_a_missing_distribution_gives_the_pip_command():
    message = str(MissingDistribution("the adapter for LlamaIndex", "llama-index-gemma-rag"))
    assert message == "the adapter for LlamaIndex is not installed. Install it with: pip install llama-index-gemma-rag"


def test_missing_extra_keeps_the_extra():
    assert MissingExtra("a runtime", "local").extra == "local"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (BadRow("faq.csv", 3, "the text is empty"), "faq.csv:3: the text is empty"),
        (BadRow("faq.csv", 0, "is not UTF-8"), "faq.csv: is not UTF-8"),
        (BadRow("documents", 1, "has no id"), "documents:1: has no id"),
    ],
)
def test_a_bad_row_says_where_and_what(row, expected):
    assert str(row) == expected


def test_one_bad_row_is_counted_in_the_singular():
    assert str(BadRows(ONE_ROW)).startswith("1 row cannot be used.")


def test_several_bad_rows_are_counted_in_the_plural():
    assert str(BadRows(ONE_ROW * 2)).startswith("2 rows cannot be used.")


def test_bad_rows_name_both_ways_to_go_on_without_them():
    message = str(BadRows(ONE_ROW))
    assert "skip_bad=True" in message
    assert "--skip-bad" in message


@pytest.mark.parametrize(("rows", "shown", "more"), [(20, 20, None), (21, 20, "... and 1 more"), (23, 20, "... and 3 more")])
def test_the_message_shows_the_first_twenty_rows_and_counts_the_rest(rows, shown, more):
    lines = str(BadRows([BadRow("faq.csv", n, "bad") for n in range(1, rows + 1)])).split("\n  ")[1:]
    expected = [f"faq.csv:{n}: bad" for n in range(1, shown + 1)]
    assert lines == (expected if more is None else [*expected, more])


def test_bad_rows_keep_every_row():
    rows = [BadRow("faq.csv", n, "bad") for n in range(1, 31)]
    assert BadRows(rows).rows == tuple(rows)


def test_a_space_mismatch_lists_the_stored_and_the_given_value_of_each_field():
    message = str(SpaceMismatch({"dimensions": (768, 256), "runtime": ("ollama", "tei")}))
    assert message.split("\n  ")[1:] == ["dimensions: stored 768, given 256", "runtime: stored 'ollama', given 'tei'"]


def test_a_space_mismatch_keeps_the_differences():
    assert SpaceMismatch({"dimensions": (768, 256)}).differences == {"dimensions": (768, 256)}


@pytest.mark.parametrize(
    "error",
    [
        InputError("an empty question"),
        MissingExtra("a runtime", "local"),
        MissingDistribution("an adapter", "an-adapter"),
        BadRows(ONE_ROW),
        SpaceMismatch({"dimensions": (768, 256)}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_out_of_another_process_as_it_went_in(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
