"""Every fault is committed on purpose, and must be named, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from gemma_rag.encoders import EncoderSettings, Input, Space, load_encoder
from gemma_rag.encoders.base import prompts_digest
from gemma_rag.errors import InputError
from gemma_rag.prompts import EMBEDDINGGEMMA, Task
from gemma_rag.verify import BOUNDS, CURES, Fault, Reference, Verification, verify
from gemma_rag.verify_texts import probes

QUERY, DOCUMENT = "task: search result | query: ", "title: none | text: "
PROMPTS = {
    Task.QUERY: QUERY,
    Task.DOCUMENT: DOCUMENT,
    Task.CLASSIFICATION: "task: classification | query: ",
    Task.CLUSTERING: "task: clustering | query: ",
    Task.SIMILARITY: "task: sentence similarity | query: ",
    Task.CODE_QUERY: "task: code retrieval | query: ",
    Task.QUESTION_ANSWERING: "task: question answering | query: ",
    Task.FACT_CHECKING: "task: fact checking | query: ",
    Task.SUMMARIZATION: "task: summarization | query: ",
}
OTHERS = tuple(task for task in Task if task not in (Task.QUERY, Task.DOCUMENT))
EVERY = tuple(Task)
CONTEXT = 512  # of the tiny EmbeddingGemma here: a quarter of its own, for the time it takes


class Library:
    """sentence-transformers, given whole texts; what it has computed once it knows."""

    def __init__(self, folder, context: int | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        kept = [module for module in self.model if type(module).__name__ != "Dense"]
        self.without_dense = SentenceTransformer(modules=kept, device="cpu")
        self.context = context or self.model.max_seq_length
        self.known: dict[tuple[str, int | None, bool], np.ndarray] = {}

    def rows(self, texts: Sequence[str], limit: int | None = None, dense: bool = True) -> np.ndarray:
        keys = [(text, limit if limit and self.tokens(text) > limit else None, dense) for text in texts]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        model = self.model if dense else self.without_dense
        for cut in {cut for _, cut, _ in new}:
            model.max_seq_length = cut or self.context
            for long, size in ((False, 16), (True, 1)):
                chosen = [key for key in new if key[1] == cut and (len(key[0]) > 800) is long]
                rows = model.encode([key[0] for key in chosen], prompt="", batch_size=size, normalize_embeddings=True)
                self.known.update(zip(chosen, rows, strict=True))
        return np.stack([self.known[key] for key in keys])

    def tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, truncation=False, verbose=False)["input_ids"])


def right(text: str, task: Task, title: str) -> str:
    if text.startswith(("task: ", "title: ")):
        return text
    return f"title: {title} | text: {text}" if title and task is Task.DOCUMENT else PROMPTS[task] + text


class Injured:
    """An encoder over the library that does one thing wrong, or nothing.

    Args:
        render: The text that the model reads, from text, task and title.
        limit: Where texts are cut.
        dense: Whether the Dense layers are there.
        after: What is done to the rows.
        space: Fields of the space that it claims.
    """

    profile = EMBEDDINGGEMMA

    def __init__(
        self,
        library: Library,
        render: Callable[[str, Task, str], str] = right,
        *,
        limit: int | None = None,
        dense: bool = True,
        after: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
        **space,
    ) -> None:
        self.library, self.render, self.limit, self.dense, self.after = library, render, limit, dense, after
        fields = {
            "model": "injured",
            "weights": "0",
            "prompts": prompts_digest(self.profile),
            "dimensions": library.model.get_embedding_dimension(),
            "max_tokens": library.context,
            "overflow": "truncate",
            "runtime": "test",
            "precision": "float32",
        }
        self.space = Space(**fields | space)

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        texts = [self.render(item.text, item.task, " ".join((item.title or "").split())) for item in inputs]
        return self.after(self.library.rows(texts, self.limit, self.dense))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]


@pytest.fixture(scope="session")
def gemma_library(tiny_gemma):
    return Library(tiny_gemma, CONTEXT)


@pytest.fixture(scope="session")
def gemma_reference(tiny_gemma):
    return Reference.from_model(EncoderSettings(model=str(tiny_gemma), max_tokens=CONTEXT))


@pytest.fixture(scope="session")
def minilm_library(minilm_reference):
    from gemma_rag.encoders.models import find_model

    library = Library(find_model("minilm").location)
    texts = [plain(probe.text, probe.task, " ".join((probe.title or "").split())) for probe in probes()]
    library.known = {(text, None, True): row for text, row in zip(texts, minilm_reference.right, strict=True)}  # to save time
    return library


@pytest.fixture(scope="session")
def minilm_reference():
    return Reference.from_model("minilm")


def named(found: Verification) -> set[str]:
    return {finding.name.value for finding in found.faults}


def noise(size: float) -> Callable[[np.ndarray], np.ndarray]:
    """Adds a random vector of norm `size` to each row: 1 - cosine grows by about its square over two."""

    def add(rows: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(len(rows)).normal(size=rows.shape)
        rows = rows + size * random / np.linalg.norm(random, axis=1, keepdims=True)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return add


# -- right encoders ---------------------------------------------------------------------------------------------------


def test_a_right_encoder_is_verified(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library), gemma_reference)
    assert found.passed, found.report()
    assert found.overall.texts == len(probes())
    assert found.overall.smallest > 0.99999
    assert found.bound == 0.9999


@pytest.mark.parametrize("model", ["gemma", "minilm"])
def test_our_own_encoders_are_verified(request, tiny_gemma, model):
    reference = replace(request.getfixturevalue(f"{model}_reference"), matryoshka=(32, 16))
    folder, context = (str(tiny_gemma), CONTEXT) if model == "gemma" else ("minilm", None)
    settings = EncoderSettings(model=folder, max_tokens=context, device="cpu", untrained_dimensions=True, show_progress=False)
    found = verify(load_encoder(settings), reference)
    assert found.passed, found.report()
    assert set(found.groups["dimensions"]) == {"16", "32", str(reference.space.dimensions)}
    assert all(group.smallest > 0.99999 for group in found.groups["dimensions"].values())


def test_an_encoder_that_cuts_is_compared_with_the_cut(gemma_library, gemma_reference):
    def cut(rows):
        return rows[:, :16] / np.linalg.norm(rows[:, :16], axis=1, keepdims=True)

    found = verify(Injured(gemma_library, after=cut, dimensions=16), gemma_reference)
    assert found.passed, found.report()
    assert list(found.groups["dimensions"]) == ["16"]


def test_numbers_are_given_by_task_language_length_and_title(gemma_library, gemma_reference):
    groups = verify(Injured(gemma_library), gemma_reference).groups
    assert set(groups["task"]) == {task.value for task in Task}
    assert len(groups["language"]) >= 40
    assert set(groups["title"]) == {"with", "without"}
    assert list(groups["length"])[-1] == "beyond the context"
    for name in ("task", "title", "length", "kind"):
        assert sum(group.texts for group in groups[name].values()) == len(probes())


# -- texts misread ----------------------------------------------------------------------------------------------------


def only(tasks: Sequence[Task], wrong: Callable[[str, Task, str], str]) -> Callable[[str, Task, str], str]:
    """Wrong for some tasks, and for texts that bring no prompt."""

    def render(text: str, task: Task, title: str) -> str:
        prompted = text.startswith(("task: ", "title: "))
        return wrong(text, task, title) if task in tasks and not prompted else right(text, task, title)

    return render


MISREAD = {
    "bare texts": ("prompts_missing", EVERY, lambda text, task, title: text),
    "title and text, no prompt": ("prompts_missing", EVERY, lambda text, task, title: f"{title}\n{text}" if title else text),
    "no prompt for queries": ("prompts_missing", (Task.QUERY,), only([Task.QUERY], lambda text, *_: text)),
    "each prompt twice": ("prompts_doubled", EVERY, lambda text, task, title: PROMPTS[task] + right(text, task, title)),
    "a server's default prompt": ("prompts_doubled", EVERY, lambda *item: QUERY + right(*item)),
    "prompted texts again": (
        "prompts_doubled",
        (Task.QUERY, Task.DOCUMENT),
        lambda text, task, title: PROMPTS[task] + text if text.startswith("task: ") else right("", task, title) + text,
    ),
    "queries as documents": ("wrong_role", (Task.QUERY,), only([Task.QUERY], lambda text, *_: DOCUMENT + text)),
    "documents as queries": ("wrong_role", (Task.DOCUMENT,), only([Task.DOCUMENT], lambda text, *_: QUERY + text)),
    "other tasks as queries": ("wrong_role", OTHERS, only(OTHERS, lambda text, *_: QUERY + text)),
    "title dropped": ("title_lost", (Task.DOCUMENT,), lambda text, task, title: right(text, task, "")),
    "title in the text": (
        "title_lost",
        (Task.DOCUMENT,),
        only([Task.DOCUMENT], lambda text, task, title: DOCUMENT + (f"title: {title}\n\n{text}" if title else text)),
    ),
    "line breaks lost": (
        "texts_changed",
        (Task.QUERY, Task.DOCUMENT),
        lambda text, task, title: right(text.replace("\n", " "), task, title),
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_a_misread_text_is_named(gemma_library, gemma_reference, case):
    fault, tasks, render = MISREAD[case]
    found = verify(Injured(gemma_library, render), gemma_reference)
    assert named(found) == {fault}, found.report()
    assert found.faults[0].tasks == tasks
    assert found.faults[0].cure == CURES[Fault(fault)]
    assert not found.passed


@pytest.mark.parametrize("case", ["bare texts", "each prompt twice", "queries as documents", "title dropped"])
def test_a_misread_text_is_named_though_the_precision_is_low(gemma_library, gemma_reference, case):
    fault, _, render = MISREAD[case]
    found = verify(Injured(gemma_library, render, after=noise(0.06), precision="int8"), gemma_reference)
    assert named(found) == {fault}, found.report()


def test_two_faults_at_once_are_both_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, lambda text, *_: text, dense=False), gemma_reference)
    assert named(found) == {"prompts_missing", "dense_missing"}, found.report()
    render = only([Task.QUERY], lambda text, *_: DOCUMENT + text)
    found = verify(Injured(gemma_library, lambda text, task, title: render(text, task, ""), limit=300), gemma_reference)
    assert named(found) == {"wrong_role", "title_lost", "truncated_early"}, found.report()


# -- models, cuts, norms, precision -----------------------------------------------------------------------------------


def test_missing_dense_layers_are_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, dense=False), gemma_reference)
    assert named(found) == {"dense_missing"}, found.report()
    assert found.faults[0].tasks == EVERY


@pytest.mark.parametrize(
    ("model", "limit", "said"),
    [
        ("gemma", 32, "cut at 32 tokens"),
        ("gemma", 128, "cut at 128 tokens"),
        ("gemma", 200, "cut between 128 and 256 tokens"),
        ("gemma", 384, "cut at 384 tokens"),
        ("gemma", 450, "cut elsewhere than at the context of 512 tokens"),
        ("minilm", 128, "cut at 128 tokens"),
    ],
)
def test_an_early_cut_is_named_with_its_tokens(request, model, limit, said):
    library, reference = (request.getfixturevalue(f"{model}_{what}") for what in ("library", "reference"))
    found = verify(Injured(library, *([plain] if model == "minilm" else []), limit=limit), reference)
    assert named(found) == {"truncated_early"}, found.report()
    assert said in found.faults[0].evidence


def test_a_setting_that_cuts_early_is_named_and_noted(tiny_gemma, gemma_reference):
    settings = EncoderSettings(model=str(tiny_gemma), max_tokens=256, device="cpu", show_progress=False)
    found = verify(load_encoder(settings), gemma_reference)
    assert named(found) == {"truncated_early"}, found.report()
    assert "the encoder's context is set to 256 tokens" in found.notes[0]


def test_rows_cut_and_not_normalised_again_are_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, after=lambda rows: rows[:, :16], dimensions=16), gemma_reference)
    assert named(found) == {"not_normalised"}, found.report()
    assert "206 of 206 vectors have norms from 0." in found.faults[0].evidence


def test_rows_not_normalised_at_another_dimension_are_named(gemma_library, gemma_reference):
    class Cutting(Injured):
        def at(self, dimensions: int) -> Injured:
            return Injured(gemma_library, after=lambda rows: rows[:, :dimensions], dimensions=dimensions)

    found = verify(Cutting(gemma_library), replace(gemma_reference, matryoshka=(16,)))
    assert named(found) == {"not_normalised"}, found.report()
    assert found.faults[0].evidence.startswith("at 16 dimensions: ")


def test_the_wrong_components_at_another_dimension_are_named(gemma_library, gemma_reference):
    class Cutting(Injured):
        def at(self, dimensions: int) -> Injured:
            def last(rows):
                return rows[:, -dimensions:] / np.linalg.norm(rows[:, -dimensions:], axis=1, keepdims=True)

            return Injured(gemma_library, after=last, dimensions=dimensions)

    found = verify(Cutting(gemma_library), replace(gemma_reference, matryoshka=(16,)))
    assert named(found) == {"another_model"}, found.report()


@pytest.mark.parametrize("model", ["gemma", "minilm"])
def test_low_precision_is_named_where_float32_is_promised(request, model):
    library, reference = (request.getfixturevalue(f"{model}_{what}") for what in ("library", "reference"))
    render = [plain] if model == "minilm" else []
    found = verify(Injured(library, *render, after=noise(0.06)), reference)  # cosine about 0.998
    assert named(found) == {"low_precision"}, found.report()
    assert verify(Injured(library, *render, after=noise(0.06), precision="int8"), reference).passed
    assert verify(Injured(library, *render, after=noise(0.06)), reference, precision="Q8_0").passed


def test_another_model_of_the_same_form_is_named(tmp_path, gemma_reference):
    from gemma_rag.testing import build_random_embeddinggemma

    other = Library(build_random_embeddinggemma(tmp_path / "other", seed=1), CONTEXT)
    found = verify(Injured(other), gemma_reference)
    assert named(found) == {"another_model"}, found.report()


def test_another_model_of_other_dimensions_is_named(minilm_library, gemma_library, gemma_reference, minilm_reference):
    assert named(verify(Injured(minilm_library, plain), gemma_reference)) == {"another_model"}
    assert named(verify(Injured(gemma_library), minilm_reference)) == {"another_model"}


# -- MiniLM: no prompts, no Dense layers ------------------------------------------------------------------------------


def plain(text: str, task: Task, title: str) -> str:
    return f"{title}\n{text}" if title and task is Task.DOCUMENT else text


def test_faults_that_a_model_cannot_have_are_not_looked_for(minilm_reference):
    possible = {fault for alternative in minilm_reference.alternatives for fault in alternative.faults}
    assert possible == {Fault.TITLE_LOST, Fault.TEXTS_CHANGED, Fault.TRUNCATED_EARLY}
    assert minilm_reference.pooled == ()


def test_prompts_that_a_model_was_not_trained_with_are_another_model_or_changed_texts(minilm_library, minilm_reference):
    found = verify(Injured(minilm_library, plain), minilm_reference)
    assert found.passed, found.report()
    assert named(verify(Injured(minilm_library, lambda text, *_: text), minilm_reference)) == {"title_lost"}


# -- failures ---------------------------------------------------------------------------------------------------------


class Failing(Injured):
    """Fails for the texts that a function chooses."""

    def __init__(self, library: Library, fails: Callable[[Input], bool], how: str = "raise", **options) -> None:
        super().__init__(library, **options)
        self.fails, self.how = fails, how

    def encode(self, inputs: Sequence[Input]) -> np.ndarray:
        bad = [i for i, item in enumerate(inputs) if self.fails(item)]
        if bad and self.how == "raise":
            raise RuntimeError(f"no vector for {inputs[bad[0]].text!r}, says sk_{'0123456789' * 4}")
        rows = super().encode(inputs)
        rows[bad] = np.nan
        return rows


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_texts_without_a_vector_are_named_and_the_others_compared(gemma_library, gemma_reference, how):
    found = verify(Failing(gemma_library, lambda item: "🎉" in item.text, how), gemma_reference)
    assert named(found) == {"failed"}, found.report()
    assert found.faults[0].tasks == (Task.QUERY,)
    assert found.faults[0].evidence.startswith("1 of 206 texts have no vector, the first is '🎉🎂")
    assert found.overall.texts == 205
    assert "0123456789" not in found.report()


def test_a_long_text_that_gives_nan_is_not_taken_for_one_that_is_refused(gemma_library, gemma_reference):
    found = verify(Failing(gemma_library, lambda item: len(item.text) > 5000, "nan"), gemma_reference)
    assert named(found) == {"failed"}, found.report()
    assert "the vector holds NaN" in found.faults[0].evidence


def test_an_encoder_that_always_fails_is_asked_a_few_times_only(gemma_library, gemma_reference):
    calls = []
    found = verify(Failing(gemma_library, lambda item: calls.append(item) or True), gemma_reference)
    assert named(found) == {"failed"}
    assert found.overall is None
    assert len(calls) < len(probes()) + 30
    assert found.to_json()["overall"] is None
    assert "NOT verified" in found.report()


def test_rows_of_another_dimension_than_promised_are_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, dimensions=16), gemma_reference)
    assert named(found) == {"failed"}
    assert "48 dimensions came, and 16 were expected" in found.faults[0].evidence


def test_too_few_rows_are_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, after=lambda rows: rows[:-1]), gemma_reference)
    assert named(found) == {"failed"}
    assert "texts gave an array of shape" in found.faults[0].evidence


def test_rows_in_another_order_are_named(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, after=lambda rows: rows[::-1]), gemma_reference)
    assert named(found) == {"failed"}, found.report()
    assert "another order" in found.faults[0].evidence


# -- what an encoder does otherwise by its own settings ---------------------------------------------------------------


def test_long_texts_that_are_refused_by_setting_are_no_fault(tiny_gemma, gemma_reference):
    settings = EncoderSettings(
        model=str(tiny_gemma), max_tokens=CONTEXT, on_overflow="error", device="cpu", show_progress=False
    )
    found = verify(load_encoder(settings), gemma_reference)
    assert found.passed, found.report()
    assert "texts beyond the context of 512 tokens are refused: InputError" in found.notes[0]
    assert "beyond the context" not in found.groups["length"]


def test_long_texts_that_are_averaged_by_setting_are_left_out(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, overflow="average"), gemma_reference)
    assert found.passed
    assert "are averaged: not compared" in found.notes[0]


def test_prompting_prompted_texts_again_is_no_fault_where_the_settings_say_so(tiny_gemma, gemma_reference):
    settings = EncoderSettings(
        model=str(tiny_gemma), max_tokens=CONTEXT, detect_prompts=False, device="cpu", show_progress=False
    )
    found = verify(load_encoder(settings), gemma_reference)
    assert found.passed, found.report()
    assert "may be prompted again" in found.notes[0]


def test_a_precision_without_a_bound_of_its_own_has_that_of_a_server(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, precision="Q4_K_M"), gemma_reference)
    assert (found.passed, found.bound) == (True, BOUNDS["server"])
    assert "'Q4_K_M'" in found.notes[0]


# -- frameworks' objects ----------------------------------------------------------------------------------------------


class FrameworkEmbeddings:
    """What LangChain's stock wrapper does, with or without prompts."""

    def __init__(self, library: Library, query: str = "", document: str = "", flatten: bool = False) -> None:
        self.library, self.query, self.document, self.flatten = library, query, document, flatten

    def _rows(self, texts: list[str]) -> list[list[float]]:
        texts = [text.replace("\n", " ") for text in texts] if self.flatten else texts
        return self.library.rows(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self._rows([self.query + text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._rows([self.document + text for text in texts])


def test_a_frameworks_object_is_asked_for_what_it_knows(gemma_library, gemma_reference):
    found = verify(FrameworkEmbeddings(gemma_library, QUERY, DOCUMENT), gemma_reference)
    assert found.passed, found.report()
    assert found.space is None
    assert set(found.groups["task"]) == {"query", "document"}
    assert set(found.groups["title"]) == {"without"}
    assert "only questions and documents without title could be asked for" in found.notes


def test_what_langchains_stock_wrapper_does_wrong_is_named(gemma_library, gemma_reference):
    found = verify(FrameworkEmbeddings(gemma_library, flatten=True), gemma_reference)
    assert named(found) == {"prompts_missing", "texts_changed"}, found.report()
    assert found.faults[0].tasks == (Task.QUERY, Task.DOCUMENT)


def test_one_prompt_for_both_is_a_wrong_role_for_one_of_them(gemma_library, gemma_reference):
    found = verify(FrameworkEmbeddings(gemma_library, QUERY, QUERY), gemma_reference)
    assert named(found) == {"wrong_role"}, found.report()
    assert found.faults[0].tasks == (Task.DOCUMENT,)


def test_what_cannot_embed_is_refused(gemma_reference):
    with pytest.raises(InputError, match="expected an Encoder, or something with embed_query and embed_documents, not dict"):
        verify({}, gemma_reference)


# -- saying it --------------------------------------------------------------------------------------------------------


def test_the_result_is_plain_json_and_readable(gemma_library, gemma_reference):
    found = verify(Injured(gemma_library, MISREAD["title dropped"][2]), gemma_reference)
    plain_result = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain_result["passed"] is False
    assert plain_result["faults"][0].keys() == {"name", "tasks", "evidence", "cure"}
    assert plain_result["overall"]["texts"] == 206
    assert plain_result["space"]["model"] == "injured"
    report = found.report()
    assert report.startswith("NOT verified: 206 texts, cosine with the right vectors 0.")
    assert "title lost (document)" in report
    assert f"Cure: {CURES[Fault.TITLE_LOST]}" in report


def test_every_fault_has_one_sentence_of_cure():
    assert set(CURES) == set(Fault)
    assert all(cure.endswith(".") and "\n" not in cure for cure in CURES.values())


@pytest.mark.slow
def test_the_whole_context_of_the_tiny_gemma_is_verified(tiny_gemma):
    reference = Reference.from_model(str(tiny_gemma))
    settings = EncoderSettings(model=str(tiny_gemma), device="cpu", show_progress=False)
    assert verify(load_encoder(settings), reference).passed
    found = verify(load_encoder(settings.model_copy(update={"max_tokens": 1024})), reference)
    assert named(found) == {"truncated_early"}
    assert "cut at 1024 tokens" in found.faults[0].evidence
