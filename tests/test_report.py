"""The pages and plots: every word of the data escaped, nothing loaded from elsewhere, and the right numbers in them."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from gemma_rag import plots, report
from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.report import save_plots, write_calibration_page, write_report

EVALUATION = {
    "dataset": "squad2",
    "model": "all-MiniLM-L6-v2",
    "mode": "two-stage",
    "hybrid": True,
    "router": "none",
    "split": "test",
    "n_queries": 3000,
    "n_answerable": 1500,
    "seconds": 8.12345,
    "recall@1": 0.8147,
    "recall@5": 0.931,
    "recall@10": 0.957,
    "mrr@10": 0.8661,
    "ndcg@10": 0.8888,
    "category_accuracy": 0.92,
    "routing_loss": 0.021,
    "documents_scored": 0.1,
    "abstention_auroc": 0.812,
    "end_to_end": 0.744,
    "risk_coverage_area": 0.31,
    "intervals": {"recall@1": [0.797, 0.832], "mrr@10": [0.85, 0.88]},
    "auroc_by_kind": {"heldout_category": 0.963, "adversarial": 0.712},
    "operating_point": {"rule": "best_f1", "threshold": 0.5, "coverage": 0.79, "false_answers": 0.34, "precision": 0.78},
    "thresholds_chosen_on": "dev",
    "curves": {
        "risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.1, 0.3]},
        "roc": {"x": [0.0, 0.34, 1.0], "y": [0.0, 0.79, 1.0]},
        "precision_recall": {"x": [0.1, 1.0], "y": [1.0, 0.5]},
    },
    "answer_scores": {"answerable": [0.5, 0.7, 0.9], "heldout_category": [0.2, 0.4]},
    "per_category": [
        {"name": "Rhine", "questions": 40, "recall@1": 0.9, "routing_loss": 0.0},
        {"name": "Yuan dynasty", "questions": 60, "recall@1": 0.6, "routing_loss": 0.05},
    ],
    "comparison": {
        "mode": "flat",
        "metrics": {
            "recall@1": {"first": 0.8147, "second": 0.8, "difference": 0.0147, "low": 0.004, "high": 0.025, "p_value": 0.0042}
        },
    },
    "worst": [{"question": "Which river is it?", "expected": "Rhine 4", "got": "Rhine 7", "score": 0.7123}],
}
FLIP = {"question": "May one bring a dog?", "score": 0.45, "answerable": True, "right": True}
CALIBRATION = {
    "title": "Calibration of the handbook",
    "points": [
        {
            "rule": "guarantee",
            "threshold": 0.5,
            "coverage": 0.83,
            "coverage_interval": [0.81, 0.85],
            "precision": 0.9,
            "precision_interval": [0.88, 0.92],
            "false_answers": 0.04,
            "false_answers_interval": [0.03, 0.06],
            "end_to_end": 0.79,
            "statement": "At most 5 in 100 get a false answer.",
        },
        {"rule": "best_f1", "threshold": 0.4, "coverage": 0.9, "statement": "Answers 90 of 100."},
    ],
    "chosen": "guarantee",
    "stages": {
        "document": {
            "scores": [0.9, 0.8, 0.6, 0.3, 0.1],
            "answerable": [True, True, False, True, False],
            "threshold": 0.7,
            "old_threshold": 0.4,
            "roc": {"x": [0, 0, 0.5, 1], "y": [0, 2 / 3, 2 / 3, 1]},
            "precision_recall": {"x": [2 / 3, 1], "y": [1, 0.75]},
        },
        "category": {"scores": [0.5, 0.2], "answerable": [True, False], "threshold": 0.3},
    },
    "reliability": {"predicted": [0.1, 0.5, 0.9], "observed": [0.2, None, 0.8], "count": [10, 0, 30]},
    "flips": {"newly_answered": [FLIP], "newly_refused": [FLIP | {"answerable": False, "right": False}]},
    "notes": ["120 questions without an answer."],
}
NO_PLOTS = {"curves": None, "answer_scores": None, "stages": None, "reliability": None}
PAGES = [
    pytest.param(write_report, EVALUATION, id="evaluation"),
    pytest.param(write_calibration_page, CALIBRATION, id="calibration"),
]


class Page(HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.source, self.elements, self.open, self.words = source, [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], "elements that are not closed"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data)

    def rows(self, heading):
        """The cells of the table after a heading, the head first."""
        after = self.source.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
        return [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", after, re.DOTALL)
        ]


@pytest.fixture
def page(tmp_path):
    """Write a page and read it."""

    def made(write, result):
        file = tmp_path / "made" / "page.html"
        write(result, file)
        assert [other.name for other in file.parent.iterdir()] == ["page.html"], "a scratch file was left"
        return Page(file.read_text("utf-8"))

    return made


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The two whole pages, written once."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(EVALUATION, folder / "evaluation.html")
    write_calibration_page(CALIBRATION, folder / "calibration.html")
    return {name: Page((folder / f"{name}.html").read_text("utf-8")) for name in ("evaluation", "calibration")}


def everywhere(value, words):
    """The same JSON with every text in it, names too, followed by some words."""
    if isinstance(value, dict):
        return {key: everywhere(part, words) for key, part in value.items()}
    if isinstance(value, list):
        return [everywhere(part, words) for part in value]
    return value + words if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["evaluation", "calibration"])
def test_a_page_loads_nothing(pages, name):
    made = pages[name]
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in made.elements}
    for _, attributes in made.elements:
        assert not attributes.keys() & {"src", "srcset", "action", "xlink:href", "onload", "onclick"}
        assert attributes.get("href", "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", made.source))
    assert "//" not in made.source
    assert "@import" not in made.source
    policies = [a["content"] for tag, a in made.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize(("write", "result"), PAGES)
def test_texts_of_the_data_stay_text(page, write, result):
    attack = """\\'"><img src=x onerror=alert(1)></style></svg><script>alert(1)</script>&lt;{title}"""
    harmless, attacked = (page(write, everywhere(result, words)) for words in (" X", attack))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in harmless.elements]
    assert [a.keys() for _, a in attacked.elements] == [a.keys() for _, a in harmless.elements]
    assert attacked.text.count(attack) == harmless.text.count(" X") > 0


@pytest.mark.parametrize("key", ["_<script>$a$", "敦煌"])
def test_the_name_of_a_kind_or_a_stage_stays_text_in_the_plots(page, key):
    words = key.replace("_", " ").strip()
    made = page(write_report, {"answer_scores": {key: [0.1, 0.2]}, "auroc_by_kind": {key: 0.5}})
    escaped = words.replace("<", "&lt;").replace(">", "&gt;")
    assert f"{escaped} (2)</text>" in made.source
    assert not any(tag == "script" for tag, _ in made.elements)
    made = page(write_calibration_page, {"stages": {key: CALIBRATION["stages"]["category"]}})
    assert f"{words.capitalize()} stage: scores" in made.text
    assert not any(tag == "script" for tag, _ in made.elements)


@pytest.mark.parametrize("empty", ["null", "absent"])
@pytest.mark.parametrize(("write", "result"), PAGES)
def test_any_key_may_be_null_or_absent(page, write, result, empty):
    def without(value, path):
        value = copy.copy(value)
        if len(path) > 1:
            value[path[0]] = without(value[path[0]], path[1:])
        elif empty == "null" or isinstance(value, list):
            value[path[0]] = None
        else:
            del value[path[0]]
        return value

    def paths(value):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            if isinstance(value, dict):
                yield (key,)
            yield from ((key, *rest) for rest in paths(part))

    result = {key: value for key, value in result.items() if key not in NO_PLOTS}
    for path in paths(result):
        made = page(write, without(result, path))
        assert not re.search(r"\b(None|nan|null)\b", made.source), path
        assert "<h2></h2>" not in made.source


@pytest.mark.parametrize("empty", ["null", "absent"])
@pytest.mark.parametrize(("write", "result"), PAGES)
def test_a_plot_without_numbers_is_left_out(page, write, result, empty):
    made = page(write, result | NO_PLOTS if empty == "null" else {k: v for k, v in result.items() if k not in NO_PLOTS})
    assert not any(tag in {"svg", "figure"} for tag, _ in made.elements)
    assert "Plots" not in made.text


@pytest.mark.parametrize("write", [write_report, write_calibration_page])
def test_a_page_of_nothing_has_a_title_and_no_section(page, write):
    made = page(write, {})
    assert [tag for tag, _ in made.elements if tag in {"h1", "section", "h2", "table"}] == ["h1"]


def test_null_inside_the_numbers_of_a_plot_is_left_out(page):
    holes = {
        "curves": {"roc": None, "risk_coverage": {"coverage": None, "risk": [0.1]}, "precision_recall": {"x": [], "y": []}}
    }
    made = page(
        write_report, holes | {"answer_scores": {"answerable": [0.5, None, float("nan")], "oos": [None], "adversarial": []}}
    )
    assert sum(tag == "svg" for tag, _ in made.elements) == 1
    assert "answerable (1)</text>" in made.source
    assert "oos" not in made.source
    assert "adversarial" not in made.source


def test_headlines_say_in_words_what_the_figures_mean(page):
    text = page(write_report, EVALUATION).text
    for words in (
        "Right document first 81.5 % 95 % interval 79.7–83.2 % For 81 of 100 questions that the collection can answer, "
        "the right document comes first. recall@1",
        "Mean reciprocal rank 0.866 95 % interval 0.850–0.880",
        "Lost by categories 2.1 % For 2 of 100 questions, the right document was in a category that was not opened.",
        "Documents compared 10.0 % On average a question was compared with 10.0 % of the documents.",
        "for 81 of 100 such pairs, the first has the higher score",
        "74 of 100 questions of both kinds end well",
        "With this threshold, 79 of 100 questions with an answer are answered; 34 of 100 questions without an answer get one "
        "all the same; 78 of 100 answers show the right document first.",
        "Threshold 0.500 Rule that chose it best f1 Chosen on dev",
        "Number of questions 3,000 Of these with an answer 1,500",
        "Words searched too (hybrid) yes",
        "Seconds 8.123",
    ):
        assert words in text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0 of 100"), (0.004, "fewer than 1 of 100"), (0.006, "1 of 100"), (0.996, "more than 99 of 100"), (1.0, "100 of 100")],
)
def test_no_share_is_rounded_to_none_or_all(page, share, words):
    assert f"For {words} questions, the category judged best" in page(write_report, {"category_accuracy": share}).text


def test_an_operating_points_own_statement_is_preferred(page):
    point = EVALUATION["operating_point"] | {"statement": "It refuses well."}
    text = page(write_report, {"operating_point": point}).text
    assert "It refuses well." in text
    assert "With this threshold" not in text


def test_further_plain_values_are_listed_with_how_it_was_made(page):
    text = page(write_report, {"dataset": "squad2", "documents_in_all": 1204, "versions": {"numpy": "2"}}).text
    assert "Data set squad2 documents in all 1,204" in text
    assert "versions" not in text


def test_categories_come_worst_first_and_end_at_thirty(page):
    rows = [{"name": f"c{i}", "questions": 10, "recall@1": i / 40, "routing_loss": 0.0} for i in range(33)]
    rows += [{"name": "unjudged", "questions": 3, "recall@1": None}, {"name": "bigger", "questions": 99, "recall@1": 0.0}]
    made = page(write_report, {"per_category": rows})
    table = made.rows("By category, worst first")
    assert table[0] == ["Category", "Questions", "Right document first", "Lost by categories"]
    assert [row[0] for row in table[1:]] == ["bigger", *(f"c{i}" for i in range(29))]
    assert "… and 5 more categories that did better" in made.text


@pytest.mark.parametrize(
    ("name", "low", "high", "verdict"),
    [
        ("recall@1", 0.004, 0.025, "better"),
        ("recall@1", -0.025, -0.004, "worse"),
        ("recall@1", -0.004, 0.025, "no clear difference"),
        ("recall@1", 0.0, 0.025, "no clear difference"),
        ("routing_loss", -0.025, -0.004, "better"),
        ("routing_loss", 0.004, 0.025, "worse"),
        ("documents_scored", -0.025, 0.0, "no clear difference"),
    ],
)
def test_a_comparison_says_who_is_better(page, name, low, high, verdict):
    test = {"first": 0.5, "second": 0.5, "difference": 0.0, "low": low, "high": high, "p_value": 0.5}
    made = page(write_report, {"mode": "two-stage", "comparison": {"mode": "flat", "metrics": {name: test}}})
    head, row = made.rows("Compared with flat")
    assert head[1:4] == ["two-stage is", "two-stage", "flat"]
    assert row[1] == verdict


def test_a_comparison_gives_differences_of_shares_in_points(page):
    tests = {
        "recall@1": {"first": 0.8147, "second": 0.83, "difference": -0.0153, "low": -0.025, "high": -0.004, "p_value": 0.0004},
        "mrr@10": {"first": 0.8661, "second": 0.8, "difference": 0.0661, "low": 0.05, "high": 0.08, "p_value": 0.0421},
    }
    _, recall, mrr = page(write_report, {"comparison": {"mode": "flat", "metrics": tests}}).rows("Compared with flat")
    assert recall[2:] == ["81.5\xa0%", "83.0\xa0%", "−1.5 points", "−2.5 to −0.4", "below 0.001"]
    assert mrr[2:] == ["0.866", "0.800", "+0.066", "+0.050 to +0.080", "0.042"]


def test_the_worst_questions_may_expect_several_documents(page):
    rows = [{"question": "q?", "expected": ["law 1", "law 2"], "got": None, "score": None}, EVALUATION["worst"][0]]
    assert page(write_report, {"worst": rows}).rows("The worst questions")[1:] == [
        ["q?", "law 1, law 2", "", ""],
        ["Which river is it?", "Rhine 4", "Rhine 7", "0.712"],
    ]


def test_the_chosen_operating_point_stands_out(page):
    made = page(write_calibration_page, CALIBRATION)
    assert made.source.count('<tr class="best">') == 1
    assert '<p class="lead">At most 5 in 100 get a false answer.</p>' in made.source
    rows = made.rows("Operating points, with 95 % intervals")
    chosen, other = rows[1:]
    assert chosen[:3] == ["guarantee (chosen)", "At most 5 in 100 get a false answer.", "0.500"]
    assert chosen[3:] == ["83.0\xa0%\n81.0–85.0\xa0%", "4.0\xa0%\n3.0–6.0\xa0%", "90.0\xa0%\n88.0–92.0\xa0%", "79.0\xa0%"]
    assert other == ["best f1", "Answers 90 of 100.", "0.400", "90.0\xa0%", "", "", ""]


def test_flips_say_what_became_of_each_question(page):
    kinds = [(True, True), (True, False), (False, False), (None, None)]
    flips = [{"question": f"q{i}?", "score": 0.5, "answerable": a, "right": r} for i, (a, r) in enumerate(kinds)]
    made = page(write_calibration_page, {"flips": {"newly_answered": flips, "newly_refused": flips[2:] * 2}})
    assert [row[1] for row in made.rows("Newly answered")[1:]] == [
        "right answer gained",
        "answered from a wrong document",
        "answered though there is no answer",
        "",
    ]
    assert "2 more" not in made.text
    assert "4 in all. Rightly silent now: 2." in made.text
    assert [row[1] for row in made.rows("Newly refused")[1:]] == ["rightly silent now", ""] * 2


def test_numpys_numbers_and_truths_are_read_as_pythons(page):
    flip = {"question": "q?", "score": np.float32(0.5), "answerable": np.False_, "right": np.False_}
    made = page(write_calibration_page, {"flips": {"newly_refused": [flip]}})
    assert made.rows("Newly refused")[1] == ["q?", "rightly silent now", "0.500"]


def test_lost_answers_are_told_from_wrong_ones_that_ended(page):
    refused = [FLIP, FLIP | {"right": False}]
    rows = page(write_calibration_page, {"flips": {"newly_refused": refused}}).rows("Newly refused")
    assert [row[1] for row in rows[1:]] == ["right answer lost", "no longer answered from a wrong document"]


def test_long_lists_of_flips_end_with_a_count_of_the_rest(page):
    made = page(write_calibration_page, {"flips": {"newly_answered": [FLIP] * 1103}})
    assert len(made.rows("Newly answered")) == 1 + report.SHOWN_FLIPS
    assert "1,103 in all. Right answer gained: 1,103." in made.text
    assert "… and 1,003 more questions" in made.text


@pytest.mark.parametrize(("name", "count"), [("evaluation", 4), ("calibration", 5)])
def test_plots_take_the_colours_of_the_page_and_their_ids_are_apart(pages, name, count):
    made = pages[name]
    drawings = re.findall(r"<svg.*?</svg>", made.source, re.DOTALL)
    assert len(drawings) == count
    assert sum(tag == "style" for tag, _ in made.elements) == 1, "a plot's own style would hold for the whole page"
    assert not re.findall(
        r"#[0-9a-fA-F]{3,8}\b|rgb\(|\bblack\b|\bwhite\b", re.sub(r'(?:href="|url\()#[^")]*', "", "".join(drawings))
    )
    names = [attributes["id"] for _, attributes in made.elements if "id" in attributes]
    used = set(re.findall(r'href="#([^"]+)"', made.source)) | set(re.findall(r"url\(#([^)]+)\)", made.source))
    assert len(names) == len(set(names))
    assert used <= set(names)
    assert used
    variables = set(re.findall(r"var\((--[a-z0-9-]+)\)", made.source))
    assert all(made.source.count(f"{name}:") >= 1 for name in variables)


@pytest.mark.parametrize(("write", "result"), PAGES)
def test_the_same_numbers_give_the_same_page_whatever_the_users_style(page, pages, write, result):
    first = pages["evaluation" if write is write_report else "calibration"].source
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert page(write, json.loads(json.dumps(result))).source == first
        assert dict(matplotlib.rcParams) == before
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", first) is None


def test_pyplot_is_not_imported():
    code = """
import sys
from gemma_rag import plots
assert "matplotlib" not in sys.modules
plots.svg(plots.curve([0, 1], [0, 1], xlabel="x", ylabel="y"), "a", "b")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("write", [write_report, write_calibration_page])
def test_a_failure_leaves_the_old_page(tmp_path, monkeypatch, write):
    file = tmp_path / "page.html"
    file.write_text("old")
    bad = {"curves": {"roc": {"x": [0, 1], "y": [1]}}, "stages": {"document": {"scores": [1.0], "answerable": []}}}
    with pytest.raises(InputError):
        write(bad, file)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("gemma_rag.storage.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write({}, file)
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (EVALUATION, ["scores", "risk-coverage", "roc", "precision-recall"]),
        (CALIBRATION, ["document-scores", "document-roc", "document-precision-recall", "category-scores", "reliability"]),
        ({}, []),
    ],
    ids=["evaluation", "calibration", "nothing"],
)
def test_plots_are_saved_as_png(tmp_path, result, names):
    files = save_plots(result, tmp_path / "a" / "plots")
    assert files == [tmp_path / "a" / "plots" / f"{name}.png" for name in names]
    assert sorted(files) == sorted((tmp_path / "a" / "plots").iterdir())
    for file in files:
        start = file.read_bytes()[:24]
        assert start[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(start[16:20], "big") == 720


def test_the_same_numbers_give_the_same_png_on_white(tmp_path):
    result = {"answer_scores": EVALUATION["answer_scores"]}
    (first,), (second,) = save_plots(result, tmp_path / "a"), save_plots(result, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_a_plot_is_saved_as_png_or_svg_only(tmp_path):
    figure = plots.curve([0, 1], [0, 1], xlabel="x", ylabel="y")
    plots.save(figure, tmp_path / "plot.SVG")
    assert "<dc:date>" not in (tmp_path / "plot.SVG").read_text("utf-8")
    assert plots.SERIES[0] in (tmp_path / "plot.SVG").read_text("utf-8")
    with pytest.raises(InputError, match=r"\.png or an \.svg file, not to 'plot\.pdf'"):
        plots.save(figure, tmp_path / "plot.pdf")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.SVG"]


def test_a_histogram_shows_the_shares_of_each_group_over_the_same_bins():
    figure = plots.histogram({"a": [0.0, 0.0, 1.0, None], "b": [0.5, 0.5]}, {"threshold": 0.25})
    patches = figure.axes[0].patches
    a, b = (patch.get_data() for patch in patches[1::2])
    np.testing.assert_array_equal(a.edges, b.edges)
    assert (a.edges[0], a.edges[-1]) == (0.0, 1.0)
    assert (a.values[0], a.values[-1], a.values.sum()) == pytest.approx((2 / 3, 1 / 3, 1.0))
    assert b.values[plots.BINS // 2] == 1.0
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.25, 0.25]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a (3)", "b (2)", "threshold 0.250"]


def test_a_histogram_of_equal_scores_has_bins_around_them():
    values, edges, _ = plots.histogram({"a": [0.3, 0.3 + 1e-17]}).axes[0].patches[1].get_data()
    assert edges[0] < 0.3 < edges[-1]
    assert values.max() == 1.0


def test_a_threshold_is_marked_where_it_stands_on_the_curves():
    drawn = {plot.name: plot.figure.axes[0] for plot in plots.calibration_plots(CALIBRATION)}
    # At 0.7 two of three questions with an answer pass and none of the two others.
    for name, dot in (("document-roc", (0.0, 2 / 3)), ("document-precision-recall", (2 / 3, 1.0))):
        curve, mark = drawn[name].lines[0], drawn[name].lines[-1]
        assert mark.get_marker() == "o"
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == pytest.approx(dot)
        assert dot in list(zip(curve.get_xdata(), curve.get_ydata(), strict=True))
    drawn = {plot.name: plot.figure.axes[0] for plot in plots.evaluation_plots(EVALUATION)}
    assert (drawn["roc"].lines[-1].get_xdata()[0], drawn["roc"].lines[-1].get_ydata()[0]) == (0.34, 0.79)


@pytest.mark.parametrize(
    ("answerable", "threshold", "expected"),
    [
        ([False, False], 0.5, set()),
        ([True, True], 0.5, {"document-precision-recall"}),
        ([True, False], 2.0, {"document-roc"}),
        ([True, False], None, set()),
    ],
    ids=["no positives", "no negatives", "none pass", "no threshold"],
)
def test_a_threshold_without_a_place_on_a_curve_is_not_marked(answerable, threshold, expected):
    line = {"x": [0, 1], "y": [0, 1]}
    stage = {"scores": [0.9, 0.1], "answerable": answerable, "threshold": threshold, "roc": line, "precision_recall": line}
    drawn = {plot.name: plot.figure.axes[0] for plot in plots.calibration_plots({"stages": {"document": stage}})}
    assert {name for name, axes in drawn.items() if any(line.get_marker() == "o" for line in axes.lines)} == expected


def test_a_reliability_diagram_leaves_empty_bins_out():
    axes = plots.reliability([0.1, 0.5, 0.9, None], [0.2, None, 0.8, 0.5], [10, 0, 30, 4]).axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.1, 0.2], [0.9, 0.8]])
    small, large = axes.collections[0].get_sizes()
    assert small < large


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.histogram({"a": [None]}), "needs at least one score"),
        (lambda: plots.histogram({"a": ["high"]}), "needs lists of numbers: could not convert string"),
        (lambda: plots.histogram({"a": [[0.1]]}), r"needs flat lists of numbers, and got an array of shape \(1, 1\)"),
        (lambda: plots.curve([0, 1], [0], xlabel="", ylabel=""), "as many x as y, at least 2, and got 2 and 1"),
        (lambda: plots.curve([0], [0], xlabel="", ylabel=""), "as many x as y, at least 2, and got 1 and 1"),
        (lambda: plots.reliability([0.1], [0.1], [1, 2]), "as many predicted as observed and count: 1, 1, 2"),
        (lambda: plots.reliability([0.1], [None], [3]), "at least one bin with a question"),
        (
            lambda: plots.calibration_plots({"stages": {"document": {"scores": [0.1], "answerable": []}}}),
            "stage 'document' has 1 scores and 0 labels",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(InputError, match=message):
        draw()


def test_without_matplotlib_the_message_names_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-rag\[eval\]'"):
        write_report(EVALUATION, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
