"""Words that match: BM25, for Chinese and for languages that put spaces between words.

Chinese is cut into words by rjieba, everything else into runs of letters and digits. Scores are scaled by what the
question could score at most, so that they can be compared between questions.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from gemma_rag.vectors import Floats

_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_RUNS = re.compile(rf"[{_HAN}]+|[^\W_{_HAN}]+")
_IS_HAN = re.compile(rf"[{_HAN}]")


def reads_as_chinese(text: str) -> bool:
    """Whether at least half of a text's words are Chinese, two Han characters counted as a word."""
    runs = _RUNS.findall(unicodedata.normalize("NFKC", text))
    han = sum(max(1.0, len(run) / 2) for run in runs if _IS_HAN.match(run))
    other = sum(1 for run in runs if not _IS_HAN.match(run))
    return han > 0 and han >= other


def tokenize(text: str) -> list[str]:
    """Cut a text into the words that are matched.

    Full-width and half-width forms are read alike (Unicode NFKC), case is folded, punctuation dropped. Runs of Han
    characters go through rjieba in its search mode, which gives a long word and the shorter ones inside it.

    >>> tokenize("Reset the PIN: 重置密码")
    ['reset', 'the', 'pin', '重置', '密码']
    """
    import rjieba

    words: list[str] = []
    for run in _RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        words += rjieba.cut_for_search(run) if _IS_HAN.match(run) else [run]
    return words


class LexicalIndex:
    """BM25 over a fixed list of texts (the form of Lucene, k1 = 1.5, b = 0.75), through bm25s.

    Args:
        texts: What to search; a text may be empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it would write its progress to everybody's log
        corpus = [tokenize(text) for text in texts]
        self._count = len(corpus)
        self._document_frequency: dict[str, int] = {}
        for words in corpus:
            for word in set(words):
                self._document_frequency[word] = self._document_frequency.get(word, 0) + 1
        self._engine = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        if self._document_frequency:
            self._engine.index(corpus, show_progress=False)

    def scores(self, question: str) -> Floats:
        """Score every text for a question.

        Returns:
            float32 of shape ``(texts,)``, 0 to 1: the BM25 score divided by its least upper bound, the sum of the
            inverse document frequencies of the question's words (words that no text has included). 0: no word in common.
        """
        asked = tokenize(question)
        words = [word for word in asked if word in self._document_frequency]
        if not words:
            return np.zeros(self._count, dtype=np.float32)
        raw = np.asarray(self._engine.get_scores(words), dtype=np.float64)
        bound = sum(self.weight(word) for word in asked)
        shares: Floats = np.clip(raw / bound, 0.0, 1.0).astype(np.float32)
        return shares

    def weight(self, word: str) -> float:
        """The inverse document frequency of a word, ``ln(1 + (N - n + 0.5) / (n + 0.5))``; always above 0."""
        n = self._document_frequency.get(word, 0)
        return float(np.log(1.0 + (self._count - n + 0.5) / (n + 0.5)))
