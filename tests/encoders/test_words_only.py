"""The encoder that reads nothing: only matching words find anything over it."""

from __future__ import annotations

import numpy as np

from gemma_rag.documents import Document
from gemma_rag.encoders import Input, is_encoder
from gemma_rag.encoders.words_only import WordsOnly
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import Task
from gemma_rag.retriever import TwoStageRetriever


def test_every_text_has_the_same_unit_vector_of_its_spaces_size():
    encoder = WordsOnly()
    assert is_encoder(encoder)
    vectors = encoder.encode(
        [Input("red", Task.QUERY), Input("重置密码", Task.DOCUMENT, "PIN"), Input("car", Task.CLASSIFICATION)]
    )
    assert vectors.tolist() == [[1.0]] * 3
    assert vectors.dtype == np.float32
    assert encoder.encode([]).shape == (0, encoder.space.dimensions)


def test_no_document_is_cut():
    long = Document(id="long", text="word " * 5_000, category="c")
    with KnowledgeBase.from_documents([long], WordsOnly()) as base:
        assert base.manifest.chunks == 1
    assert WordsOnly().count_tokens([long.text, "car"]) == [1, 1]


def test_words_alone_find_documents_in_any_language():
    documents = [
        Document(id="vpn", text="Install the VPN client.", category="it"),
        Document(id="leave", text="Everyone has 27 days of leave.", category="time"),
        Document(id="pin", text="在门户网站重置密码。", category="it"),
    ]
    with KnowledgeBase.from_documents(documents, WordsOnly()) as base:
        retriever = TwoStageRetriever(base, mode="lexical")
        assert [retriever.retrieve(q).hits[0].document.id for q in ("the days of leave", "重置密码")] == ["leave", "pin"]
        assert not retriever.retrieve("chapel ceiling")


def test_it_is_kept_under_its_own_name_and_opened_with_itself_again(tmp_path):
    with KnowledgeBase.from_documents([Document(id="vpn", text="VPN", category="it")], WordsOnly()) as base:
        base.save(tmp_path / "kb")
    with KnowledgeBase.open(tmp_path / "kb", WordsOnly()) as again:
        assert again.space.model == "none"
        assert TwoStageRetriever(again, mode="lexical").retrieve("vpn").hits[0].document.id == "vpn"
