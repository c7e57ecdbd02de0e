"""Labelled questions: the forms that are read, and what is said of those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_rag.errors import BadRows, InputError
from gemma_rag.labelled import Dataset, Labelled, as_labelled, check_ids, load_labelled, texts

ANSWERED = {"question": "Where is it?", "relevant": ["a", "b"]}
SILENT = {"question": "Who sang it?", "relevant": []}


@pytest.fixture
def write(tmp_path):
    """Writes rows, or lines as they are, to a JSON Lines file."""

    def write(*rows, name: str = "labels.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


def problems(error: BadRows) -> list[tuple[int, str]]:
    return [(row.line, row.problem) for row in error.rows]


# -- one question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "relevant", "kind"),
    [
        ({"question": "q", "relevant": ["a"]}, ("a",), "answerable"),
        ({"text": "q", "relevant": ["a", "b"]}, ("a", "b"), "answerable"),
        ({"question": "q", "text": "not this", "relevant": ["a"]}, ("a",), "answerable"),
        ({"question": " q ", "relevant": ("a",), "answerable": True}, ("a",), "answerable"),
        ({"question": "q", "relevant": []}, (), "unanswerable"),
        ({"question": "q", "relevant": [], "answerable": False}, (), "unanswerable"),
        ({"question": "q", "answerable": False}, (), "unanswerable"),
        ({"question": "q", "relevant": None, "answerable": False}, (), "unanswerable"),
        ({"question": "q", "answerable": False, "kind": "off-topic"}, (), "off-topic"),
        ({"question": "q", "relevant": ["a"], "kind": "", "id": "q-7", "source": "chat"}, ("a",), "answerable"),
    ],
)
def test_each_accepted_form_of_a_row(row, relevant, kind) -> None:
    item = Labelled.model_validate(row)
    assert (item.question, item.relevant, item.kind, item.answerable) == ("q", relevant, kind, bool(relevant))


def test_category_and_split_are_kept() -> None:
    item = Labelled.model_validate({**ANSWERED, "category": "IT/Accounts", "split": "dev"})
    assert (item.category, item.split) == ("IT/Accounts", "dev")


def test_reading_a_row_does_not_change_it() -> None:
    row = {"text": "q", "answerable": False}
    Labelled.model_validate(row)
    assert row == {"text": "q", "answerable": False}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q"}, '"relevant" is missing: a list of ids, \\[\\] for a question without an answer'),
        ({"question": "q", "answerable": True}, '"relevant" is missing'),
        ({"question": "q", "relevant": None}, '"relevant" is missing'),
        ({"question": "q", "relevant": "a"}, '"relevant" is a list of ids, and a str came'),
        ({"question": "q", "relevant": ["a"], "answerable": False}, '"answerable" is False, and "relevant" has 1 ids'),
        ({"question": "q", "relevant": [], "answerable": True}, '"answerable" is True, and "relevant" has 0 ids'),
        ({"question": "q", "relevant": [7]}, "relevant.0: Input should be a valid string"),
        ({"question": " ", "relevant": []}, "question: String should have at least 1 character"),
        ({"question": 7, "relevant": []}, "question: Input should be a valid string"),
        ({"relevant": []}, "question: Field required"),
        (["q", ["a"]], "valid dictionary or instance of Labelled"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(row, problem) -> None:
    with pytest.raises(BadRows, match=f"labelled questions:2: .*{problem}") as caught:
        as_labelled([ANSWERED, row])
    assert [line for line, _ in problems(caught.value)] == [2]


# -- several in memory ------------------------------------------------------------------------------------------------


def test_mappings_and_objects_mix_and_any_iterable_will_do() -> None:
    ready = Labelled.model_validate(ANSWERED)
    items = as_labelled(item for item in (ready, SILENT))
    assert (items[0] is ready, [item.answerable for item in items]) == (True, [True, False])
    assert texts(items) == ["Where is it?", "Who sang it?"]


def test_all_bad_rows_are_told_at_once() -> None:
    with pytest.raises(BadRows, match="2 rows cannot be used") as caught:
        as_labelled([{"question": "q"}, SILENT, {"relevant": []}])
    assert [line for line, _ in problems(caught.value)] == [1, 3]


@pytest.mark.parametrize("one", ["q", b"q", ANSWERED, Labelled.model_validate(ANSWERED)])
def test_one_question_instead_of_a_list_is_refused(one) -> None:
    with pytest.raises(InputError, match=f"come in a list, and one {type(one).__name__} came: put it in a list"):
        as_labelled(one)


# -- a file -----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_in_its_order_and_empty_lines_are_passed_over(write) -> None:
    path = write(ANSWERED, "", {"text": "Third?", "answerable": False})
    assert [item.question for item in load_labelled(path)] == ["Where is it?", "Third?"]


def test_the_bad_lines_of_a_file_are_listed_by_their_numbers(write) -> None:
    path = write(ANSWERED, "{", "", {"question": "q"}, '["q"]')
    with pytest.raises(BadRows) as caught:
        load_labelled(str(path))
    first, second, third = problems(caught.value)
    assert (first[0], second[0], third[0]) == (2, 4, 5)
    assert first[1].startswith("not valid JSON")
    assert '"relevant" is missing' in second[1]
    assert "expected a JSON object" in third[1]


def test_only_the_questions_of_a_split(write) -> None:
    path = write({**ANSWERED, "split": "dev"}, {**SILENT, "split": "test"}, ANSWERED)
    assert [item.question for item in load_labelled(path, "test")] == ["Who sang it?"]


def test_a_bad_line_of_another_split_is_told_too(write) -> None:
    path = write({**ANSWERED, "split": "dev"}, {"question": "q", "split": "test"})
    with pytest.raises(BadRows):
        load_labelled(path, "dev")


def test_a_file_without_a_question_of_the_split_is_refused(write) -> None:
    with pytest.raises(InputError, match=r"there is no labelled question in .*labels.jsonl of the split 'dev'"):
        load_labelled(write(ANSWERED), "dev")


def test_an_empty_file_is_refused(write) -> None:
    with pytest.raises(InputError, match=r"there is no labelled question in .*labels.jsonl$"):
        load_labelled(write(""))


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent.jsonl"):
        load_labelled(tmp_path / "absent.jsonl")


# -- ids --------------------------------------------------------------------------------------------------------------


def test_known_ids_pass() -> None:
    check_ids(as_labelled([ANSWERED, SILENT]), {"a", "b", "c"})


def test_unknown_ids_are_listed_once_each_and_sorted() -> None:
    labelled = as_labelled([ANSWERED, {"question": "q", "relevant": ["z", "b"]}, {"question": "r", "relevant": ["z"]}])
    with pytest.raises(InputError, match=r"documents that the knowledge base does not have: 'b', 'z'$"):
        check_ids(labelled, {"a"})


def test_of_many_unknown_ids_ten_are_shown_and_the_others_counted() -> None:
    labelled = as_labelled([{"question": "q", "relevant": [f"d{i:02}" for i in range(12)]}])
    with pytest.raises(InputError, match=r"'d00', .*'d09' and 2 more$"):
        check_ids(labelled, set())


# -- a folder ---------------------------------------------------------------------------------------------------------

CORPUS = [{"id": name, "text": f"About {name}.", "category": "c"} for name in "ab"]


def test_a_data_set_is_read_with_its_splits(write, tmp_path) -> None:
    write(*CORPUS, name="corpus.jsonl")
    write({**ANSWERED, "split": "dev"}, {**SILENT, "split": "test"}, name="queries.jsonl")
    found = Dataset.load(tmp_path)
    assert (found.name, len(found.documents), len(found.questions)) == (tmp_path.name, 2, 2)
    assert found.split("dev") == found.questions[:1]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(write, tmp_path) -> None:
    write(*CORPUS, name="corpus.jsonl")
    write({**ANSWERED, "split": "dev"}, SILENT, name="queries.jsonl")
    with pytest.raises(InputError, match="no questions of the split 'train': it has '', 'dev'"):
        Dataset.load(tmp_path).split("train")


def test_a_data_set_says_which_files_it_lacks(write, tmp_path) -> None:
    with pytest.raises(InputError, match=r"is no data set: it has no corpus.jsonl and no queries.jsonl"):
        Dataset.load(tmp_path)
    write(*CORPUS, name="corpus.jsonl")
    with pytest.raises(InputError, match=r"is no data set: it has no queries.jsonl"):
        Dataset.load(tmp_path)


def test_a_data_set_whose_labels_name_an_unknown_document_is_refused(write, tmp_path) -> None:
    write(CORPUS[0], name="corpus.jsonl")
    write(ANSWERED, name="queries.jsonl")
    with pytest.raises(InputError, match="does not have: 'b'"):
        Dataset.load(tmp_path)
