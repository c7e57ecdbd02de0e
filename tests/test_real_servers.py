"""The runtime ``openai`` against real servers, which serve MiniLM to it over the loopback.

They are not installed by default. These environment variables say where they are; without them the tests are skipped:

    GEMMA_RAG_INFINITY      the Python of an environment that has infinity-emb, or the folder of that Python (`make servers`)
    GEMMA_RAG_LLAMA_SERVER  llama.cpp's llama-server, and
    GEMMA_RAG_LLAMA_MODEL   all-MiniLM-L6-v2 as a float32 GGUF file
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gemma_rag import GemmaEmbeddings, KnowledgeBase, TwoStageRetriever, cli, load_documents
from gemma_rag.encoders import EncoderSettings, Input, load_encoder
from gemma_rag.encoders.cached import CachedEncoder
from gemma_rag.encoders.models import find_model
from gemma_rag.encoders.settings import API_KEY
from gemma_rag.errors import EmbeddingServerError, InputError, ModelUnavailable
from gemma_rag.prompts import Task
from gemma_rag.results import Outcome
from gemma_rag.vectors import Floats, truncate
from gemma_rag.verify import Fault

from .real_server import KEY, KINDS, NAME, Kind, RealServer

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]

SENTENCES = (
    "Install the VPN client, then sign in.",
    "Wie viele Tage Urlaub habe ich im Jahr?",
    "Où trouver l'imprimante couleur du deuxième étage ?",
    "¿Cuánto cuesta una página a color?",
    "Zażółć gęślą jaźń, a potem zaloguj się ponownie.",
    "Сколько дней отпуска у меня осталось?",
    "Πόσο κοστίζει το εισιτήριο για την Αθήνα;",
    "Şifremi unuttum, İstanbul ofisini arayabilir miyim?",
    "كم عدد أيام الإجازة السنوية؟",
    "איפה אפשר להדפיס בצבע?",
    "ฉันลืมรหัสผ่านของฉัน",
    "来历不明的 U 盘不得插入公司电脑。",
    "如何重設我的密碼?",
    "パスワードを忘れた場合はどうすればいいですか。",
    "Tôi có bao nhiêu ngày nghỉ phép?",
    "for i in range(10):\n\tprint(f'{i:>3} {i ** 2}')  # squares",
    "🙂 👩‍👩‍👧‍👦 🇵🇹 naïve café — “quoted” … ½ ﬁne",
    "3.14159, 27-11-2024, A-113, +351 21 000 00 00",
    "k",
)
TEXTS = [" ".join([SENTENCES[i % 19]] * (40 if i % 50 == 0 else 1 + i % 2)) + f" {i}" * (i > 18) for i in range(290)]
TEXTS += TEXTS[:10]
BEYOND = [text for text in TEXTS if len(text.split()) > 256]
KOREAN_AND_INDIC = ["비밀번호를 어떻게 재설정하나요?", "छुट्टी के लिए आवेदन कैसे करें?", "দোকানটা কখন খোলে?", "பேருந்து எப்போது வரும்?"]


def queries(texts: list[str]) -> list[Input]:
    return [Input(text, Task.QUERY) for text in texts]


def closest(ours: Any, right: Floats) -> float:
    """The smallest cosine of a row with the row that is right; both must be of norm 1."""
    ours = np.asarray(ours, dtype=np.float32)
    assert ours.shape == right.shape
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)
    return float((ours * right).sum(axis=1).min())


def skipped(kind: Kind) -> list[Any]:
    return [pytest.mark.skip(f"{' and '.join(kind.missing)} not set: no {kind.name} here")] if kind.missing else []


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=skipped(kind), id=kind.name) for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def model() -> str:
    return find_model("minilm").location


@pytest.fixture(scope="module")
def server(
    kind: Kind, model: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[RealServer]:
    with kind.start(tmp_path_factory.mktemp("server"), model) as server:
        request.getfixturevalue("right")  # while it starts
        server.wait()
        yield server


@pytest.fixture(autouse=True)
def what_the_server_prints(server: RealServer) -> Iterator[None]:
    """Beside a failure."""
    start = server.log.stat().st_size
    yield
    print(server.printed(start)[-3000:])


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)


@pytest.fixture(scope="module")
def right(minilm: GemmaEmbeddings) -> Floats:
    """The vectors of `TEXTS` as questions, computed here."""
    return minilm.embed(TEXTS, Task.QUERY)


@pytest.fixture
def embeddings(server: RealServer) -> GemmaEmbeddings:
    return at(server)


def settings(server: RealServer, **others: Any) -> EncoderSettings:
    return EncoderSettings(**{"model": NAME, "runtime": "openai", "url": server.url, "show_progress": False, **others})


def at(server: RealServer, **others: Any) -> GemmaEmbeddings:
    return GemmaEmbeddings(**settings(server, **others).model_dump(exclude_defaults=True))


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_model(embeddings: GemmaEmbeddings, right: Floats):
    assert closest(embeddings.embed(TEXTS, Task.QUERY), right) >= 0.9999


def test_the_context_and_the_tokens_are_those_of_the_model(embeddings: GemmaEmbeddings, minilm: GemmaEmbeddings):
    assert embeddings.space.max_tokens == minilm.space.max_tokens == 256
    assert embeddings.count_tokens(TEXTS) == minilm.count_tokens(TEXTS)


def test_titles_come_before_their_documents(embeddings: GemmaEmbeddings, minilm: GemmaEmbeddings):
    texts, titles = TEXTS[:6], ["VPN", None, "", "Étage 2", "Zażółć", "Отпуск"]
    right = minilm.embed(texts, Task.DOCUMENT, titles)
    assert closest(embeddings.embed_documents(texts, titles), right) >= 0.9999


def test_korean_and_indic_texts_come_out_wrong_where_the_server_drops_their_vowels(
    kind: Kind, embeddings: GemmaEmbeddings, minilm: GemmaEmbeddings
):
    right = minilm.embed(KOREAN_AND_INDIC, Task.QUERY)
    assert (closest(embeddings.embed(KOREAN_AND_INDIC, Task.QUERY), right) >= 0.9999) is kind.keeps_vowels


async def test_several_asynchronous_callers_get_their_own_vectors(embeddings: GemmaEmbeddings, right: Floats):
    parts = [slice(start, start + 60) for start in range(0, len(TEXTS), 60)]
    rows = await asyncio.gather(*(embeddings.aembed(TEXTS[part], Task.QUERY) for part in parts))
    assert closest(np.concatenate(rows), right) >= 0.9999
    assert closest([await embeddings.aembed_query(TEXTS[0])], right[:1]) >= 0.9999


def test_several_texts_go_out_in_one_request_and_several_requests_at_a_time(server: RealServer, right: Floats):
    sizes, at_work = [], [0]
    encoder = load_encoder(settings(server, batch_texts=7, concurrency=8))
    transport = encoder.engine.transport

    async def counted(path: str, body: Any, post: Any = transport.post) -> Any:
        sizes.append(len(body["input"]))
        at_work.append(at_work[-1] + 1)
        answer = await post(path, body)
        at_work.append(at_work[-1] - 1)
        return answer

    transport.post = counted
    assert closest(encoder.encode(queries(TEXTS)), right) >= 0.9999
    assert (max(sizes), sum(sizes)) == (7, len(set(TEXTS)))  # equal ones once
    assert max(at_work) == 8


# -- what the server does not do --------------------------------------------------------------------------------------


def test_a_cut_vector_is_normalised_here_since_the_server_does_not(kind: Kind, server: RealServer, right: Floats):
    body = {"model": NAME, "input": TEXTS[1:4], "dimensions": 128}
    with httpx.Client(trust_env=False, headers={"authorization": f"Bearer {KEY}"}, timeout=30.0) as client:
        data = client.post(f"{server.url}/v1/embeddings", json=body).raise_for_status().json()["data"]
    assert {len(row["embedding"]) for row in data} == {128 if kind.cuts else 384}
    raw = np.array([row["embedding"][:128] for row in data])
    assert np.linalg.norm(raw, axis=1).max() < 0.9
    rows = at(server, dimensions=128, untrained_dimensions=True).embed(TEXTS[1:4], Task.QUERY)
    assert closest(rows, truncate(right[1:4], 128)) >= 0.9999


def test_a_text_beyond_the_context_is_refused_before_anything_is_sent(server: RealServer, monkeypatch: pytest.MonkeyPatch):
    encoder = load_encoder(settings(server, on_overflow="error"))
    fitting = [text for text in TEXTS if text not in BEYOND][:3]
    assert encoder.encode(queries(fitting)).shape == (3, 384)
    monkeypatch.setattr(encoder.engine.transport, "post", None)
    with pytest.raises(InputError, match=rf"longer than the context of 256 tokens.*: index {TEXTS.index(BEYOND[0])}[, ]"):
        encoder.encode(queries(TEXTS))


def test_a_text_beyond_the_context_can_be_averaged(server: RealServer, minilm: GemmaEmbeddings):
    texts = [BEYOND[0], TEXTS[3], BEYOND[-1]]
    right = minilm.model_copy(update={"on_overflow": "average"}).embed(texts, Task.DOCUMENT)
    assert closest(at(server, on_overflow="average").embed(texts, Task.DOCUMENT), right) >= 0.9999


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_told_with_the_one_that_is(server: RealServer):
    with pytest.raises(ModelUnavailable, match=rf"has no model google/embeddinggemma-300m. It has {NAME}: give one"):
        at(server, model="embeddinggemma")


@pytest.mark.parametrize(("given", "cure"), [(None, API_KEY), ("wrong-key", "check api_key")])
def test_a_key_that_the_server_refuses_is_an_error_with_the_cure(
    server: RealServer, monkeypatch: pytest.MonkeyPatch, given: str | None, cure: str
):
    monkeypatch.delenv(API_KEY)
    with pytest.raises(EmbeddingServerError, match=rf"answered with 401.*{cure}") as caught:
        at(server, api_key=given)
    assert caught.value.status == 401
    assert "wrong-key" not in str(caught.value)


def test_a_url_that_leads_elsewhere_is_an_error_with_the_cure(server: RealServer):
    with pytest.raises(EmbeddingServerError, match=r"/nowhere/v1/embeddings answered with 404.*Is the url right\?"):
        at(server, url=f"{server.url}/nowhere")


def test_what_was_computed_before_the_server_died_is_kept(
    kind: Kind, server: RealServer, model: str, right: Floats, tmp_path: Path
):
    few = {"batch_texts": 16, "concurrency": 2, "retries": 3}
    with kind.start(tmp_path / "mortal", model) as mortal:
        mortal.wait()
        encoder = load_encoder(settings(mortal, **few))
        kill_after(5, encoder.engine.transport, mortal)
        cached = CachedEncoder(encoder, tmp_path / "cache")
        with pytest.raises(EmbeddingServerError, match=r"cannot be reached.*Is the server running") as caught:
            cached.encode(queries(TEXTS))
    error = caught.value
    assert (error.status, error.url) == (None, f"{mortal.url}/v1/embeddings")
    done = sorted(error.finished)
    kept = cached.statistics().entries
    assert 5 * 16 <= kept == len({TEXTS[i] for i in done}) < 150
    assert closest(cached.encode(queries([TEXTS[i] for i in done])), right[done]) >= 0.9999  # nobody could compute them now
    other = CachedEncoder(load_encoder(settings(server, **few)), tmp_path / "cache")  # goes on where that one was
    assert closest(other.encode(queries(TEXTS)), right) >= 0.9999
    assert (other.statistics().hits, other.statistics().misses) == (kept, len(set(TEXTS)) - kept)


def kill_after(answers: int, transport: Any, server: RealServer) -> None:
    post, came = transport.post, 0

    async def post_and_kill(path: str, body: Any) -> Any:
        nonlocal came
        answer = await post(path, body)
        came += 1
        if came == answers:
            server.kill()
        return answer

    transport.post = post_and_kill


# -- on the command line ----------------------------------------------------------------------------------------------


def test_a_knowledge_base_on_a_server_answers_as_the_one_in_this_process_does(
    server: RealServer, minilm: GemmaEmbeddings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sample = Path(str(files("gemma_rag") / "sample"))
    lines = (sample / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    words = ["index", sample / "handbook", "--model", NAME, "--runtime", "openai", "--url", server.url, "--out", tmp_path]
    assert cli.run([*map(str, words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 42

    def asked(base: KnowledgeBase) -> list[tuple[Outcome, list[str]]]:
        found = TwoStageRetriever(base).retrieve_many(questions)
        return [(one.outcome, [hit.document.id for hit in one.hits]) for one in found]

    here = asked(KnowledgeBase.from_documents(load_documents(str(sample / "handbook")).documents, minilm))
    with KnowledgeBase.open(tmp_path) as served:
        assert asked(served) == here
    for outcome in (Outcome.ANSWERED, Outcome.CATEGORY_BELOW_THRESHOLD):
        place = [one for one, _ in here].index(outcome)
        assert cli.run(["ask", str(tmp_path), questions[place], "--json"]) == (0 if outcome is Outcome.ANSWERED else 3)
        answer = json.loads(capsys.readouterr().out)
        assert (answer["outcome"], [hit["id"] for hit in answer["hits"]]) == (outcome.value, here[place][1])


def test_verify_passes_or_names_what_is_wrong_with_the_server(
    kind: Kind, server: RealServer, capsys: pytest.CaptureFixture[str]
):
    start = time.monotonic()
    words = ["verify", "--model", NAME, "--runtime", "openai", "--url", server.url, "--bound-of", "float32", "--json"]
    status = cli.run(words)
    found = json.loads(capsys.readouterr().out)
    assert time.monotonic() - start < 60
    assert (status, found["passed"]) == ((0, True) if kind.keeps_vowels else (3, False))
    assert [fault["name"] for fault in found["faults"]] == ([] if kind.keeps_vowels else [Fault.TEXTS_CHANGED.value])
    languages = found["groups"]["language"].items()
    off = {language for language, agreement in languages if agreement["smallest"] < found["bound"]}
    assert off == (set() if kind.keeps_vowels else {"ko", "hi", "bn", "ta"})
    assert len(languages) > 40
