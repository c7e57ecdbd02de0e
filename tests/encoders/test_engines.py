"""The engines that open exported folders, against sentence-transformers on the models that these were made from."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from filelock import FileLock

from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase, TwoStageRetriever
from gemma_rag.encoders import EncoderSettings, Input, TextEncoder, load_encoder
from gemma_rag.encoders.base import BOUNDS
from gemma_rag.encoders.exported import DESCRIPTION
from gemma_rag.encoders.text_encoder import token_batches
from gemma_rag.errors import InputError, MissingExtra, ModelUnavailable
from gemma_rag.prompts import Task
from gemma_rag.verify import Fault, Reference, verify

FAST = [("tiny_gemma", "openvino", "float32"), ("tiny_gemma", "openvino", "int8"), ("tiny_gemma", "onnx", "float32")]
SLOW = [
    (model, to, precision)
    for model in ("tiny_gemma", "tiny_gemma_2", "minilm")
    for to in ("openvino", "onnx")
    for precision in ("float32", "int8")
    if (model, to, precision) not in [*FAST, ("tiny_gemma_2", "onnx", "int8")]  # half a minute, and MiniLM's warns as well
]


def exported(request: pytest.FixtureRequest, model: str, to: str, precision: str) -> Path:
    """The folder of an export, made once for all tests, whichever process comes first."""
    source = model if model == "minilm" else str(request.getfixturevalue(model))
    root = request.getfixturevalue("tmp_path_factory").getbasetemp()
    return _export(source, root.parent if "PYTEST_XDIST_WORKER" in os.environ else root, model, to, precision)


@functools.cache
def _export(source: str, root: Path, model: str, to: str, precision: str) -> Path:
    from gemma_rag.encoders.export import export_model

    folder = root / "exports" / f"{model}-{to}-{precision}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            export_model(EncoderSettings(model=source, show_progress=False), folder, to=to, precision=precision)
    return folder


@functools.cache
def loaded(model: str, **settings: object) -> TextEncoder:
    return load_encoder(EncoderSettings(model=model, show_progress=False, **settings))


class Case(NamedTuple):
    """An export, and what it was made from."""

    source: str
    folder: Path
    to: str
    precision: str

    def both(self, **settings: object) -> tuple[TextEncoder, TextEncoder]:
        """sentence-transformers, and the engine, with the same settings."""
        return loaded(self.source, device="cpu", **settings), loaded(str(self.folder), **settings)

    @property
    def about(self) -> dict:
        return json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))

    def agrees(self, right: np.ndarray, rows: np.ndarray) -> None:
        """The bound of the precision holds; an int8 export that is near it by its own account may be somewhat below."""
        measured = self.about["agreement"]["smallest_cosine"]
        slack = 0.1 if self.precision == "int8" and measured < 0.99 else 0.0
        assert rows.shape == right.shape
        assert np.isfinite(rows).all()
        assert (right * rows).sum(axis=1).min() >= min(BOUNDS[self.precision], measured) - slack


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id="-".join(case)) for case in FAST),
        *(pytest.param(case, id="-".join(case), marks=pytest.mark.slow) for case in SLOW),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    model, to, precision = request.param
    source = model if model == "minilm" else str(request.getfixturevalue(model))
    return Case(source, exported(request, model, to, precision), to, precision)


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "reset", "password", "portal", "如何重置密码", "x"]
TEXTS = ["How do I reset my password?", "the lazy dog", "如何重置密码", "a\nb\tc", "def f(x):\n    return x", "🦊 ok", "x"]


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@functools.cache
def reference(source: str) -> Reference:
    return Reference.from_model(source)


@pytest.mark.slow
def test_verify_passes_but_for_int8_on_random_weights_32_wide(case):
    found = verify(loaded(str(case.folder)), reference(case.source))
    narrow = case.source.endswith("-2") and case.precision == "int8"
    assert {finding.name for finding in found.faults} == ({Fault.LOW_PRECISION} if narrow else set()), found.report()


# -- the same vectors ---------------------------------------------------------------------------------------------------


def test_every_task_gives_the_vectors_of_sentence_transformers(case):
    inputs = [Input(text, task) for text in TEXTS for task in Task]
    inputs += [Input(text, Task.DOCUMENT, title) for text in TEXTS for title in ("Passwords", "请假", " two \n lines ")]
    right, engine = case.both()
    case.agrees(right.encode(inputs), engine.encode(inputs))


def test_texts_of_very_different_lengths_in_one_batch_give_the_vectors_of_sentence_transformers(case):
    inputs = [Input(words(count, seed), Task.QUERY) for seed, count in enumerate((1, 1300, 600))]
    right, engine = case.both(batch_tokens=100_000)
    lengths = engine.count_tokens([item.text for item in inputs])
    assert min(lengths) < 12
    assert max(lengths) > 1300
    assert len(token_batches(lengths, engine.engine.batch_tokens)) == 1
    case.agrees(right.encode(inputs), engine.encode(inputs))


def test_tokens_are_those_of_sentence_transformers(case):
    right, engine = case.both()
    texts = [*TEXTS, words(500), "<bos>a<eos>", "[CLS] a [SEP]", " leading and trailing ", "\u200b", "é" * 40]
    assert engine.count_tokens(texts) == right.count_tokens(texts)
    for text in (words(60), "如何 🦊 é\u200b ok"):
        assert engine.engine.spans(text) == right.engine.spans(text)


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("on_overflow", ["truncate", "average"])
def test_texts_beyond_the_context_give_the_vectors_of_sentence_transformers(case, caplog, max_tokens, on_overflow):
    if max_tokens is None and case.source.endswith("-2"):
        max_tokens = 1024  # all 8192 take a minute
    inputs = [Input(words(90 if max_tokens == 40 else 2200), Task.DOCUMENT, "Handbook"), Input("ok", Task.QUERY)]
    right, engine = case.both(max_tokens=max_tokens, on_overflow=on_overflow)
    wanted = right.encode(inputs)
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    case.agrees(wanted, engine.encode(inputs))
    assert [record.getMessage() for record in caplog.records if "export of" not in record.getMessage()] == said
    assert len(said) == (on_overflow == "truncate")


def test_texts_beyond_the_context_are_refused_in_the_words_of_sentence_transformers(case):
    messages = []
    for encoder in case.both(max_tokens=40, on_overflow="error"):
        with pytest.raises(InputError) as caught:
            encoder.encode([Input("ok", Task.QUERY), Input(words(60), Task.QUERY)])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "1 of 2 texts are longer than the context of 40 tokens" in messages[0]


def test_rows_are_cut_to_a_matryoshka_dimension_as_those_of_sentence_transformers(case):
    inputs = [Input(text, Task.QUERY) for text in TEXTS]
    right, engine = case.both(dimensions=32, untrained_dimensions=True)
    rows = engine.encode(inputs)
    assert rows.shape == (len(TEXTS), 32)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6
    case.agrees(right.encode(inputs), rows)


def test_the_space_names_the_engine_and_keeps_the_rest(case):
    right, engine = case.both()
    differences = right.space.differences(engine.space)
    assert differences.pop("runtime") == ("sentence-transformers", case.to)
    if case.precision == "int8":
        assert differences.pop("precision") == ("float32", "int8")
    assert differences == {}
    assert engine.space.model == right.space.model
    assert engine.profile == right.profile


def test_an_export_warns_when_it_is_opened_where_it_is_below_its_bound_and_nowhere_else(case, caplog):
    _ = load_encoder(EncoderSettings(model=str(case.folder))).space
    below = case.about["agreement"]["smallest_cosine"] < BOUNDS[case.precision]
    assert [f"the {case.precision} export of" in record.getMessage() for record in caplog.records] == [True] * below
    assert not (below and case.precision == "float32")


def test_several_threads_get_the_vectors_that_one_would_get(case):
    _, engine = case.both()
    wanted = [engine.encode([Input(text, Task.QUERY)])[0] for text in TEXTS]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        found[i] = engine.encode([Input(TEXTS[i % len(TEXTS)], Task.QUERY)])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(np.abs(found[i] - wanted[i % len(TEXTS)]).max() for i in range(14)) < 1e-5


def test_rows_that_were_handed_out_do_not_change_with_the_next_call(case):
    _, engine = case.both()
    readings = engine.engine.read(["query one", "query two"])
    rows = [array for _, array in engine.engine.run([[readings[0]], [readings[1]]])]
    again = [array for reading in readings for _, array in engine.engine.run([[reading]])]
    assert np.array_equal(np.concatenate(rows), np.concatenate(again))


# -- EmbeddingGemma's layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_the_dense_layers_are_inside(request, tiny_gemma, to):
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(str(tiny_gemma), device="cpu", local_files_only=True)
    bare = SentenceTransformer(modules=[module for module in whole if type(module).__name__ != "Dense"], device="cpu")
    texts = [f"task: search result | query: {text}" for text in TEXTS]
    rows = loaded(str(exported(request, "tiny_gemma", to, "float32"))).encode([Input(text, Task.QUERY) for text in TEXTS])
    assert (rows * whole.encode(texts, prompt="", normalize_embeddings=True)).sum(axis=1).min() > 0.9999
    assert (rows * bare.encode(texts, prompt="", normalize_embeddings=True)).sum(axis=1).max() < 0.9


def test_padding_beyond_the_sliding_window_leaves_a_short_text_as_it_is(request):
    for to in ("openvino", "onnx"):
        engine = loaded(str(exported(request, "tiny_gemma", to, "float32")), batch_tokens=100_000)
        short, long = Input("x", Task.QUERY), Input(words(1300), Task.QUERY)
        assert np.abs(engine.encode([short, long])[0] - engine.encode([short])[0]).max() < 1e-5


# -- settings -----------------------------------------------------------------------------------------------------------


def test_openvino_computes_in_bfloat16_where_it_is_asked_for(request, tiny_gemma):
    folder = str(exported(request, "tiny_gemma", "openvino", "float32"))
    inputs = [Input(text, Task.QUERY) for text in TEXTS]
    half = loaded(folder, precision="bfloat16")
    assert half.space.precision == "bfloat16"
    right = loaded(str(tiny_gemma), device="cpu").encode(inputs)
    assert (half.encode(inputs) * right).sum(axis=1).min() > 0.99


def test_no_two_ways_to_compute_share_a_space(request):
    float32, int8 = (str(exported(request, "tiny_gemma", "openvino", precision)) for precision in ("float32", "int8"))
    spaces = {
        (folder, precision): loaded(folder, precision=precision).space.fingerprint
        for folder in (float32, int8)
        for precision in ("float32", "bfloat16")
    }
    assert len(set(spaces.values())) == 4


def test_openvino_refuses_float16(request):
    folder = str(exported(request, "tiny_gemma", "openvino", "float32"))
    with pytest.raises(InputError, match="float16"):
        _ = load_encoder(EncoderSettings(model=folder, precision="float16")).space


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_a_device_other_than_the_cpu_is_refused(request, to):
    folder = str(exported(request, "tiny_gemma", to, "float32"))
    with pytest.raises(ModelUnavailable, match=f"the runtime {to} computes on the CPU, and the device cuda is asked for"):
        _ = load_encoder(EncoderSettings(model=folder, device="cuda")).space


@pytest.mark.parametrize(("to", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_an_engine_that_is_not_installed_names_the_pip_command(request, monkeypatch, to, package):
    folder = str(exported(request, "tiny_gemma", to, "float32"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'gemma-rag\[{to}\]'"):
        _ = load_encoder(EncoderSettings(model=folder)).space


def test_a_graph_that_openvino_cannot_read_is_refused(request, tmp_path):
    import shutil

    from gemma_rag.encoders.exported import file_digest

    folder = Path(shutil.copytree(exported(request, "tiny_gemma", "openvino", "float32"), tmp_path / "copy"))
    (folder / "model.xml").write_text("<net>")
    about = json.loads((folder / DESCRIPTION).read_text())
    about["files"]["model.xml"] = [5, file_digest(folder / "model.xml")]
    (folder / DESCRIPTION).write_text(json.dumps(about))
    with pytest.raises(ModelUnavailable, match=r"OpenVINO cannot open .*model\.xml"):
        _ = load_encoder(EncoderSettings(model=str(folder))).space


# -- without torch ------------------------------------------------------------------------------------------------------


def document(name: str, text: str, title: str = "") -> Document:
    return Document(id=name, text=text, title=title, category="Help")


_WITHOUT_TORCH = """
import json, sys
from gemma_rag import GemmaEmbeddings, KnowledgeBase, TwoStageRetriever
embeddings = GemmaEmbeddings(model=sys.argv[1], show_progress=False)
rows = [embeddings.embed_query("How do I reset my password?"), *embeddings.embed_documents(["a", "b"], titles=["T", None])]
with KnowledgeBase.open(sys.argv[2]) as base:
    hits = TwoStageRetriever(base, mode="flat").retrieve("Password?", k=1)
heavy = {"torch", "transformers", "sentence_transformers"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
print(json.dumps(rows))
"""


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_an_exported_folder_answers_with_no_torch_imported(request, tmp_path, to):
    folder = str(exported(request, "tiny_gemma", to, "float32"))
    embeddings = GemmaEmbeddings(model=folder, show_progress=False)
    with KnowledgeBase.from_documents([document("1", "Reset it in the portal.", "Passwords")], embeddings) as base:
        base.save(tmp_path / "kb")
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", _WITHOUT_TORCH, folder, str(tmp_path / "kb")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = [embeddings.embed_query("How do I reset my password?"), *embeddings.embed_documents(["a", "b"], titles=["T", None])]
    assert np.abs(np.array(json.loads(done.stdout)) - rows).max() < 1e-5


def test_a_knowledge_base_on_an_exported_folder_is_saved_and_opened(request, tmp_path, monkeypatch):
    folder = exported(request, "tiny_gemma", "openvino", "int8")
    monkeypatch.chdir(folder.parent)
    documents = [
        document("1", "Reset it in the portal.", "Passwords"),
        document("2", "Twenty-five days a year.", "Leave"),
    ]
    embeddings = GemmaEmbeddings(model=folder.name, show_progress=False)
    with KnowledgeBase.from_documents(documents, embeddings) as base:
        before = TwoStageRetriever(base, mode="flat").retrieve("Reset it in the portal.")
        base.save(tmp_path / "kb")
    monkeypatch.chdir(tmp_path)  # the folder's name alone would not be found from here
    with KnowledgeBase.open(tmp_path / "kb") as base:
        assert base.space == embeddings.space
        after = TwoStageRetriever(base, mode="flat").retrieve("Reset it in the portal.")
    assert [(hit.document.id, hit.score) for hit in after.hits] == [(hit.document.id, hit.score) for hit in before.hits]


def test_a_knowledge_base_of_one_engine_is_not_opened_with_another(request, tmp_path):
    one, other = (
        GemmaEmbeddings(model=str(exported(request, "tiny_gemma", "openvino", precision)), show_progress=False)
        for precision in ("float32", "int8")
    )
    with KnowledgeBase.from_documents([document("1", "Reset it.")], one) as base:
        base.save(tmp_path / "kb")
    with pytest.raises(InputError, match="precision: stored 'float32', given 'int8'"):
        KnowledgeBase.open(tmp_path / "kb", other)
