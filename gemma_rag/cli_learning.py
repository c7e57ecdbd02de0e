"""The commands that learn from labelled questions and measure with them: `fit`, `calibrate`, `eval`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_rag.cli_options import (
    BaseFolder,
    Json,
    Labelled,
    Model,
    RuntimeName,
    RuntimeOption,
    Split,
    Url,
    print_json,
    settings_from,
    terminal_for,
)
from gemma_rag.errors import InputError


class RuleName(str, Enum):
    """`gemma_rag.calibrating.Rule`, for the command line's help."""

    END_TO_END = "end-to-end"
    BEST_F1 = "best-f1"
    PRECISION = "precision"
    COVERAGE = "coverage"
    GUARANTEE = "guarantee"


class EvaluationModeName(str, Enum):
    """`gemma_rag.evaluation.EvaluationMode`, for the command line's help."""

    TWO_STAGE = "two-stage"
    FLAT = "flat"
    CLASSIC = "classic"
    LEXICAL = "lexical"


class RouterName(str, Enum):
    """`gemma_rag.evaluation.RouterChoice`, for the command line's help."""

    NONE = "none"
    LEARNED = "learned"


def fit(
    knowledge_base: BaseFolder,
    labelled: Labelled,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Learn from labelled questions how to order documents: the weight of words, and a router where it helps."""
    from gemma_rag.fitting import fit_router
    from gemma_rag.knowledge_base import KnowledgeBase
    from gemma_rag.labelled import load_labelled

    show = terminal_for(as_json)
    with KnowledgeBase.open(knowledge_base) as base:
        report = fit_router(base, load_labelled(labelled, split))
    if as_json:
        print_json(report.to_json())
    else:
        show.fitted(report)


def calibrate(
    knowledge_base: BaseFolder,
    labelled: Annotated[
        Path | None,
        typer.Argument(help="A .jsonl file: question and relevant, a list of ids, on each line.", show_default=False),
    ] = None,
    by_itself: Annotated[
        bool, typer.Option("--self", help="Estimate from the documents alone, without labelled questions.")
    ] = False,
    split: Split = None,
    rule: Annotated[RuleName, typer.Option(help="What the threshold is to achieve.")] = RuleName.END_TO_END,
    target: Annotated[
        float | None,
        typer.Option(
            help="The precision (0.9), the coverage (0.95), or the rate of false answers that is promised (0.05).",
            show_default=False,
        ),
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the guarantee. Default: 0.95.", show_default=False)] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with plots and the questions that flip to this .html file.", show_default=False),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots as PNG files into this folder.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose thresholds from labelled questions, say what they do, and use them from now on."""
    if by_itself == (labelled is not None):
        raise InputError("give a file of labelled questions, or --self to estimate without one")
    from gemma_rag.calibrating import calibrate as calibrate_with
    from gemma_rag.estimating import calibrate_self
    from gemma_rag.knowledge_base import KnowledgeBase
    from gemma_rag.labelled import load_labelled

    given = {"--rule": rule is not RuleName.END_TO_END, "--target": target is not None, "--confidence": confidence is not None}
    if by_itself and (named := [name for name, is_given in {**given, "--split": split is not None}.items() if is_given]):
        raise InputError(f"--self estimates without labels and rules: leave {', '.join(named)} out")
    if target is not None and rule in (RuleName.END_TO_END, RuleName.BEST_F1):
        raise InputError(f"the rule {rule.value} has no target: leave --target out, or choose precision, coverage or guarantee")
    if confidence is not None and rule is not RuleName.GUARANTEE:
        raise InputError(f"only the rule guarantee has a confidence, and the rule is {rule.value}")
    show = terminal_for(as_json)
    with KnowledgeBase.open(knowledge_base) as base:
        before = base.learned.calibration
        if labelled is None:
            found = calibrate_self(base)
        else:
            chosen: Any = rule.value.replace("-", "_")
            found = calibrate_with(base, load_labelled(labelled, split), rule=chosen, target=target, confidence=confidence)
    if report is not None or plots is not None:
        from gemma_rag.calibration_page import page_of
        from gemma_rag.report import save_plots, write_calibration_page

        page = page_of(found, before)
        if report is not None:
            write_calibration_page(page, report)
        if plots is not None:
            save_plots(page, plots)
    if as_json:
        print_json(found.to_json())
    else:
        show.calibrated(found)


def evaluate(
    dataset: Annotated[Path, typer.Argument(help="A folder with corpus.jsonl and queries.jsonl.")],
    model: Model = None,
    runtime: RuntimeOption = RuntimeName.AUTO,
    url: Url = None,
    mode: Annotated[EvaluationModeName, typer.Option(help="How to search.")] = EvaluationModeName.TWO_STAGE,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Order by cosines and matching words together.")] = False,
    router: Annotated[
        RouterName, typer.Option(help="learned: fit the order to the labels of the dev split.")
    ] = RouterName.NONE,
    split: Annotated[str, typer.Option(help="What is measured.")] = "test",
    against: Annotated[
        EvaluationModeName | None,
        typer.Option("--compare", help="Measure this mode too, and test the difference.", show_default=False),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots to this .html file.", show_default=False)] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where vectors are kept. Default: the user's cache folder.", show_default=False)
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Measure retrieval and refusals on labelled questions."""
    from gemma_rag.encoders import load_encoder
    from gemma_rag.encoders.words_only import WordsOnly
    from gemma_rag.evaluation import compare, default_cache, open_base
    from gemma_rag.evaluation import evaluate as measure
    from gemma_rag.labelled import Dataset
    from gemma_rag.lexical import reads_as_chinese

    if no_cache and cache is not None:
        raise InputError("--cache names where vectors are kept, and --no-cache keeps none: give one of them")
    show = terminal_for(as_json)
    data = Dataset.load(dataset)
    data.split(split)
    by_words = mode is against is EvaluationModeName.LEXICAL or (mode is EvaluationModeName.LEXICAL and against is None)
    embeddings = WordsOnly() if by_words else load_encoder(settings_from(as_json, model=model, runtime=runtime, url=url))
    unread = "zh" not in (embeddings.profile.languages or ("zh",)) and all(reads_as_chinese(q.question) for q in data.questions)
    if unread and mode is EvaluationModeName.TWO_STAGE and against is None:
        show.note("the model reads none of these questions: all are searched by words, and nothing is embedded")
        embeddings, mode = WordsOnly(), EvaluationModeName.LEXICAL
    show.note(f"{data.name}: {len(data.documents)} documents, {len(data.questions)} questions")
    with open_base(data, embeddings, None if no_cache else cache or default_cache()) as base:
        found = measure(data, base, mode=mode.value, hybrid=hybrid, router=router.value, split=split)
        if against is not None:
            classic = against is EvaluationModeName.CLASSIC
            other = measure(data, base, mode=against.value, hybrid=hybrid and not classic, split=split)
            found = compare(found, other)
    if report is not None:
        from gemma_rag.report import write_report

        write_report(found.result, report)
    if as_json:
        print_json(found.to_json())
    else:
        show.evaluated(found)
