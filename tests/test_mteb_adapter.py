from __future__ import annotations

import importlib.util
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.mteb_adapter import TASK_BY_TYPE, GemmaMteb, task_for
from gemma_rag.prompts import E5, MODEL_PROMPT_NAMES, NO_PROMPTS, PromptProfile, Task

BLANK = PromptProfile("blank", {Task.QUERY: ""})


def metadata(kind: str, subtypes: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(name="Ours", type=kind, task_subtypes=subtypes)


def encode(model: GemmaMteb, batches, kind: str, prompt_type: str | None = None, **kwargs) -> np.ndarray:
    about = metadata(kind)
    return model.encode(batches, task_metadata=about, hf_split="test", hf_subset="default", prompt_type=prompt_type, **kwargs)


@pytest.fixture(scope="module")
def mteb(tmp_path_factory):
    """The package, with its folder of results in a temporary one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTEB_CACHE", str(tmp_path_factory.mktemp("mteb")))
        return pytest.importorskip("mteb", reason="mteb is not installed: pip install 'gemma-rag[mteb]'")


@pytest.fixture
def model(mteb, words) -> GemmaMteb:
    return GemmaMteb(words)


# -- what a text is embedded for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking"])
def test_retrieval_has_queries_and_documents(kind) -> None:
    assert task_for(metadata(kind), "query") is Task.QUERY
    assert task_for(metadata(kind), "document") is Task.DOCUMENT


def test_the_queries_of_code_retrieval_are_embedded_as_such() -> None:
    code = metadata("Retrieval", ["Article retrieval", "Code retrieval"])
    assert task_for(code, "query") is Task.CODE_QUERY
    assert task_for(code, "document") is Task.DOCUMENT


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BitextMining", Task.QUERY),
        ("Classification", Task.CLASSIFICATION),
        ("MultilabelClassification", Task.CLASSIFICATION),
        ("Clustering", Task.CLUSTERING),
        ("PairClassification", Task.SIMILARITY),
        ("STS", Task.SIMILARITY),
        ("Summarization", Task.SUMMARIZATION),
    ],
)
@pytest.mark.parametrize("prompt_type", [None, "query", "document"])
def test_elsewhere_the_type_alone_decides(kind, task, prompt_type) -> None:
    assert task_for(metadata(kind), prompt_type) is task


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"task Ours is of type ImageClustering, .* It runs Retrieval, .*Summarization"):
        task_for(metadata("ImageClustering"))


def test_our_table_agrees_with_the_models_own_names_but_for_one() -> None:
    differing = {name for name, task in MODEL_PROMPT_NAMES.items() if TASK_BY_TYPE.get(name, task) is not task}
    assert differing == {"InstructionRetrieval"}


def test_every_text_task_of_mteb_has_one(mteb) -> None:
    from mteb.types import PromptType

    tasks = mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True)
    assert len(tasks) > 500
    seen = {task_for(task.metadata, prompt_type) for task in tasks for prompt_type in (None, *PromptType)}
    assert seen == set(Task) - {Task.QUESTION_ANSWERING, Task.FACT_CHECKING}


# -- embedding --------------------------------------------------------------------------------------------------------


def test_all_batches_are_embedded_in_one_pass_and_in_order(model, words) -> None:
    rows = encode(model, [{"text": ["red", "green"]}, {"text": ["blue"]}], "STS")
    assert words.calls == [[Input(text, Task.SIMILARITY) for text in ("red", "green", "blue")]]
    assert rows.dtype == np.float32
    assert rows.argmax(axis=1).tolist() == [0, 1, 2]


def test_a_document_is_embedded_with_its_title_and_without_it_in_the_text(model, words) -> None:
    batch = {"text": ["red apple", "pear"], "body": ["apple", "pear"], "title": ["red", ""]}
    encode(model, [batch], "Retrieval", "document")
    assert words.calls == [[Input("apple", Task.DOCUMENT, "red"), Input("pear", Task.DOCUMENT)]]


def test_a_corpus_without_titles_is_embedded_without_titles(model, words) -> None:
    encode(model, [{"text": ["apple"], "body": ["apple "]}, {"text": ["pear"]}], "Retrieval", "document")
    assert words.calls == [[Input("apple ", Task.DOCUMENT), Input("pear", Task.DOCUMENT)]]


def test_a_document_that_is_only_a_title_is_embedded_as_that_text(model, words) -> None:
    encode(model, [{"text": ["red"], "body": [" "], "title": ["red"]}], "Retrieval", "document")
    assert words.calls == [[Input("red", Task.DOCUMENT)]]


def test_a_query_is_embedded_with_its_instruction(model, words) -> None:
    batch = {"query": ["apple"], "instruction": ["only red ones"], "text": ["apple only red ones"]}
    encode(model, [batch], "InstructionRetrieval", "query")
    assert words.calls == [[Input("apple only red ones", Task.QUERY)]]


def test_empty_texts_have_zeros_for_a_vector_and_one_warning_counts_them(model, words, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        rows = encode(model, [{"text": ["", "red", " \n"]}], "Clustering")
    assert words.calls == [[Input("red", Task.CLUSTERING)]]
    assert np.linalg.norm(rows, axis=1) == pytest.approx([0.0, 1.0, 0.0])
    assert [record.message for record in caplog.records] == [
        "2 of the 3 texts that Ours gave are empty, and have zeros for a vector"
    ]


@pytest.mark.parametrize("batches", [[], [{"text": [""]}]])
def test_nothing_to_embed_is_not_given_to_the_encoder(model, words, batches) -> None:
    assert encode(model, batches, "STS").shape == (len(batches), words.space.dimensions)
    assert words.calls == []


def test_a_batch_without_text_is_refused(model) -> None:
    with pytest.raises(InputError, match="a batch of image, audio, and only text can be embedded"):
        encode(model, [{"image": [], "audio": []}], "STS")


def test_vectors_of_another_precision_are_refused_since_results_would_be_filed_under_it(model) -> None:
    with pytest.raises(InputError, match="mteb asks for vectors in int8"):
        encode(model, [{"text": ["red"]}], "STS", precision="int8")
    assert len(encode(model, [{"text": ["red"]}], "STS", precision="float32", batch_size=1, show_progress_bar=True)) == 1


def test_similarities_are_cosines_and_nothing_is_like_an_empty_text(model) -> None:
    rows = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]], dtype=np.float32)
    expected = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.asarray(model.similarity(rows, 3 * rows)) == pytest.approx(expected, abs=1e-6)
    assert np.asarray(model.similarity_pairwise(rows[:2], rows[1:])) == pytest.approx([0.6, 0.0], abs=1e-6)


# -- the model as mteb knows it ---------------------------------------------------------------------------------------


def test_it_is_an_encoder_in_mtebs_own_words(mteb, model) -> None:
    assert isinstance(model, mteb.EncoderProtocol)
    assert not isinstance(model, (mteb.CrossEncoderProtocol, mteb.SearchProtocol))


def test_a_model_that_mteb_knows_is_described_by_its_space_and_by_mtebs_entry(mteb, minilm) -> None:
    meta = GemmaMteb(minilm).mteb_model_meta
    entry = mteb.get_model_meta("sentence-transformers/all-MiniLM-L6-v2")
    assert meta.name == entry.name
    assert meta.revision == minilm.space.fingerprint
    assert (meta.embed_dim, meta.max_tokens, meta.similarity_fn_name.value) == (384, 256, "cosine")
    assert (meta.languages, meta.license, meta.training_datasets) == (["eng-Latn"], entry.license, entry.training_datasets)
    assert (meta.modalities, meta.framework) == (["text"], ["Sentence Transformers", "PyTorch"])
    assert meta.loader is None


def test_a_model_that_mteb_does_not_know_is_described_by_its_space_alone(model, words) -> None:
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision, meta.embed_dim) == ("local/words", words.space.fingerprint, 10)
    assert (meta.languages, meta.license, meta.framework) == (None, None, [])


@pytest.mark.parametrize(("profile", "uses"), [(NO_PROMPTS, False), (BLANK, False), (E5, True)])
def test_whether_it_uses_prompts_is_what_its_profile_says(mteb, words, profile, uses) -> None:
    words.profile = profile
    assert GemmaMteb(words).mteb_model_meta.use_instructions is uses


@pytest.mark.parametrize(("codes", "languages"), [(("en", "zh"), ["eng-Latn", "zho-Hans"]), (("xx",), None)])
def test_the_languages_of_a_profile_are_written_as_mteb_writes_them(mteb, words, codes, languages) -> None:
    words.profile = SimpleNamespace(languages=codes, prompts={})
    assert GemmaMteb(words).mteb_model_meta.languages == languages


def test_without_mteb_the_extra_is_named(monkeypatch, words) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mteb" else find_spec(name))
    with pytest.raises(MissingExtra, match=r"mteb is not installed.* pip install 'gemma-rag\[mteb\]'"):
        GemmaMteb(words)


@pytest.mark.parametrize("value", ["minilm", None, GemmaEmbeddings])
def test_what_is_no_encoder_is_refused(mteb, value) -> None:
    with pytest.raises(InputError, match=r"GemmaMteb needs embeddings, such as GemmaEmbeddings\(\)"):
        GemmaMteb(value)


# -- run by mteb ------------------------------------------------------------------------------------------------------

CORPUS = [
    {"id": "d1", "title": "apple", "text": "red"},
    {"id": "d2", "title": "", "text": "green apple"},
    {"id": "d3", "title": "pear", "text": ""},
    {"id": "d4", "title": "", "text": ""},
]
QUERIES = [{"id": "q1", "text": "red apple"}, {"id": "q2", "text": "apple green"}]


def about(name: str, kind: str, score: str):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="Made here.",
        reference=None,
        dataset={"path": "none", "revision": "1"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=("2025-01-01", "2025-01-02"),
        domains=[],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )


def retrieval(corpus, queries, relevant):
    """A retrieval task of mteb with its data in memory."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class OurRetrieval(AbsTaskRetrieval):
        metadata = about("OurRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, *args, **kwargs) -> None:
            split = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
            self.dataset = {"default": {"test": {**split, "relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    return OurRetrieval()


def sts(pairs):
    """A task of graded similarity with its data in memory."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS

    class OurSTS(AbsTaskSTS):
        metadata = about("OurSTS", "STS", "cosine_spearman")

        def load_data(self, *args, **kwargs) -> None:
            rows = [{"sentence1": one, "sentence2": other, "score": score} for one, other, score in pairs]
            self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
            self.data_loaded = True

    return OurSTS()


def classification(train, test):
    """A classification task with its data in memory."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification

    class OurClassification(AbsTaskClassification):
        metadata = about("OurClassification", "Classification", "accuracy")
        n_experiments = 2
        samples_per_label = 6

        def load_data(self, *args, **kwargs) -> None:
            splits = {"train": train, "test": test}
            rows = {split: [{"text": text, "label": label} for text, label in data] for split, data in splits.items()}
            self.dataset = DatasetDict({split: Dataset.from_list(data) for split, data in rows.items()})
            self.data_loaded = True

    return OurClassification()


def scores(result) -> dict[str, float]:
    return result.task_results[0].scores["test"][0]


def run(mteb, model, task, cache=None):
    return mteb.evaluate(model, task, cache=cache, show_progress_bar=False)


def test_a_retrieval_task_embeds_queries_and_documents_each_in_their_way(mteb, model, words) -> None:
    result = run(mteb, model, retrieval(CORPUS, QUERIES, {"q1": {"d1": 1}, "q2": {"d1": 1}}))
    assert {item for call in words.calls for item in call} == {
        Input("red apple", Task.QUERY),
        Input("apple green", Task.QUERY),
        Input("red", Task.DOCUMENT, "apple"),
        Input("green apple", Task.DOCUMENT),
        Input("pear", Task.DOCUMENT),
    }
    # the first query finds d1 at rank 1, the second at rank 2, after d2
    assert scores(result)["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(3)) / 2, abs=1e-4)
    assert scores(result)["recall_at_1"] == 0.5


def test_a_similarity_task_embeds_both_sides_alike(mteb, model, words) -> None:
    pairs = [("red apple", "red apple", 5.0), ("red apple", "red", 3.0), ("red", "green", 0.0)]
    assert scores(run(mteb, model, sts(pairs)))["cosine_spearman"] == pytest.approx(1.0)
    assert {item.task for call in words.calls for item in call} == {Task.SIMILARITY}


def test_a_classification_task_embeds_its_examples_for_classification(mteb, model, words) -> None:
    fruit, vehicles = ["apple", "pear", "plum"], ["car", "bus", "tram"]
    train = [(f"red {word}", int(word in vehicles)) for word in [*fruit, *vehicles] * 2]
    test = [(f"green {word}", int(word in vehicles)) for word in [*fruit, *vehicles]]
    assert scores(run(mteb, model, classification(train, test)))["accuracy"] == 1.0
    assert {item.task for call in words.calls for item in call} == {Task.CLASSIFICATION}
    assert {item.text for call in words.calls for item in call} >= {text for text, _ in test}


def test_a_real_model_finds_documents_that_only_their_titles_tell_apart(mteb, minilm) -> None:
    titles = ["Password reset", "Parking permits", "Parental leave"]
    corpus = [{"id": title, "title": title, "text": "Ask at the front desk; it takes two days."} for title in titles]
    queries = [
        {"id": "q1", "text": "I cannot log in any more"},
        {"id": "q2", "text": "Where may I leave my car?"},
        {"id": "q3", "text": "We are expecting a baby"},
    ]
    relevant = {query["id"]: {title: 1} for query, title in zip(queries, titles, strict=True)}
    assert scores(run(mteb, GemmaMteb(minilm), retrieval(corpus, queries, relevant)))["recall_at_1"] == 1.0


def test_results_are_kept_by_the_fingerprint_of_the_space(mteb, words, tmp_path) -> None:
    cache = mteb.ResultCache(tmp_path)
    task = sts([("red apple", "red apple", 5.0), ("red apple", "red", 3.0), ("red", "green", 0.0)])
    run(mteb, GemmaMteb(words), task, cache)
    kept = tmp_path / "results" / "local__words" / words.space.fingerprint
    assert json.loads((kept / "model_meta.json").read_text())["embed_dim"] == 10
    assert (kept / "OurSTS.json").is_file()
    asked = len(words.calls)
    assert scores(run(mteb, GemmaMteb(words), task, cache))["cosine_spearman"] == pytest.approx(1.0)
    assert len(words.calls) == asked  # read, not computed
    words.space = words.space.model_copy(update={"max_tokens": 128})
    run(mteb, GemmaMteb(words), task, cache)
    assert len(words.calls) > asked
