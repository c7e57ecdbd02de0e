from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_rag import cli
from gemma_rag.errors import KnowledgeBaseError

PAGES = [
    {"id": "vpn", "title": "VPN", "text": "Install the VPN client. Sign in with the code on your phone.", "category": "it"},
    {
        "id": "printers",
        "title": "Printing",
        "text": "A colour page costs 8 cents.",
        "category": "it",
        "metadata": {"year": 2024},
    },
    {"id": "leave", "title": "Annual leave", "text": "Everyone has 27 days of annual leave.", "category": "time"},
    {"id": "usb", "title": "U 盘", "text": "来历不明的 U 盘不得插入公司电脑。", "category": "安全"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("source") / "pages.jsonl"
    file.write_text("\n".join(json.dumps(page, ensure_ascii=False) for page in PAGES), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "kb"
    assert cli.run(["index", str(source), "--out", str(folder), "--model", "minilm", "--device", "cpu", "--json"]) == 0
    return folder


@pytest.fixture
def gemma_rag(capsys):
    """Run a command; returns exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


def test_an_answer_has_exit_status_0_and_cites(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "How many days of annual leave do I have?")
    assert status == 0
    assert "27 days" in out
    assert "[1] Annual leave" in out


def test_an_off_topic_question_has_exit_status_3_and_its_outcome(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "Who painted the ceiling of the chapel?")
    assert status == 3
    assert "below_threshold" in out


def test_the_json_of_an_answer_is_the_only_thing_on_standard_output(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "What does a colour page cost?", "--json")
    answer = json.loads(out)
    assert status == 0
    assert {"question", "outcome", "answer", "citations", "categories", "hits", "near_misses", "thresholds", "timings_ms"} <= (
        answer.keys()
    )
    assert {"name", "score", "kept", "probability", "why"} == answer["categories"][0].keys()
    assert {"id", "title", "category", "score", "category_score", "text"} <= answer["hits"][0].keys()
    assert answer["hits"][0]["id"] == "printers"


def test_the_json_of_a_refusal_has_its_near_misses(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "What does a colour page cost?", "--document-threshold", "0.99", "--json")
    refusal = json.loads(out)
    assert status == 3
    assert refusal["outcome"] == "document_below_threshold"
    assert refusal["near_misses"][0]["id"] == "printers"
    assert refusal["hits"] == []


def test_a_chinese_question_is_answered_by_its_words(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "U 盘可以插入电脑吗？")
    assert status == 0
    assert "「来历不明的 U 盘不得插入公司电脑。」 [1]" in out


def test_metadata_filters(gemma_rag, base):
    _, out, _ = gemma_rag("ask", base, "What does a page cost?", "--where", "year=2024", "--document-threshold", "-1", "--json")
    assert [hit["id"] for hit in json.loads(out)["hits"]] == ["printers"]


def test_a_category_can_be_chosen(gemma_rag, base):
    _, out, _ = gemma_rag("ask", base, "What is it about?", "--category", "time", "--category-threshold=-1",
                          "--document-threshold=-1", "--json")  # fmt: skip
    assert [hit["id"] for hit in json.loads(out)["hits"]] == ["leave"]


def test_the_model_that_runs_is_named(gemma_rag, base):
    assert "model: sentence-transformers/all-MiniLM-L6-v2" in gemma_rag("ask", base, "leave?")[2]


def test_info_names_counts_and_categories(gemma_rag, base):
    status, out, _ = gemma_rag("info", base, "--json")
    about = json.loads(out)
    assert status == 0
    assert (about["documents"], about["chunks"]) == (4, 4)
    assert [(category["name"], category["documents"]) for category in about["categories"]] == [
        ("it", 2),
        ("time", 1),
        ("安全", 1),
    ]


def test_info_is_readable(gemma_rag, base):
    out = gemma_rag("info", base)[1]
    assert "4 in 3 categories" in out
    assert "安全" in out


# -- indexing -----------------------------------------------------------------------------------------------------------


def index(gemma_rag, *words: object) -> tuple[int, str, str]:
    return gemma_rag("index", *words, "--json")


def test_indexing_again_embeds_only_what_changed(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    changed = tmp_path / "changed.jsonl"
    pages = [{**PAGES[0], "text": "Another text."}, *PAGES[1:3], {**PAGES[0], "id": "new"}]
    changed.write_text("\n".join(json.dumps(page) for page in pages), encoding="utf-8")
    report = json.loads(index(gemma_rag, changed, "--out", tmp_path / "kb")[1])
    assert (report["added"], report["updated"], report["unchanged"], report["deleted"]) == (1, 1, 2, 0)
    assert report["documents"] == 5


def test_replace_deletes_what_the_source_no_longer_has(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(json.dumps(PAGES[0]), encoding="utf-8")
    report = json.loads(index(gemma_rag, fewer, "--out", tmp_path / "kb", "--replace")[1])
    assert (report["deleted"], report["documents"]) == (3, 1)


def test_replace_deletes_nothing_for_a_row_that_cannot_be_read(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAGES[0]) + "\nnonsense\n", encoding="utf-8")
    status, _, errors = gemma_rag("index", broken, "--out", tmp_path / "kb", "--replace", "--skip-bad")
    assert status == 2
    assert "leave --replace out" in errors
    assert json.loads(gemma_rag("info", tmp_path / "kb", "--json")[1])["documents"] == 4


def test_another_model_on_an_existing_base_is_refused_with_the_difference(gemma_rag, source, tmp_path, tiny_gemma):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    status, _, errors = gemma_rag("index", source, "--out", tmp_path / "kb", "--model", tiny_gemma)
    assert status == 2
    assert "dimensions: stored 384, given 48" in errors


def test_another_dimension_on_an_existing_base_is_refused_and_not_ignored(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    options = ["--dimensions", "128", "--untrained-dimensions"]
    status, _, errors = gemma_rag("index", source, "--out", tmp_path / "kb", *options)
    assert status == 2
    assert "dimensions: stored 384, given 128" in errors


def test_another_chunking_on_an_existing_base_is_refused_and_not_ignored(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm")
    status, _, errors = gemma_rag("index", source, "--out", tmp_path / "kb", "--chunk-tokens", "64")
    assert status == 2
    assert "{'max_tokens': 64} was asked for" in errors


def test_bad_rows_are_all_reported_with_their_lines(gemma_rag, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "text": "x", "category": "c"}\nnonsense\n{"id": "a", "text": "", "category": "c"}\n', "utf-8")
    status, _, errors = gemma_rag("index", file, "--out", tmp_path / "kb", "--model", "minilm")
    assert status == 2
    assert "bad.jsonl:2" in errors
    assert "bad.jsonl:3" in errors
    assert not (tmp_path / "kb").exists()


def test_skip_bad_goes_on_and_counts(gemma_rag, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "text": "x", "category": "c"}\nnonsense\n', "utf-8")
    status, out, _ = index(gemma_rag, file, "--out", tmp_path / "kb", "--model", "minilm", "--skip-bad")
    report = json.loads(out)
    assert status == 0
    assert (report["added"], len(report["skipped"])) == (1, 1)


def test_bad_rows_go_to_a_dead_letter_file(gemma_rag, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "text": "x", "category": "c"}\nnonsense\n', "utf-8")
    words = ["--out", tmp_path / "kb", "--model", "minilm", "--dead-letter", tmp_path / "dead.jsonl"]
    status, _, errors = gemma_rag("index", file, *words)
    assert status == 0
    assert "1 bad rows were skipped" in errors
    assert json.loads((tmp_path / "dead.jsonl").read_text("utf-8"))["row"] == "nonsense"


def test_a_batch_is_a_commit(gemma_rag, source, tmp_path):
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm", "--batch", "1")
    by_one = json.loads(gemma_rag("info", tmp_path / "kb", "--json")[1])
    index(gemma_rag, source, "--out", tmp_path / "kb-2", "--model", "minilm")
    at_once = json.loads(gemma_rag("info", tmp_path / "kb-2", "--json")[1])
    assert by_one["documents"] == at_once["documents"] == 4
    assert by_one["generation"] == at_once["generation"] + 3


def test_another_engine_on_an_existing_base_is_refused(gemma_rag, base, source):
    status, _, errors = gemma_rag("index", source, "--out", base, "--engine", "milvus", "--uri", "http://localhost:1")
    assert status == 2
    assert "is kept by faiss, and another engine was asked for" in errors


def test_columns_can_be_named(gemma_rag, tmp_path):
    file = tmp_path / "tickets.csv"
    file.write_text("nr,body,queue\n7,The printer is on fire.,printers\n", "utf-8")
    columns = ["--column", "id=nr", "--column", "text=body", "--column", "category=queue"]
    status, _, _ = index(gemma_rag, file, "--out", tmp_path / "kb", "--model", "minilm", *columns)
    assert status == 0
    assert json.loads(gemma_rag("info", tmp_path / "kb", "--json")[1])["categories"][0]["name"] == "printers"


def test_described_categories_keep_their_descriptions(gemma_rag, source, tmp_path):
    described = tmp_path / "categories.jsonl"
    described.write_text('{"name": "it", "description": "Computers and networks"}\n', "utf-8")
    index(gemma_rag, source, "--out", tmp_path / "kb", "--model", "minilm", "--categories", described)
    about = json.loads(gemma_rag("info", tmp_path / "kb", "--json")[1])
    assert about["categories"][0]["description"] == "Computers and networks"


# -- what goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask"], "Missing argument"),
        (["poetry"], "No such command"),
        (["ask", "{base}"], "give a question, or --interactive"),
        (["ask", "{base}", ""], "empty"),
        (["ask", "{base}", "x", "--interactive"], "give a question, or --interactive"),
        (["ask", "{base}", "--interactive", "--json"], "--json prints one object"),
        (["ask", "{base}", "x", "-k", "0"], "at least 1"),
        (["ask", "{base}", "x", "--mode", "magic"], "magic"),
        (["ask", "{base}", "x", "--category", "poetry"], "has no category 'poetry'. It has it, time, 安全"),
        (["ask", "{base}", "x", "--document-threshold", "huge"], "no threshold preset is named 'huge'"),
        (["ask", "{base}", "x", "--document-threshold", "7"], "is a cosine, from -1 to 1"),
        (["ask", "{base}", "x", "--where", "year"], "--where takes NAME=VALUE"),
        (["ask", "{base}", "x", "--llm", "gemma"], "provider:model"),
        (["index", "{base}/nothing.jsonl", "--out", "{base}-2", "--model", "minilm"], "nothing.jsonl"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--clean", "soap"], "there are whitespace"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--dimensions", "100"], "not trained"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--chunk-tokens", "3"], "at least 16"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--workers", "0"], "at least 1 worker, and 0"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--batch", "0"], "at least 1 document, and 0"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--engine", "milvus"], "needs a uri"),
        (["index", "{source}", "--out", "{base}-2", "--model", "minilm", "--prompts", "poetry"], "no prompt profile"),
    ],
)
def test_bad_usage_has_exit_status_2_and_says_what_to_do(gemma_rag, base, source, words, message):
    status, out, errors = gemma_rag(*(word.format(base=base, source=source) for word in words))
    assert status == 2
    assert message in errors
    assert (out == "") is ("--json" not in words)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "{tmp}/nowhere", "x"], "there is no knowledge base at"),
        (["info", "{tmp}"], "has no manifest.json"),
        (["index", "{source}", "--out", "{tmp}/kb"], "accept the licence"),
        (["demo"], "accept the licence"),
        (["ask", "{base}", "x", "--llm", "transformers:/not/there"], "there is no folder"),
    ],
)
def test_a_fault_has_exit_status_1_and_says_what_to_do(gemma_rag, base, source, tmp_path, words, message):
    status, out, errors = gemma_rag(*(word.format(base=base, source=source, tmp=tmp_path) for word in words))
    assert status == 1
    assert message in errors
    assert out == ""
    assert "Traceback" not in errors


def test_with_json_an_error_is_one_json_object_too(gemma_rag, tmp_path):
    status, out, _ = gemma_rag("info", tmp_path / "nowhere", "--json")
    assert status == 1
    assert "there is no knowledge base" in json.loads(out)["error"]


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(KnowledgeBaseError):
        cli.run(["info", str(tmp_path / "nowhere"), "--debug"])


def test_an_unexpected_error_is_one_line_without_secrets(gemma_rag, base, monkeypatch):
    from gemma_rag import answer

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the provider says: bad key sk-proj-abcdefghijklmnopqrstuvwxyz0123456789")

    monkeypatch.setattr(answer.GroundedAnswerer, "stream", fail)
    status, _, errors = gemma_rag("ask", base, "x")
    assert status == 1
    assert errors.splitlines()[-1].startswith("gemma-rag: RuntimeError: the provider says: bad key [...]")


def test_debug_behind_a_double_dash_belongs_to_the_question(gemma_rag, base):
    status, out, _ = gemma_rag("ask", base, "--json", "--", "--debug")
    assert json.loads(out)["question"] == "--debug"
    assert status in (0, 3)


def test_the_version_is_printed(gemma_rag):
    import gemma_rag as package

    assert gemma_rag("--version")[:2] == (0, f"gemma-rag {package.__version__}\n")


@pytest.mark.parametrize("command", ["", "demo", "index", "ask", "info"])
def test_help_is_there_for_every_command(gemma_rag, command):
    status, out, _ = gemma_rag(*command.split(), "--help")
    assert status == 0
    assert "--help" in out


def test_interactive_answers_until_an_empty_line(base):
    run = subprocess.run(
        [sys.executable, "-m", "gemma_rag.cli", "ask", str(base), "--interactive", "--mode", "lexical"],
        input="colour page\nchapel ceiling\n\nnever asked\n",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert run.returncode == 0
    assert "8 cents" in run.stdout
    assert "category_below_threshold" in run.stdout
    assert "never asked" not in run.stdout


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_terminal_that_knows_ascii_alone_is_no_fault(base, options):
    run = subprocess.run(
        [sys.executable, "-m", "gemma_rag.cli", "ask", str(base), "U 盘可以插入电脑吗", "--mode", "lexical", *options],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0
    if options:
        assert json.loads(run.stdout)["hits"][0]["title"] == "U 盘"


def test_a_local_language_model_writes_the_answer(gemma_rag, base, tiny_language_model):
    status, out, _ = gemma_rag(
        "ask", base, "What does a colour page cost?", "--llm", f"transformers:{tiny_language_model}", "--json"
    )
    answer = json.loads(out)
    assert status in (0, 3)  # random weights may write nothing
    assert answer["kind"] in ("generated", "refusal")
    assert answer["hits"][0]["id"] == "printers"


def test_the_demo_shows_every_outcome(gemma_rag, tmp_path):
    status, out, _ = gemma_rag("demo", "--model", "minilm", "--out", tmp_path / "kb", "--json")
    outcomes = [answer["outcome"] for answer in json.loads(out)["answers"]]
    assert status == 0
    assert outcomes == [
        "answered",
        "answered",
        "answered",
        "category_below_threshold",
        "document_below_threshold",
        "answered",
        "document_below_threshold",
    ]
    assert (tmp_path / "kb" / "manifest.json").is_file()
