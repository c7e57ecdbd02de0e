"""The commands that learn and measure: what they change, what they print, and how they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma_rag import cli
from gemma_rag.calibrating import calibrate
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import load_labelled

PLAIN_KEYS = {
    "recall@1",
    "recall@5",
    "mrr@10",
    "ndcg@10",
    "category_accuracy",
    "routing_loss",
    "documents_scored",
    "abstention_auroc",
    "end_to_end",
    "n_queries",
    "seconds",
}


def write(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def gemma_rag(capsys):
    """Run a command; returns exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


# -- fit and calibrate ------------------------------------------------------------------------------------------------

COLOURS = ["red", "green", "blue", "white"]
THINGS = {"apple": "fruit", "pear": "fruit", "plum": "fruit", "car": "traffic", "bus": "traffic", "tram": "traffic"}
STARTS = ["Where is", "Who has"]
PAGES = [{"id": f"{c}-{t}", "text": f"The {c} {t}.", "category": THINGS[t]} for c in COLOURS for t in THINGS]
ANSWERED = [
    {"question": f"{start} the {c} {t}?", "relevant": [f"{c}-{t}"], "split": "dev"}
    for c in COLOURS
    for t in THINGS
    for start in STARTS
]
SILENT = [
    {"question": f"{start} the {c} {t}?", "relevant": [], "split": "dev"}
    for c in COLOURS
    for t in ("whale", "shark", "piano", "castle", "doctor")
    for start in STARTS
]


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("labels") / "labels.jsonl", ANSWERED + SILENT)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = write(folder / "pages.jsonl", PAGES)
    words = ["index", source, "--out", folder / "kb", "--model", "minilm", "--device", "cpu", "--json"]
    assert cli.run([str(word) for word in words]) == 0
    return folder / "kb"


@pytest.fixture
def kb(indexed, tmp_path) -> Path:
    """A knowledge base of this test's own."""
    return Path(shutil.copytree(indexed, tmp_path / "kb"))


def learned(gemma_rag, kb) -> dict:
    return json.loads(gemma_rag("info", kb, "--json")[1])["learned"]


def test_a_calibration_makes_ask_refuse_what_the_labels_say_has_no_answer(gemma_rag, kb, labels):
    questions = ["Find the green tram", "Find the green dolphin"]
    assert [gemma_rag("ask", kb, question)[0] for question in questions] == [0, 0]
    status, out, _ = gemma_rag("calibrate", kb, labels)
    assert status == 0
    assert "With as many questions ending well as possible" in " ".join(out.split())
    assert [gemma_rag("ask", kb, question)[0] for question in questions] == [0, 3]
    thresholds = json.loads(gemma_rag("ask", kb, questions[0], "--json")[1])["thresholds"]
    assert thresholds["acts_on"] == "evidence"


def test_info_says_what_was_learned(gemma_rag, kb, labels):
    assert learned(gemma_rag, kb) == {"ranking": None, "calibration": None}
    gemma_rag("fit", kb, labels)
    gemma_rag("calibrate", kb, labels)
    about = learned(gemma_rag, kb)
    assert about["ranking"]["questions"] == len(ANSWERED)
    assert about["calibration"]["kinds"]["hybrid"]["rule"] == "end_to_end"
    out = " ".join(gemma_rag("info", kb)[1].split())
    assert f"learned from {len(ANSWERED)} questions: words" in out
    assert "calibrated: hybrid by end-to-end" in out


def test_a_fit_changes_what_ask_finds_first(gemma_rag, tmp_path):
    # Two categories write about the same topics; labels say that "my invoice" asks for the second, whose pages do not say so.
    topics = ["apple", "pear", "plum", "car", "bus", "tram"]
    pages = [{"id": f"{kind}-{t}", "text": f"{t} {more}", "category": kind} for t in topics for kind, more in
             (("letters", t), ("manuals", "handbook with pictures"))]  # fmt: skip
    rows = [
        {"question": f"{start} {t} invoice", "relevant": [f"manuals-{t}"]}
        for t in topics
        for start in ("my", "the", "one", "an")
    ]
    source, file = write(tmp_path / "pages.jsonl", pages), write(tmp_path / "labels.jsonl", rows)
    gemma_rag("index", source, "--out", tmp_path / "kb", "--model", "minilm", "--device", "cpu", "--json")

    def first() -> str:
        out = gemma_rag(
            "ask", tmp_path / "kb", "which plum invoice", "--document-threshold=-1", "--category-threshold=-1", "--json"
        )
        return json.loads(out[1])["hits"][0]["id"]

    assert first() == "letters-plum"
    report = json.loads(gemma_rag("fit", tmp_path / "kb", file, "--json")[1])
    assert report["router_weight"] > 0
    assert report["after"] > report["before"]
    assert first() == "manuals-plum"


def test_a_fit_is_one_json_object_or_two_sentences(gemma_rag, kb, labels):
    status, out, _ = gemma_rag("fit", kb, labels, "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["questions"], report["lexical_weight"], report["router_weight"]) == (len(ANSWERED), 0.5, 0.0)
    assert {"before", "after", "notes"} <= report.keys()
    out = gemma_rag("fit", kb, labels)[1]
    assert f"Fitted on {len(ANSWERED)} questions: lexical weight 0.5, no router" in out


def test_a_new_fit_says_that_the_calibration_is_forgotten(gemma_rag, kb, labels):
    gemma_rag("calibrate", kb, labels)
    _, _, errors = gemma_rag("fit", kb, labels)
    assert "calibrate again" in errors
    assert learned(gemma_rag, kb)["calibration"] is None


def test_a_calibration_is_one_json_object(gemma_rag, kb, labels):
    status, out, _ = gemma_rag("calibrate", kb, labels, "--json", "--rule", "coverage", "--target", "0.5")
    report = json.loads(out)
    point = report["kinds"]["hybrid"]["document"]
    assert status == 0
    assert (report["questions"], report["estimated"]) == (len(ANSWERED + SILENT), False)
    assert (point["rule"], point["target"]) == ("coverage", 0.5)
    assert point["coverage"] == pytest.approx(0.5, abs=0.1)  # of questions that the threshold was not chosen on
    assert {other["rule"] for other in report["kinds"]["hybrid"]["points"]} == {"end_to_end", "best_f1", "precision"}


@pytest.mark.parametrize(
    ("options", "rule", "target", "confidence"),
    [
        ([], "end_to_end", None, None),
        (["--rule", "best-f1"], "best_f1", None, None),
        (["--rule", "precision"], "precision", 0.9, None),
        (["--rule", "guarantee", "--target", "0.2", "--confidence", "0.9"], "guarantee", 0.2, 0.9),
    ],
)
def test_each_rule_has_a_name_on_the_command_line(gemma_rag, kb, labels, options, rule, target, confidence):
    gemma_rag("calibrate", kb, labels, *options, "--json")
    with KnowledgeBase.open(kb) as base:
        point = base.learned.calibration.kinds["hybrid"].document
    assert (point.rule, point.target, point.confidence) == (rule, target, confidence)


def test_a_guarantee_with_too_few_labels_says_how_many_more_it_takes_and_changes_nothing(gemma_rag, kb, labels):
    status, out, errors = gemma_rag("calibrate", kb, labels, "--rule", "guarantee")
    assert status == 2
    assert (
        f"at least 59 labelled questions that have no answer, and there are {len(SILENT)}: add {59 - len(SILENT)} more"
        in errors
    )
    assert out == ""
    assert learned(gemma_rag, kb)["calibration"] is None


def test_without_labels_thresholds_are_estimated_and_the_estimate_says_so(gemma_rag, kb):
    status, _, errors = gemma_rag("calibrate", kb, "--self")
    assert status == 0
    assert "an estimate from the documents alone" in errors
    calibration = learned(gemma_rag, kb)["calibration"]
    assert calibration["estimated"] is True
    assert "estimated without labels: hybrid by estimate" in gemma_rag("info", kb)[1]


def test_a_split_can_be_chosen(gemma_rag, kb, tmp_path):
    rows = [*ANSWERED, *({**row, "split": "test"} for row in ANSWERED[:30]), *SILENT]
    file = write(tmp_path / "labels.jsonl", rows)
    for command, split, count in (
        ("fit", "test", 30),
        ("fit", "dev", len(ANSWERED)),
        ("calibrate", "dev", len(ANSWERED + SILENT)),
    ):
        assert json.loads(gemma_rag(command, kb, file, "--split", split, "--json")[1])["questions"] == count


def test_a_page_and_plots_are_written(gemma_rag, kb, labels, tmp_path):
    page, plots = tmp_path / "out" / "page.html", tmp_path / "plots"
    status, _, _ = gemma_rag("calibrate", kb, labels, "--report", page, "--plots", plots)
    assert status == 0
    assert "Thresholds of hybrid search" in page.read_text(encoding="utf-8")
    assert {file.name for file in plots.iterdir()} >= {"document-roc.png", "document-scores.png", "category-scores.png"}


def test_the_second_page_shows_what_changes_against_the_first(gemma_rag, kb, labels, tmp_path):
    pages = [tmp_path / "first.html", tmp_path / "second.html"]
    gemma_rag("calibrate", kb, labels, "--report", pages[0])
    gemma_rag("calibrate", kb, labels, "--report", pages[1], "--rule", "coverage", "--target", "0.3")
    first, second = (page.read_text(encoding="utf-8") for page in pages)
    assert "Who has the red whale?" in first  # before there was a threshold, everything was answered
    assert "Who has the red whale?" not in second  # was and is refused
    assert "Newly refused" in second  # what a coverage of 30 % lets go


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("both", [False, True])
def test_a_file_or_self_and_not_both(gemma_rag, kb, labels, both, form):
    status, out, errors = gemma_rag("calibrate", kb, *([labels, "--self"] if both else []), *form)
    assert status == 2
    assert "give a file of labelled questions, or --self to estimate without one" in errors
    assert ("give a file" in json.loads(out)["error"]) if form else out == ""


@pytest.mark.parametrize("command", ["fit", "calibrate"])
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"question": "Where?", "relevant": ["nowhere"]}],
            [],
            "the labels name documents that the knowledge base does not have",
        ),
        (ANSWERED, ["--split", "train"], "there is no labelled question in"),
        ([{"question": "Where?"}], [], '"relevant" is missing'),
    ],
    ids=["document", "split", "relevant"],
)
def test_labels_that_cannot_be_used_change_nothing(gemma_rag, kb, tmp_path, command, rows, options, message):
    status, out, errors = gemma_rag(command, kb, write(tmp_path / "labels.jsonl", rows), *options)
    assert status == 2
    assert message in errors
    assert out == ""
    assert learned(gemma_rag, kb) == {"ranking": None, "calibration": None}


def test_too_few_labels_for_a_fit(gemma_rag, kb, tmp_path):
    status, _, errors = gemma_rag("fit", kb, write(tmp_path / "labels.jsonl", ANSWERED[:19]))
    assert status == 2
    assert "fitting needs 20 questions with an answer, in a language that the model reads, and got 19" in errors


def test_the_command_does_as_the_function(gemma_rag, kb, labels, indexed):
    gemma_rag("calibrate", kb, labels)
    with KnowledgeBase.open(kb) as one, KnowledgeBase.open(indexed) as other:
        calibrate(other, load_labelled(labels), keep=False)
        assert one.learned.calibration == other.learned.calibration


# -- eval -------------------------------------------------------------------------------------------------------------

# As in test_evaluation: "red" finds a, b, c, ... l and "apple" the contrary. Ranks 1, 3, 8, and none among the first ten.
REDS, APPLES = [12] * 6 + [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5] + [12] * 6
CORPUS = [
    {"id": i, "text": "red " * reds + "apple " * apples, "category": "reds" if reds > apples else "apples"}
    for i, reds, apples in zip("abcdefghijkl", REDS, APPLES, strict=True)
]
QUERIES = [
    {"id": n, "text": text, "relevant": [right], "category": category, "split": "test"}
    for n, (text, right, category) in enumerate(
        [("red", "a", "reds"), ("Red?", "c", "reds"), ("red red", "h", "apples"), ("apple", "a", "reds")]
    )
]
OTHERS = [{"text": text, "relevant": [], "answerable": False, "kind": "far", "split": "test"} for text in ("bus", "tram")]
DEV = [
    *({"text": text, "relevant": [right], "split": "dev"} for _ in range(4) for text, right in (("red", "a"), ("apple", "l"))),
    *({"text": text, "relevant": [], "split": "dev"} for _ in range(4) for text in ("bus", "tram")),
]
BY_HAND = {
    "recall@1": 0.25,
    "recall@5": 0.5,
    "recall@10": 0.75,
    "mrr@10": 0.3646,  # (1 + 1/3 + 1/8) / 4
    "ndcg@10": 0.4539,  # (1 + 1/2 + 1/log2(9)) / 4
    "documents_scored": 0.6111,  # 11 of 12 say "red" or "apple", none "bus" or "tram"
    "category_accuracy": None,
    "routing_loss": None,
    "abstention_auroc": 1.0,
    "end_to_end": 0.5,  # the first question, and the two that are refused
    "n_queries": 6,
}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "toy" / "corpus.jsonl", CORPUS)
    write(tmp_path / "toy" / "queries.jsonl", QUERIES + OTHERS + DEV)
    return tmp_path / "toy"


@pytest.fixture
def loading(monkeypatch, words) -> list:
    """Gives the word encoder in place of any model, and notes the settings that it was asked for with."""
    asked = []

    def load(settings):
        asked.append(settings)
        return words

    monkeypatch.setattr("gemma_rag.encoders.load_encoder", load)
    return asked


def measured(gemma_rag, *words) -> dict:
    status, out, _ = gemma_rag("eval", *words, "--json")
    assert status == 0
    return json.loads(out)


def test_by_words_alone_no_model_is_loaded_and_the_numbers_are_those_by_hand(gemma_rag, data, loading):
    found = measured(gemma_rag, data, "--mode", "lexical")
    assert {name: found[name] for name in BY_HAND} == BY_HAND
    assert found.keys() >= PLAIN_KEYS
    assert (found["dataset"], found["model"], found["mode"], found["split"]) == ("toy", "none", "lexical", "test")
    assert loading == []


def test_the_model_is_the_one_asked_for_and_the_rest_is_too(gemma_rag, data, loading):
    found = measured(gemma_rag, data, "--model", "minilm")
    assert [settings.model for settings in loading] == ["minilm"]
    assert found.keys() >= PLAIN_KEYS
    # without words or names to help, one half is searched: the right one for the first two questions; both for the silent ones
    numbers = {name: found[name] for name in ("recall@10", "category_accuracy", "routing_loss", "documents_scored")}
    assert numbers == {"recall@10": 0.5, "category_accuracy": 0.5, "routing_loss": 0.5, "documents_scored": 0.6667}
    found = measured(gemma_rag, data, "--mode", "flat", "--hybrid", "--split", "dev")
    told = {name: found[name] for name in ("mode", "hybrid", "split", "recall@1", "n_queries", "routing_loss", "end_to_end")}
    assert told == {
        "mode": "flat",
        "hybrid": True,
        "split": "dev",
        "recall@1": 1.0,
        "n_queries": 16,
        "routing_loss": None,
        "end_to_end": None,
    }


def test_too_few_labels_for_a_router_are_said(gemma_rag, data, loading):
    found = measured(gemma_rag, data, "--router", "learned")
    assert found["router"] == "learned"
    assert [note.partition(":")[0] for note in found["notes"]] == ["nothing was fitted"]
    _, out, errors = gemma_rag("eval", data, "--router", "learned")
    assert "nothing was fitted: fitting needs 20 questions" in errors
    assert "two-stage learned" in " ".join(out.split())


def test_two_modes_are_compared(gemma_rag, data, loading):
    found = measured(gemma_rag, data, "--mode", "flat", "--hybrid", "--compare", "classic")
    comparison = found["comparison"]
    assert (found["hybrid"], comparison["mode"], comparison["hybrid"]) == (True, "classic", False)
    metric = comparison["metrics"]["recall@1"]
    assert metric["first"] == found["recall@1"]
    assert metric["difference"] == pytest.approx(metric["first"] - metric["second"])
    assert found["category_accuracy"] is None


def test_comparing_with_words_loads_the_model_for_the_other(gemma_rag, data, loading):
    found = measured(gemma_rag, data, "--mode", "lexical", "--compare", "flat")
    assert len(loading) == 1
    assert (found["mode"], found["model"], found["comparison"]["mode"]) == ("lexical", "words", "flat")
    assert found["comparison"]["metrics"]["documents_scored"]["second"] == 1.0


def test_people_read_a_table(gemma_rag, data, loading):
    status, out, errors = gemma_rag("eval", data, "--mode", "lexical")
    assert status == 0
    assert "toy, test: 6 questions, 4 of them answerable; lexical, none" in out
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:] if len(line.split()) > 1}
    assert (lines["recall@10"], lines["end_to_end"], lines["abstention_auroc"]) == ("0.750", "0.500", "1.000")
    assert "routing_loss" not in lines
    assert "far: AUROC 1.000, 100 % refused" in out
    assert "toy: 12 documents, 22 questions" in errors


def test_a_comparison_is_in_the_table(gemma_rag, data, loading):
    out = gemma_rag("eval", data, "--mode", "flat", "--compare", "lexical")[1]
    [row] = [line.split() for line in out.splitlines() if line.split()[:1] == ["documents_scored"]]
    assert (row[1], row[-3:-1]) == ("1.000", ["0.611", "+0.389"])


def test_a_page_is_written(gemma_rag, data, loading, tmp_path):
    page = tmp_path / "out" / "page.html"
    found = measured(gemma_rag, data, "--mode", "lexical", "--report", page)
    text = page.read_text(encoding="utf-8")
    assert "Evaluation: toy, test questions" in text
    assert "Right document first" in text
    assert "curves" not in found


def test_the_second_run_embeds_nothing_and_measures_the_same(gemma_rag, data, loading, words, tmp_path):
    cache = tmp_path / "vectors"
    first = measured(gemma_rag, data, "--cache", cache)
    calls = len(words.calls)
    assert measured(gemma_rag, data, "--cache", cache) | {"seconds": 0} == first | {"seconds": 0}
    assert len(words.calls) == calls > 0
    assert not (tmp_path / "cache").exists()


def test_vectors_are_kept_in_the_users_cache_folder_unless_nothing_is_to_be_kept(gemma_rag, data, loading, words, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    measured(gemma_rag, data, "--no-cache")
    calls = len(words.calls)
    measured(gemma_rag, data, "--no-cache")
    assert len(words.calls) == 2 * calls
    assert sorted(tmp_path.rglob("*")) == before
    measured(gemma_rag, data)
    assert any((tmp_path / "cache" / "gemma-rag").iterdir())


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, [], "is no data set: it has no corpus.jsonl and no queries.jsonl"),
        ({"corpus": CORPUS}, [], "is no data set: it has no queries.jsonl"),
        (
            {"corpus": CORPUS, "queries": [{"text": "red", "relevant": ["nowhere"], "split": "test"}]},
            [],
            "the labels name documents that the knowledge base does not have: 'nowhere'",
        ),
        ({"corpus": CORPUS, "queries": QUERIES}, ["--split", "dev"], "has no questions of the split 'dev': it has 'test'"),
        ({"corpus": CORPUS, "queries": [{"text": "red", "split": "test"}]}, [], "queries.jsonl:1"),
        ({"corpus": CORPUS, "queries": QUERIES}, ["--mode", "magic"], "magic"),
        ({"corpus": CORPUS, "queries": QUERIES}, ["--mode", "classic", "--hybrid"], "classic is the published form"),
    ],
    ids=["no files", "one file", "unknown document", "split", "bad row", "mode", "classic hybrid"],
)
def test_what_cannot_be_measured_has_exit_status_2(gemma_rag, tmp_path, loading, files, options, message):
    for name, rows in files.items():
        write(tmp_path / "set" / f"{name}.jsonl", rows)
    status, out, errors = gemma_rag("eval", tmp_path / "set", "--no-cache", *options)
    assert status == 2
    assert message in errors
    assert out == ""
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["fit", "calibrate", "eval"])
def test_help_is_there(gemma_rag, command):
    status, out, _ = gemma_rag(command, "--help")
    assert status == 0
    assert "--json" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--self", "--rule", "guarantee", "--target", "0.3"], "leave --rule, --target out"),
        (["--self", "--split", "dev"], "leave --split out"),
        (["LABELS", "--target", "0.9"], "the rule end-to-end has no target"),
        (["LABELS", "--rule", "precision", "--confidence", "0.9"], "only the rule guarantee has a confidence"),
    ],
)
def test_options_that_would_do_nothing_are_refused(gemma_rag, kb, labels, options, message):
    status, _, errors = gemma_rag("calibrate", kb, *(labels if option == "LABELS" else option for option in options))
    assert (status, message in errors) == (2, True)


def test_a_data_set_that_the_model_cannot_read_is_searched_by_words_and_not_embedded(gemma_rag, tmp_path):
    rows = [
        {"id": "usb", "category": "安全", "title": "U 盘", "text": "捡到的 U 盘交给安全组。"},
        {"id": "rest", "category": "假期", "text": "年假二十天。"},
    ]
    write(tmp_path / "set" / "corpus.jsonl", rows)
    asked = [{"text": "年假有多少天？", "split": "test", "relevant": ["rest"], "category": "假期"}]
    write(tmp_path / "set" / "queries.jsonl", asked)
    status, out, _ = gemma_rag("eval", tmp_path / "set", "--model", "minilm", "--no-cache", "--json")
    found = json.loads(out)
    assert (status, found["mode"], found["model"], found["recall@1"]) == (0, "lexical", "none", 1.0)
