"""Extractive and generated answers, refusals, citations; the prompt is in test_answer_prompt.py."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk

from gemma_rag.answer import Citation, Draft, GroundedAnswerer, extract, in_thread, refuse
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.grounding import cited_numbers
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.results import Hit, Outcome, Retrieval
from gemma_rag.retriever import TwoStageRetriever

EVERYTHING = {"category_threshold": -1, "document_threshold": -1}
FRUIT = "The apple is sweet. The pear is soft. The plum is sour."
ANSWER = "The pear is soft [1]."


def never(system: str, user: str) -> list[str]:
    pytest.fail("the language model was called")


@pytest.fixture
def retriever(words):
    """Makes a retriever over documents given as texts, all of one category, d1, d2 ..."""

    def retriever(*texts: str, **options) -> TwoStageRetriever:
        documents = [
            Document(id=f"d{i}", title=f"Page {i}", category="fruit", text=text) for i, text in enumerate(texts, start=1)
        ]
        return TwoStageRetriever(KnowledgeBase.from_documents(documents, words), **{**EVERYTHING, **options})

    return retriever


@pytest.fixture
def written(retriever):
    """The answer to "pear" where a language model writes the given text about two pages."""

    def written(*pieces: str):
        return GroundedAnswerer(retriever(FRUIT, "A pear."), lambda system, user: pieces).answer("pear")

    return written


# -- extractive -------------------------------------------------------------------------------------------------------


def test_without_a_language_model_the_closest_sentence_is_quoted(retriever) -> None:
    # of the three sentences only the second has a word of the question: 1, 0, 0
    assert GroundedAnswerer(retriever(FRUIT)).answer("pear").text == "“The pear is soft.” [1]"


def test_a_quoting_answer_is_extractive(retriever) -> None:
    answer = GroundedAnswerer(retriever(FRUIT)).answer("pear")
    assert (answer.kind, answer.outcome) == ("extractive", Outcome.ANSWERED)


def test_a_citation_has_the_document_and_its_passage(retriever) -> None:
    answer = GroundedAnswerer(retriever(FRUIT)).answer("pear")
    assert answer.citations == (Citation(number=1, id="d1", title="Page 1", category="fruit", quote=FRUIT),)


def test_two_sentences_of_two_documents_are_quoted_with_their_own_numbers(retriever) -> None:
    # both have the two words of the question: 1 and 1
    answer = GroundedAnswerer(retriever("The apple and a pear.", "An apple or a pear.")).answer("apple pear")
    assert answer.text == "“The apple and a pear.” [1] “An apple or a pear.” [2]"


def test_both_cited_documents_are_listed(retriever) -> None:
    answer = GroundedAnswerer(retriever("The apple and a pear.", "An apple or a pear.")).answer("apple pear")
    assert [(citation.number, citation.id) for citation in answer.citations] == [(1, "d1"), (2, "d2")]


def test_a_second_sentence_far_behind_the_first_is_not_quoted(retriever) -> None:
    # "apple pear": the first sentence scores 1, the second 1 / (2 * sqrt 2) = 0.354, the third 0
    text = "The apple pear. The apple car bus tram. The red green blue plum car bus."
    assert GroundedAnswerer(retriever(text)).answer("apple pear").text == "“The apple pear.” [1]"


def test_a_second_sentence_close_behind_the_first_is_quoted(retriever) -> None:
    # the first scores 1, the second (2 + 1) / sqrt(5 * 2) = 0.949
    answer = GroundedAnswerer(retriever("An apple apple pear. The apple pear.")).answer("apple apple pear")
    assert answer.text == "“An apple apple pear.” [1] “The apple pear.” [1]"


def test_a_hard_wrapped_sentence_is_quoted_on_one_line(retriever) -> None:
    answer = GroundedAnswerer(retriever("The pear\nis very\n  soft. The plum is sour.")).answer("pear")
    assert answer.text == "“The pear is very soft.” [1]"


def test_a_passage_without_a_sentence_is_quoted_whole(retriever) -> None:
    assert GroundedAnswerer(retriever("# Pear\n\n## Plum")).answer("pear").text == "“# Pear ## Plum” [1]"


def test_sentences_below_a_cosine_of_0_are_still_quoted(retriever, words, monkeypatch) -> None:
    # every question points away from every sentence
    encode = words.encode
    monkeypatch.setattr(words, "encode", lambda inputs: encode(inputs) * [[-1 if i.task == "query" else 1] for i in inputs])
    assert GroundedAnswerer(retriever("The pear.")).answer("pear").text == "“The pear.” [1]"


def test_an_extractive_answer_in_lexical_mode_needs_no_encoder(retriever, tmp_path) -> None:
    retriever(FRUIT, "A car.").knowledge_base.save(tmp_path / "kb")
    lexical = TwoStageRetriever(KnowledgeBase.open(tmp_path / "kb"), mode="lexical", **EVERYTHING)
    assert GroundedAnswerer(lexical).answer("pear").text == "“The pear is soft.” [1]"


def test_chinese_sentences_stand_in_chinese_quotation_marks(retriever) -> None:
    lexical = retriever("食堂在一楼。员工可以在门户重置密码。", "会议室要预订。", mode="lexical")
    assert GroundedAnswerer(lexical).answer("怎么重置密码？").text == "「员工可以在门户重置密码。」 [1]"


def test_the_sentence_that_means_the_answer_is_quoted(minilm) -> None:
    text = "Choose Forgot password in the portal. The canteen serves lunch from noon. Parking is free on Sundays."
    base = KnowledgeBase.from_documents([Document(id="house", category="house", text=text)], minilm)
    answer = GroundedAnswerer(TwoStageRetriever(base, **EVERYTHING)).answer("When can I eat?")
    assert answer.text == "“The canteen serves lunch from noon.” [1]"


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    (Outcome.CATEGORY_BELOW_THRESHOLD, (FRUIT,), {"category_threshold": 0.99}),
    (Outcome.DOCUMENT_BELOW_THRESHOLD, (FRUIT,), {"document_threshold": 0.99}),
    (Outcome.FILTERED_OUT, (FRUIT,), {"where": {"year": 2024}}),
    (Outcome.EMPTY_KNOWLEDGE_BASE, (), {}),
]


@pytest.mark.parametrize(("outcome", "texts", "options"), REFUSED)
def test_a_refusal_has_the_outcome_of_the_retrieval(retriever, outcome, texts, options) -> None:
    answer = GroundedAnswerer(retriever(*texts)).answer("pear", **options)
    assert (answer.outcome, answer.kind) == (outcome, "refusal")


@pytest.mark.parametrize(("outcome", "texts", "options"), REFUSED)
def test_a_refusal_names_its_reason(retriever, outcome, texts, options) -> None:
    assert GroundedAnswerer(retriever(*texts)).answer("pear", **options).text == f"I don't know. {outcome.reason}"


@pytest.mark.parametrize(("outcome", "texts", "options"), REFUSED)
def test_a_refusal_of_a_chinese_question_is_chinese(retriever, outcome, texts, options) -> None:
    assert GroundedAnswerer(retriever(*texts)).answer("梨软吗？", **options).text.startswith("我不知道：")


@pytest.mark.parametrize(("outcome", "texts", "options"), REFUSED)
def test_a_refusal_does_not_call_the_language_model(retriever, outcome, texts, options) -> None:
    assert not GroundedAnswerer(retriever(*texts), never).answer("pear", **options).citations


@pytest.mark.parametrize(("language", "start"), [("en", "I don't know. "), ("zh", "我不知道：")])
def test_the_language_can_be_chosen(retriever, language, start) -> None:
    assert GroundedAnswerer(retriever(), language=language).answer("pear 梨软吗").text.startswith(start)


# -- generated --------------------------------------------------------------------------------------------------------


def test_a_written_answer_is_generated(written) -> None:
    answer = written(ANSWER)
    assert (answer.text, answer.kind, answer.outcome) == (ANSWER, "generated", Outcome.ANSWERED)


def test_a_written_answer_is_joined_and_stripped(written) -> None:
    assert written("\n The pear", " is", " soft [1]. \n").text == ANSWER


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda system, user: iter(["The pear ", "is soft", " [1]."]),
        lambda: FakeListChatModel(responses=[ANSWER]),
        lambda: GenericFakeChatModel(messages=iter([AIMessage(content=ANSWER)])),
    ],
    ids=["writer", "FakeListChatModel", "GenericFakeChatModel"],
)
def test_a_written_answer_streams_piece_by_piece(retriever, make) -> None:
    pieces: list[str] = []
    *pieces, answer = GroundedAnswerer(retriever(FRUIT), make()).stream("pear")
    assert ("".join(pieces), answer.text, len(pieces) > 1) == (ANSWER, ANSWER, True)


def test_only_the_text_of_content_blocks_is_taken(retriever) -> None:
    class Model:
        def stream(self, messages):
            yield AIMessageChunk(content=[{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": ANSWER}])

    assert GroundedAnswerer(retriever(FRUIT), Model()).answer("pear").text == ANSWER


def test_a_chat_model_gets_a_system_and_a_human_message(retriever) -> None:
    class Model:
        def stream(self, messages):
            yield " ".join(role for role, _ in messages)

    assert GroundedAnswerer(retriever(FRUIT), Model()).answer("pear").text == "system human"


def test_the_language_model_sees_every_hit(retriever) -> None:
    echo = GroundedAnswerer(retriever(FRUIT, "A pear."), lambda system, user: [user])
    assert all(passage in echo.answer("pear").text for passage in (FRUIT, "A pear."))


def test_what_a_language_model_raises_comes_through(retriever) -> None:
    failure = ConnectionError("no model there")

    def failing(system: str, user: str):
        yield "The "
        raise failure

    with pytest.raises(ConnectionError) as raised:
        GroundedAnswerer(retriever(FRUIT), failing).answer("pear")
    assert raised.value is failure


def test_options_of_retrieval_go_to_the_retriever(retriever) -> None:
    answer = GroundedAnswerer(retriever(FRUIT, "A pear."), lambda system, user: [ANSWER]).answer("pear", k=1, mode="flat")
    assert (len(answer.retrieval.hits), answer.retrieval.mode) == (1, "flat")


def test_what_was_retrieved_before_is_answered_without_retrieving_again(retriever, words) -> None:
    found = retriever(FRUIT)
    retrieval = found.retrieve("pear")
    words.calls.clear()
    GroundedAnswerer(found, lambda system, user: [ANSWER]).answer_from(retrieval)
    assert words.calls == []


@pytest.mark.parametrize("language", ["fr", "", "EN"])
def test_an_unknown_language_is_refused(retriever, language) -> None:
    with pytest.raises(InputError, match="'en' or 'zh'"):
        GroundedAnswerer(retriever(), language=language)


def test_something_that_writes_nothing_is_no_language_model(retriever) -> None:
    with pytest.raises(InputError, match="is a str"):
        GroundedAnswerer(retriever(), "ollama:gemma3")


# -- citations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Soft [1].", [1]),
        ("Soft [1, 3].", [1, 3]),
        ("Soft [1][3].", [1, 3]),
        ("软【2】。", [2]),
        ("软［1］。", [1]),
        ("软【1，2、3】。", [1, 2, 3]),
        ("Soft [1; 2].", [1, 2]),
        ("Soft [ 2 ].", [2]),
        ("Soft [2], sweet [1], soft [2].", [2, 1]),  # each once, as they appear
        ("Soft (1).", []),
        ("Soft [a] [] 1.", []),
        ("", []),
    ],
)
def test_the_numbers_that_a_text_cites(text, numbers) -> None:
    assert cited_numbers(text) == numbers


def test_cited_passages_come_in_the_order_of_their_numbers(written) -> None:
    assert [citation.number for citation in written("Soft [2], sweet [1].").citations] == [1, 2]


def test_passages_that_are_not_cited_are_not_listed(written) -> None:
    assert [citation.number for citation in written("Soft [2].").citations] == [2]


def test_numbers_that_no_passage_has_are_reported(written) -> None:
    assert written("Soft [1], sweet [7], sour [0, 3].").unknown_citations == (7, 0, 3)


def test_numbers_that_no_passage_has_are_not_cited(written) -> None:
    assert [citation.number for citation in written("Soft [1], sweet [7].").citations] == [1]


# -- declining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I don’t know.",
        "“I don’t know”",
        "I do not know.",
        "**I don't know.**",
        " \ni don't know",
        "I don't know. The sources do not say.",
        "我不知道",
        "我不知道。",
        "「我不知道。」",
        "",
        " \n ",
    ],
)
def test_a_language_model_that_does_not_know_declines(written, text) -> None:
    answer = written(text)
    assert (answer.outcome, answer.kind) == (Outcome.DECLINED_BY_MODEL, "refusal")


def test_a_language_model_that_writes_no_piece_declines(written) -> None:
    assert written().outcome is Outcome.DECLINED_BY_MODEL


def test_a_declining_language_model_gets_the_reason_of_its_outcome_as_the_text(written) -> None:
    assert written("I don't know.").text == f"I don't know. {Outcome.DECLINED_BY_MODEL.reason}"


@pytest.mark.parametrize(
    "text",
    [
        "I don't know the price, but [1] says that it is soft.",
        "我不知道价格，但是它很软【1】。",
        "Sources say that nobody would say: I don't know.",
        "The pear is soft.",
    ],
)
def test_an_answer_that_says_something_is_kept(written, text) -> None:
    assert (written(text).outcome, written(text).text) == (Outcome.ANSWERED, text)


@pytest.mark.parametrize("mode", ["two-stage", "flat", "lexical"])
def test_an_answer_is_plain_json(retriever, mode) -> None:
    written = GroundedAnswerer(retriever(FRUIT, mode=mode)).answer("pear").to_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_an_answer_as_json_has_its_text_and_citations(written) -> None:
    as_json = written("Soft [1, 9].").to_json()
    assert {key: as_json[key] for key in ("answer", "kind", "citations", "unknown_citations")} == {
        "answer": "Soft [1, 9].",
        "kind": "generated",
        "citations": [{"number": 1, "id": "d2", "title": "Page 2", "category": "fruit", "quote": "A pear."}],
        "unknown_citations": [9],
    }


def test_the_outcome_in_json_is_that_of_the_answer(written) -> None:
    assert written("I don't know.").to_json()["outcome"] == "declined_by_model"


# -- an answer in the making --------------------------------------------------------------------------------------------


def test_a_stream_of_quoted_sentences_is_the_text_and_the_answer(retriever) -> None:
    text, answer = GroundedAnswerer(retriever(FRUIT)).stream("pear")
    assert (text, answer.kind) == (answer.text, "extractive")


def test_a_stream_of_a_refusal_is_its_text_and_the_answer(retriever) -> None:
    text, answer = GroundedAnswerer(retriever(FRUIT, document_threshold=1.0), never).stream("car")
    assert (text, answer.kind) == (answer.text, "refusal")


def test_nothing_is_shown_of_a_text_that_turns_out_to_be_no_answer(retriever) -> None:
    parts = list(GroundedAnswerer(retriever(FRUIT), lambda system, user: ["I ", "don", "’t know", ".", " [1]"]).stream("pear"))
    assert parts[:-1] == ["I don't know. The language model found no answer in the documents."]
    assert parts[-1].outcome is Outcome.DECLINED_BY_MODEL


def test_a_text_that_only_begins_like_no_answer_is_shown_once_that_is_clear(retriever) -> None:
    draft = Draft(retriever(FRUIT).retrieve("pear"))
    assert [draft.add(piece) for piece in ("I don", "'t know much, but ", "it is soft ", "[1]", ".")] == [
        "",
        "",
        "",
        "I don't know much, but it is soft [1]",
        ".",
    ]


def test_thoughts_before_an_answer_are_not_shown(retriever) -> None:
    draft = Draft(retriever(FRUIT).retrieve("pear"))
    assert [draft.add(piece) for piece in ("<thi", "nk>hm [1]</thi", "nk>", "Soft", " [1].")] == ["", "", "", "Soft", " [1]."]
    assert draft.finish()[1].text == "Soft [1]."


def test_no_answer_after_thoughts_is_no_answer(written) -> None:
    assert written("<think>The source [1] may say.</think>\nI don't know.").outcome is Outcome.DECLINED_BY_MODEL


def test_thoughts_without_an_answer_are_no_answer(written) -> None:
    assert written("<think>Hm [1]").outcome is Outcome.DECLINED_BY_MODEL


def test_sentences_that_share_no_word_are_not_told_apart() -> None:
    text = "Lunch is at noon. Dogs bark. Staff receive 27 days."
    hits = (Hit(Document(id="d", text=text, category="c"), 5.0, 0.5, text),)
    assert extract(Retrieval.of_hits("How much holiday?", hits), None).text == f"“{text}” [1]"


def test_the_scores_of_another_retriever_do_not_choose_the_sentence(words) -> None:
    texts = {"a": "The plum is sour.", "b": "The pear is soft."}
    hits = [
        Hit(Document(id=key, text=texts[key], category="c"), score, 0.5, texts[key]) for key, score in (("a", 5.0), ("b", 1.0))
    ]
    assert extract(Retrieval.of_hits("pear", hits), words).text == "“The pear is soft.” [2]"


def test_white_space_around_an_answer_is_not_shown(retriever) -> None:
    draft = Draft(retriever(FRUIT).retrieve("pear"))
    assert [draft.add(piece) for piece in ("\n ", "Soft ", "[1].\n", "\n")] == ["", "Soft", " [1].", ""]
    assert draft.finish()[0] == ""


STARTS = [
    "I",
    " don",
    "'t",
    "’t",
    " know",
    ".",
    "I don't know",
    "我不知道",
    "。",
    " ",
    "[1",
    "]",
    "[",
    "*",
    "“",
    "!",
    "pear",
    "<think>",
    "</think>",
]
PIECES = st.one_of(st.sampled_from(STARTS), st.text(max_size=3))


@given(st.lists(PIECES, max_size=12))
def test_what_is_shown_in_pieces_is_the_text_of_the_answer(pieces: list[str]) -> None:
    hits = (Hit(Document(id="d", title="T", text="The pear is soft.", category="c"), 0.5, 0.5, "The pear is soft."),)
    draft = Draft(Retrieval.of_hits("pear", hits))
    shown = "".join(draft.add(piece) for piece in pieces)
    rest, answer = draft.finish()
    assert shown + rest == answer.text


def test_nothing_retrieved_cannot_be_written_about() -> None:
    with pytest.raises(InputError, match="make a refusal of it"):
        Draft(Retrieval.of_hits("pear", ()))


def test_the_refusal_of_another_retrievers_silence_says_so() -> None:
    nothing = Retrieval.of_hits("梨软吗？", ())
    assert (refuse(nothing).text, refuse(nothing, "en").text) == (
        "我不知道：没有检索到任何文档。",
        "I don't know. The retriever found no documents.",
    )
    assert extract(nothing, None) == refuse(nothing)


def test_every_outcome_has_a_refusal_in_both_languages() -> None:
    for outcome in set(Outcome) - {Outcome.ANSWERED}:
        retrieval = dataclasses.replace(Retrieval.of_hits("pear", ()), outcome=outcome)
        assert refuse(retrieval, "zh").text.startswith("我不知道：")
        assert refuse(retrieval, "en").text == f"I don't know. {outcome.reason}"


def test_a_piece_that_is_none_does_not_end_an_answer_in_silence() -> None:
    async def all_of(pieces: list) -> list:
        return [piece async for piece in in_thread(iter(pieces))]

    assert asyncio.run(all_of(["a", None, "b"])) == ["a", None, "b"]
