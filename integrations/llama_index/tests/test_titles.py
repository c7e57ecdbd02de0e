import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.schema import MetadataMode, TextNode
from llama_index_gemma_rag.titles import split_title


@pytest.mark.parametrize(
    ("text", "rest", "title"),
    [
        ("title: T\n\nbody", "body", "T"),
        ("author: A\ntitle: T\n\nbody", "author: A\n\nbody", "T"),
        ("title: T\nauthor: A\n\nbody", "author: A\n\nbody", "T"),
        ("a: 1\ntitle: T\nb: 2\n\nbody\n\nmore", "a: 1\nb: 2\n\nbody\n\nmore", "T"),
        ("title: T: a colon\n\nbody", "body", "T: a colon"),
        ("作者: 王\ntitle: 密码\n\n在门户里重置。", "作者: 王\n\n在门户里重置。", "密码"),
        ("title: two\n  lines \n\nbody", "body", "two lines"),
        ("title: T\n\n\nbody", "\nbody", "T"),
        ("summary: one\ntwo\n  three\ntitle: T\n\nbody", "summary: one\ntwo\n  three\n\nbody", "T"),
        (f"author: A\ntitle: {'long ' * 80}\n\nbody", "author: A\n\nbody", ("long " * 80).strip()),
        ("title: T\n\ntitle: in the body\n\nbody", "title: in the body\n\nbody", "T"),
    ],
)
def test_a_title_is_taken_out_of_the_metadata(text, rest, title):
    assert split_title(text, "title") == (rest, title)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "body",
        "The title: of the book\n\nis long",
        "Some prose.\ntitle: T\n\nbody",
        "author: A\n\ntitle: T\n\nbody",
        "body\n\ntitle: T",
        "title: T\nprose that follows at once",
        "subtitle: S\n\nbody",
        "Title: T\n\nbody",
        "title:T\n\nbody",
        f"title: {'a paragraph ' * 30}\n\nbody",
    ],
)
def test_what_merely_contains_the_key_is_left_alone(text):
    assert split_title(text, "title") == (text, None)


@pytest.mark.parametrize("text", ["title:\n\nbody", "title: \n\nbody", "title: None\n\nbody"])
def test_an_empty_title_is_no_title_and_its_line_goes(text):
    assert split_title(text, "title") == ("body", None)


def test_of_a_node_without_a_text_the_title_is_the_text():
    assert split_title("title: T", "title") == ("T", None)


def test_of_a_node_without_a_text_the_other_metadata_are_the_text():
    assert split_title("title: T\nauthor: A", "title") == ("author: A", "T")


def test_the_key_can_be_another():
    assert split_title("title: T\ndocument_title: D\n\nbody", "document_title") == ("title: T\n\nbody", "D")


plain = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(lambda text: text != "None")


@given(title=plain, before=plain, after=plain, body=plain)
def test_what_is_left_is_what_llama_index_writes_without_the_title(title, before, after, body):
    node = TextNode(text=body, metadata={"a": before, "title": title, "b": after})
    untitled = TextNode(text=body, metadata={"a": before, "b": after})
    given_, wanted = (each.get_content(metadata_mode=MetadataMode.EMBED) for each in (node, untitled))
    assert split_title(given_, "title") == (wanted, title)


@pytest.mark.parametrize("key", ["dc:author", "og:site_name", "k" * 100])
def test_a_key_with_colons_or_a_long_one_before_the_title_does_not_hide_it(key):
    assert split_title(f"{key}: M\ntitle: Passwords\n\nReset it.", "title") == (f"{key}: M\n\nReset it.", "Passwords")
