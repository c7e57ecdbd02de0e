"""The pictures of the documentation: drawn as SVG, from numbers that are measured here, by all-MiniLM-L6-v2.

Each picture brings its own light ground, so that it looks the same on a light page, on a dark one, and on GitHub.

usage: GEMMA_RAG_DATA=FOLDER python benchmarks/pictures.py [--scores FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gemma_rag import DynamicThreshold, GemmaEmbeddings, KnowledgeBase, TwoStageRetriever, load_documents
from gemma_rag.encoders.base import prompts_digest
from gemma_rag.prompts import EMBEDDINGGEMMA, EMBEDDINGGEMMA_2

PICTURES = Path(__file__).parents[1] / "docs" / "images"
SCORES = Path(__file__).parent / "results" / "scores.json"
INK, QUIET, LINE, GROUND, WHITE = "#1c2430", "#55606e", "#c9d0d9", "#f6f8fa", "#ffffff"
BLUE, PALE, ORANGE, GREY, GREEN = "#2b6cb0", "#90b7de", "#c2570c", "#d5dae1", "#0f766e"
WIDTH = 480
QUESTION = "I still have some holiday left at the end of the year. Do I lose it?"
CATEGORY_THRESHOLD, DOCUMENT_THRESHOLD = 0.15, 0.3


# -- drawing ------------------------------------------------------------------------------------------------------------


class Picture:
    """An SVG in the making; lengths are those of a picture 480 wide.

    Args:
        height: Its height.
        title: Read aloud in place of the picture.
    """

    def __init__(self, height: float, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []
        self.box(0.5, 0.5, WIDTH - 1, height - 1, fill=GROUND, stroke=LINE)

    def text(self, x: float, y: float, words: str, *, size: float = 13, fill: str = INK, **more: str) -> None:
        style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{style}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = WHITE, stroke: str = "none") -> None:
        radius = 6 if height > 20 else 2
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = INK, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{stroke}" stroke-width="1.4"{dash}/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.line(x1, y1, x2, y2, stroke=QUIET)
        tip = "l-4 -8h8z" if x1 == x2 else "l-8 -4v8z"
        self.parts.append(f'<path d="M{x2:.1f} {y2:.1f}{tip}" fill="{QUIET}"/>')

    def save(self, name: str) -> None:
        text = "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" width="{WIDTH * 1.25:g}" '
                f'height="{self.height * 1.25:g}" role="img" '
                "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif\">",
                f"<title>{escape(self.title)}</title>",
                *self.parts,
                "</svg>\n",
            ]
        )
        (PICTURES / name).write_text(text, encoding="utf-8")


# -- two stages ---------------------------------------------------------------------------------------------------------


def two_stages(embeddings: GemmaEmbeddings) -> None:
    """One question over the English half of the sample handbook: what each stage thought."""
    handbook = Path(str(files("gemma_rag"))) / "sample" / "handbook"
    pages = [page for page in load_documents(handbook).documents if not page.id.endswith(".zh")]
    found = TwoStageRetriever(KnowledgeBase.from_documents(pages, embeddings)).retrieve(QUESTION)
    documents = [(hit.document.id.split("/")[-1], hit.score) for hit in found.hits]
    documents += [(miss.document.id.split("/")[-1], miss.score) for miss in found.near_misses]
    others = found.documents_scored - len(documents)
    row, left, scale = 21, 190, 420
    top = 112
    second = top + row * len(found.categories) + 62
    picture = Picture(second + row * len(documents) + 74, "A question passes two stages: seven categories, then documents.")
    picture.box(16, 14, WIDTH - 32, 46, stroke=LINE)
    first, last = QUESTION.split(". ", 1)
    picture.text(28, 33, f"“{first}.")
    picture.text(28, 50, f"{last}”")
    picture.text(16, 84, "Stage 1: which categories promise a good document?", font_weight="600")
    picture.text(16, 102, f"the best one has to reach {CATEGORY_THRESHOLD}", size=12, fill=ORANGE)
    for i, category in enumerate(found.categories):
        y = top + row * i
        fill = {"mass": BLUE, "rescue": PALE}.get(category.why, GREY)
        said = {"mass": "opened", "rescue": "opened after all"}.get(category.why, "stays shut")
        width = max(2.0, category.score * scale)
        picture.text(left - 8, y + 12, category.name, size=12, text_anchor="end")
        picture.box(left, y, width, 15, fill=fill)
        picture.text(left + width + 5, y + 12, f"{category.score:.2f}", size=12, fill=QUIET)
        if i == 0 or category.why != found.categories[i - 1].why:
            picture.text(WIDTH - 16, y + 12, said, size=12, fill=QUIET, text_anchor="end")
    at = left + CATEGORY_THRESHOLD * scale
    picture.line(at, top - 8, at, top + 19, stroke=ORANGE)
    picture.arrow(left + 40, second - 58, left + 40, second - 36)
    picture.text(16, second - 14, "Stage 2: which documents are close enough?", font_weight="600")
    for i, (name, score) in enumerate(documents):
        y = second + row * i
        picture.text(left - 8, y + 12, name, size=12, text_anchor="end")
        picture.box(left, y, score * scale, 15, fill=GREEN if score >= DOCUMENT_THRESHOLD else GREY)
        said = f"{score:.2f} kept" if score >= DOCUMENT_THRESHOLD else f"{score:.2f}"
        picture.text(max(left + score * scale, left + 130) + 5, y + 12, said, size=12, fill=QUIET)
    at, bottom = left + DOCUMENT_THRESHOLD * scale, second + row * len(documents)
    picture.line(at, second - 3, at, bottom, stroke=ORANGE, dashed=True)
    picture.text(left - 8, bottom + 12, f"and {others} lower", size=12, fill=QUIET, text_anchor="end")
    picture.text(at, bottom + 14, f"threshold {DOCUMENT_THRESHOLD}", size=12, fill=ORANGE, text_anchor="middle")
    compared = f"{found.documents_scored} of {found.documents_total} documents compared"
    picture.text(16, bottom + 52, f"{compared}, {len(found.hits)} kept. Bars are cosines.", fill=QUIET)
    picture.save("two-stages.svg")


# -- thresholds ---------------------------------------------------------------------------------------------------------


def best_cosines(embeddings: GemmaEmbeddings) -> dict[str, Any]:
    """The cosine of the closest document, for the test questions of clinc150 with an answer and without."""
    data = Path(os.environ["GEMMA_RAG_DATA"]) / "clinc150"
    corpus, asked = ([json.loads(line) for line in (data / name).open()] for name in ("corpus.jsonl", "queries.jsonl"))
    questions = [row for row in asked if row["split"] == "test"]
    rows = embeddings.embed([row["text"] for row in corpus], "document", [row["title"] for row in corpus])
    cosines = embeddings.embed([row["text"] for row in questions], "query") @ rows.T
    best, answerable = cosines.max(axis=1), np.array([row["answerable"] for row in questions])
    edges = np.round(np.linspace(0.0, 1.0, 41), 3)
    examples = {}
    for name, group in (("answerable", answerable), ("unanswerable", ~answerable)):
        middle = sorted(np.flatnonzero(group), key=lambda i: abs(best[i] - np.median(best[group])))[:20]
        chosen = min(middle, key=lambda i: len(questions[i]["text"]))  # the shortest fits into the picture
        scores = np.sort(cosines[chosen])[::-1][:8].astype(float)
        cut = DynamicThreshold().apply(scores)
        examples[name] = {
            "question": questions[chosen]["text"],
            "scores": np.round(scores, 4).tolist(),
            "dynamic_cutoff": round(cut.cutoff, 4),
            "kept": int(cut.keep.sum()),
        }
    return {
        "edges": edges.tolist(),
        "answerable": np.histogram(np.clip(best[answerable], 0, 1), edges)[0].tolist(),
        "unanswerable": np.histogram(np.clip(best[~answerable], 0, 1), edges)[0].tolist(),
        "answerable_refused": {str(t): round(float((best[answerable] < t).mean()), 4) for t in (0.3, 0.4, 0.5, 0.6)},
        "unanswerable_answered": {str(t): round(float((best[~answerable] >= t).mean()), 4) for t in (0.3, 0.4, 0.5, 0.6)},
        "left_without_any_hit_by_the_dynamic_threshold": int(
            sum(not DynamicThreshold().apply(row).keep.any() for row in cosines if row.max() > 0)
        ),
        "middling_questions": examples,
    }


def thresholds(scores: dict[str, Any]) -> None:
    """Histograms of the best cosines, with the default threshold."""
    left, right, top, bottom = 52, WIDTH - 20, 92, 290
    picture = Picture(348, "The best cosines of questions with an answer and without one overlap; a threshold divides them.")
    edges = np.array(scores["edges"])
    shares = {kind: np.array(scores[kind]) / sum(scores[kind]) for kind in ("answerable", "unanswerable")}
    highest = 0.16

    def place(value: float, share: float) -> tuple[float, float]:
        return left + value * (right - left), bottom - share / highest * (bottom - top)

    for share in (0.0, 0.05, 0.1, 0.15):
        y = place(0, share)[1]
        picture.line(left, y, right, y, stroke=LINE)
        picture.text(left - 6, y + 4, f"{share:.0%}", size=12, fill=QUIET, text_anchor="end")
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        picture.text(place(value, 0)[0], bottom + 17, f"{value:g}", size=12, fill=QUIET, text_anchor="middle")
    for kind, colour in (("unanswerable", ORANGE), ("answerable", BLUE)):
        steps = [place(edge, share) for i, share in enumerate(shares[kind]) for edge in edges[i : i + 2]]
        outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in steps)
        ground = f"M{left} {bottom}L{outline}L{right} {bottom}Z"
        picture.parts.append(f'<path d="{ground}" fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-width="1.6"/>')
    x = place(DOCUMENT_THRESHOLD, 0)[0]
    picture.line(x, top - 14, x, bottom, dashed=True)
    picture.text(x - 8, top - 2, "refused", fill=INK, text_anchor="end")
    picture.text(x + 8, top - 2, "answered", fill=INK)
    for y, colour, said in ((14, BLUE, "questions with an answer"), (34, ORANGE, "questions without one")):
        picture.box(left + 150, y, 13, 13, fill=colour)
        picture.text(left + 170, y + 11, f"{said} ({sum(scores['answerable' if colour == BLUE else 'unanswerable']):,})")
    picture.text(x, top - 20, "threshold 0.3", size=12, fill=QUIET, text_anchor="middle")
    picture.text((left + right) / 2, bottom + 42, "cosine of the closest document", fill=INK, text_anchor="middle")
    picture.save("thresholds.svg")


def dynamic(scores: dict[str, Any]) -> None:
    """The dynamic threshold on a question from the middle of each group."""
    picture = Picture(294, "The dynamic threshold keeps documents for a question without an answer too.")
    bottom, height = 218, 250
    for i, (kind, colour) in enumerate((("answerable", BLUE), ("unanswerable", ORANGE))):
        example = scores["middling_questions"][kind]
        left = 24 + 232 * i
        picture.text(left, 26, "with an answer" if kind == "answerable" else "without an answer", font_weight="600")
        picture.text(left, 45, f"“{example['question']}”", size=12, fill=QUIET)
        for n, score in enumerate(example["scores"]):
            kept, tall = score >= example["dynamic_cutoff"], max(1.5, score * height)
            picture.box(left + 25 * n, bottom - tall, 20, tall, fill=colour if kept else GREY)
        y = bottom - example["dynamic_cutoff"] * height
        picture.line(left - 6, y, left + 201, y, dashed=True)
        picture.text(left, 64, f"0.85 x mean of best 5: {example['dynamic_cutoff']:.2f}", size=12)
        best = f"best {example['scores'][0]:.2f}; {example['kept']} of these 8 kept"
        picture.text(left, bottom + 20, best, size=13)
    picture.text(24, 264, "The best score is never below the mean of the best five, so it", fill=QUIET)
    picture.text(24, 281, "always stays: the dynamic threshold trims, and cannot refuse.", fill=QUIET)
    picture.save("dynamic.svg")


# -- spaces and outcomes ------------------------------------------------------------------------------------------------


def spaces() -> None:
    """Two models whose vectors have one shape, and what tells them apart."""
    rows = [
        ("shape of a vector", "768 numbers", "768 numbers"),
        ("norm", "1", "1"),
        ("weights", "their digest", "another digest"),
        ("prompts", prompts_digest(EMBEDDINGGEMMA)[:8], prompts_digest(EMBEDDINGGEMMA_2)[:8]),
        ("context", "2,048 tokens", "8,192 tokens"),
    ]
    picture = Picture(286, "Vectors of EmbeddingGemma 1 and 2 have the same shape; the space tells them apart.")
    for x, name in ((152, "EmbeddingGemma"), (312, "EmbeddingGemma 2")):
        picture.box(x, 16, 152, 32, fill=BLUE)
        picture.text(x + 76, 37, name, size=12, fill=WHITE, text_anchor="middle", font_weight="600")
    for i, (name, one, other) in enumerate(rows):
        y = 76 + 28 * i
        picture.text(20, y, name)
        for x, value in ((228, one), (388, other)):
            picture.text(x, y, value, text_anchor="middle", fill=QUIET if one == other else ORANGE)
        picture.line(20, y + 9, WIDTH - 20, y + 9, stroke=LINE)
    picture.text(20, 228, "A check of the shape lets them be mixed; the cosines mean nothing.", fill=QUIET)
    picture.text(20, 250, "The fingerprint of the space is made of what is orange, and of the", fill=QUIET)
    picture.text(20, 268, "runtime and its precision: it differs, and the vectors are refused.", fill=QUIET)
    picture.save("spaces.svg")


def outcomes() -> None:
    """Where a question can end."""
    steps = [
        ("Are there documents?", "empty_knowledge_base"),
        ("Do some pass the filters?", "filtered_out"),
        ("Does a category fit?", "category_below_threshold"),
        ("Is a document close enough?", "document_below_threshold"),
        ("Does the model find it there?", "declined_by_model"),
    ]
    picture = Picture(68 + 54 * len(steps), "Five questions, asked in order; the first no decides the outcome.")
    for i, (asked, outcome) in enumerate(steps):
        y = 18 + 54 * i
        picture.box(16, y, 210, 34, stroke=LINE)
        picture.text(121, y + 22, asked, text_anchor="middle")
        picture.arrow(226, y + 17, 272, y + 17)
        picture.text(249, y + 11, "no", size=12, fill=QUIET, text_anchor="middle")
        picture.box(274, y, WIDTH - 290, 34, fill="#fdf0e6", stroke=ORANGE)
        picture.text(274 + (WIDTH - 290) / 2, y + 22, outcome, size=12.5, fill=ORANGE, text_anchor="middle")
        picture.arrow(121, y + 34, 121, y + 53)
        picture.text(130, y + 48, "yes", size=12, fill=QUIET)
    y = 18 + 54 * len(steps)
    picture.box(16, y, 210, 34, fill="#e6f4f1", stroke=GREEN)
    picture.text(121, y + 22, "answered", fill=GREEN, text_anchor="middle", font_weight="600")
    picture.text(240, y + 14, "The last one is asked only where", size=12, fill=QUIET)
    picture.text(240, y + 30, "a language model writes.", size=12, fill=QUIET)
    picture.save("outcomes.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, help="draw these scores, as measured before, instead of measuring them")
    options = parser.parse_args()
    embeddings = GemmaEmbeddings(model="minilm", device="cpu", show_progress=False)
    PICTURES.mkdir(parents=True, exist_ok=True)
    if options.scores:
        scores = json.loads(options.scores.read_text(encoding="utf-8"))
    else:
        scores = {**environment(), **best_cosines(embeddings)}
        SCORES.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    two_stages(embeddings)
    thresholds(scores)
    dynamic(scores)
    spaces()
    outcomes()


if __name__ == "__main__":
    main()
