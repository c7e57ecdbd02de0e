"""Documents, categories and chunks: what is refused, what is embedded, what counts as a change."""

import datetime
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from gemma_rag.documents import Category, Chunk, Document, plain_metadata

FIELDS = {
    "id": "vpn-1",
    "text": "Restart the client.",
    "title": "VPN",
    "category": "network",
    "also_in": ("remote work",),
    "metadata": {"year": 2024},
}


def test_title_further_categories_and_metadata_may_be_left_out():
    document = Document(id="vpn-1", text="Restart the client.", category="network")
    assert (document.title, document.also_in, document.metadata) == ("", (), {})


@pytest.mark.parametrize("field", ["id", "text", "category"])
def test_a_document_needs_an_id_a_text_and_a_category(field):
    with pytest.raises(ValidationError, match=field):
        Document(**{name: value for name, value in FIELDS.items() if name != field})


@pytest.mark.parametrize("field", ["id", "text", "category"])
@pytest.mark.parametrize("blank", ["", "  ", "\n\t", "\u3000"], ids=["empty", "spaces", "newline", "ideographic"])
def test_white_space_alone_is_no_id_text_or_category(field, blank):
    with pytest.raises(ValidationError, match=field):
        Document(**FIELDS | {field: blank})


@pytest.mark.parametrize("field", ["id", "category"])
def test_white_space_around_a_name_is_removed(field):
    assert getattr(Document(**FIELDS | {field: " a name\n"}), field) == "a name"


def test_white_space_around_further_categories_is_removed():
    assert Document(**FIELDS | {"also_in": [" a name\n", "b"]}).also_in == ("a name", "b")


@pytest.mark.parametrize(
    "further", [("network",), ("a", "a"), ("a", " a "), (" network",)], ids=["its own", "twice", "spaces", "own with a space"]
)
def test_the_same_category_twice_is_refused(further):
    with pytest.raises(ValidationError, match="also_in names a category twice, or names 'network', which is its category"):
        Document(**FIELDS | {"also_in": further})


@pytest.mark.parametrize("further", ["network", ("",), ("a", " \n"), None, 7], ids=repr)
def test_what_is_no_list_of_names_is_refused_as_further_categories(further):
    with pytest.raises(ValidationError, match="also_in"):
        Document(**FIELDS | {"also_in": further})


def test_white_space_around_the_text_is_kept():
    assert Document(**FIELDS | {"text": "  body\n"}).text == "  body\n"


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ValidationError, match="titel"):
        Document(**FIELDS, titel="VPN")


def test_a_document_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Document(**FIELDS).text = "other"


@pytest.mark.parametrize(
    "metadata",
    [{"a": None}, {"a": True}, {"a": 1}, {"a": 0.5}, {"a": "b"}, {"a": [1, "b"]}, {"a": {"b": {}}}, {"中文": "值"}],
    ids=str,
)
def test_metadata_may_hold_all_that_json_can(metadata):
    assert Document(**FIELDS | {"metadata": metadata}).metadata == metadata


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, object(), b"bytes", {"year": float("nan")}, {1: "a number", "b": "a string"}],
    ids=["nan", "inf", "set", "object", "bytes", "nested-nan", "keys-of-two-types"],
)
def test_metadata_that_json_cannot_hold_is_refused(value):
    with pytest.raises(ValidationError, match="the metadata must be plain JSON"):
        Document(**FIELDS | {"metadata": {"a": value}})


def test_the_content_hash_is_the_sha256_of_the_fields_as_json():
    # Written out by hand, because stored knowledge bases keep it: text, title, categories, metadata with sorted keys.
    document = Document(id="a", text="文", title="T", category="c", also_in=("d", "b"), metadata={"z": 1, "a": "é"})
    plain = '["文", "T", "c", ["d", "b"], {"a": "é", "z": 1}]'
    assert document.content_hash == hashlib.sha256(plain.encode("utf-8")).hexdigest()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", "Restart it."),
        ("title", "VPN client"),
        ("category", "office"),
        ("also_in", ()),
        ("also_in", ("remote work", "office")),
        ("metadata", {"year": 2025}),
    ],
)
def test_the_content_hash_changes_with(field, value):
    assert Document(**FIELDS | {field: value}).content_hash != Document(**FIELDS).content_hash


def test_the_content_hash_does_not_change_with_the_id():
    assert Document(**FIELDS | {"id": "vpn-2"}).content_hash == Document(**FIELDS).content_hash


def test_the_content_hash_does_not_change_with_the_order_of_the_metadata():
    one = Document(**FIELDS | {"metadata": {"a": 1, "b": {"c": 2, "d": 3}}})
    other = Document(**FIELDS | {"metadata": {"b": {"d": 3, "c": 2}, "a": 1}})
    assert one.content_hash == other.content_hash


def test_the_content_hash_tells_where_title_ends_and_text_begins():
    assert Document(**FIELDS | {"title": "ab", "text": "c"}).content_hash != (
        Document(**FIELDS | {"title": "a", "text": "bc"}).content_hash
    )


@pytest.mark.parametrize("field", ["id", "text", "title", "category"])
def test_half_a_surrogate_pair_is_refused_because_no_file_could_hold_it(field):
    with pytest.raises(ValidationError, match=r"surrogate|unicode string"):
        Document(**FIELDS | {field: "broken \ud83d emoji"})


def test_half_a_surrogate_pair_in_a_further_category_is_refused_too():
    with pytest.raises(ValidationError, match=r"surrogate|unicode string"):
        Document(**FIELDS | {"also_in": ("broken \ud83d emoji",)})


@pytest.mark.parametrize(
    ("name", "description", "expected"),
    [
        ("network", "", "network"),
        ("network", "  \n", "network"),
        ("network", " VPN and Wi-Fi. ", "network: VPN and Wi-Fi."),
        ("credit_cards", "", "credit cards"),
        ("credit-cards", "", "credit cards"),
        ("cards/credit_limit", "How much.", "cards credit limit: How much."),
        ("信用卡", "额度和还款", "信用卡: 额度和还款"),
    ],
)
def test_the_text_of_a_category_is_its_name_in_words_and_its_description(name, description, expected):
    assert Category(name=name, description=description).text == expected


def test_the_name_of_a_category_keeps_its_separators():
    assert Category(name=" credit_cards ").name == "credit_cards"


def test_a_category_needs_a_name():
    with pytest.raises(ValidationError, match="name"):
        Category(name=" ")


@pytest.mark.parametrize("name", ["IT/Accounts", "IT / Accounts", "IT_Accounts"])
def test_a_path_is_read_as_words(name):
    assert Category(name=name).text == "IT Accounts"


def test_examples_are_no_part_of_the_text_of_a_category():
    assert Category(name="network", description="Wi-Fi", examples=("How do I get online?",)).text == "network: Wi-Fi"


@pytest.mark.parametrize("examples", [("",), ("How?", " \n"), "How?"], ids=repr)
def test_an_empty_example_is_refused_and_so_is_one_string(examples):
    with pytest.raises(ValidationError, match="examples"):
        Category(name="network", examples=examples)


def test_a_category_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Category(name="network").name = "office"


@pytest.mark.parametrize(
    ("document_title", "headings", "expected"),
    [
        ("", (), ""),
        ("Guide", (), "Guide"),
        ("", ("Setup",), "Setup"),
        ("Guide", ("Setup", "Windows"), "Guide > Setup > Windows"),
        ("Guide", ("Guide", "Setup"), "Guide > Setup"),
        ("Guide", ("Setup", "Setup"), "Guide > Setup"),
        (" Guide ", ("Guide", " ", "Setup\n"), "Guide > Setup"),
        ("Guide", ("Setup", "Guide"), "Guide > Setup"),
    ],
)
def test_the_title_of_a_chunk_names_the_document_and_each_heading_once(document_title, headings, expected):
    assert Chunk(start=0, end=1, headings=headings).title(document_title) == expected


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 0)])
def test_a_chunk_outside_its_document_is_refused(start, end):
    with pytest.raises(ValidationError, match="greater than"):
        Chunk(start=start, end=end)


def test_a_chunk_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Chunk(start=0, end=1).end = 2


# -- metadata of somebody else's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (datetime.date(2026, 11, 25), "2026-11-25"),
        (datetime.datetime(2026, 11, 25, 9, 30, tzinfo=datetime.timezone.utc), "2026-11-25T09:30:00+00:00"),
        (math.nan, None),
        (-math.inf, None),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        ((1, "a"), [1, "a"]),
        ({"inner": {1: {2}}}, {"inner": {"1": [2]}}),
        (Path("a"), "a"),
        ("half \ud83d", "half ?"),
        (True, True),
    ],
)
def test_metadata_of_somebody_else_becomes_plain_json(value, plain):
    assert plain_metadata({"key": value}) == {"key": plain}


def test_plain_metadata_is_what_a_document_takes():
    metadata = plain_metadata({3: {"when": datetime.date(2026, 1, 1), "how": {0.5}}})
    assert Document(id="d", text="t", category="c", metadata=metadata).metadata == {"3": {"when": "2026-01-01", "how": [0.5]}}
