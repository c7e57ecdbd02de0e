"""The task prompts that embedding models are trained with, as data.

EmbeddingGemma reads every text behind a prompt that says what the text is for; a question embedded with the wrong
prompt, or with none, lands elsewhere. A `PromptProfile` holds the prompts of one model family, and `profile_for`
chooses the profile of a model: the user's choice wins, then the model's own configuration, then the table here.

Sources of the strings: the model cards and ``config_sentence_transformers.json`` of ``google/embeddinggemma-300m``,
``google/embeddinggemma-2``, ``intfloat/e5-*`` and ``multilingual-e5-*``, ``BAAI/bge-*-v1.5``, and
``nomic-ai/nomic-embed-text-v1*``.

>>> EMBEDDINGGEMMA.render("Reset it in the portal.", Task.DOCUMENT, title="Passwords")
'title: Passwords | text: Reset it in the portal.'
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from types import MappingProxyType

from gemma_rag.errors import InputError

logger = logging.getLogger(__name__)


class Task(str, Enum):
    """What a text is embedded for."""

    QUERY = "query"
    DOCUMENT = "document"
    CLASSIFICATION = "classification"
    CLUSTERING = "clustering"
    SIMILARITY = "similarity"
    CODE_QUERY = "code_query"
    QUESTION_ANSWERING = "question_answering"
    FACT_CHECKING = "fact_checking"
    SUMMARIZATION = "summarization"

    @classmethod
    def parse(cls, name: str | Task) -> Task:
        """Read a task's name: ours (``query``, any case) or one that a model's configuration uses (``STS`` ...).

        Raises:
            InputError: No task has that name; the message lists those there are.
        """
        if isinstance(name, Task):
            return name
        task = _TASK_BY_NAME.get(_key(name)) if isinstance(name, str) else None
        if task is None:
            raise InputError(
                f"unknown task {name!r}. The tasks are {', '.join(task.value for task in cls)}; "
                f"the models' own names are read too: {', '.join(MODEL_PROMPT_NAMES)}"
            )
        return task


MODEL_PROMPT_NAMES: Mapping[str, Task] = MappingProxyType(
    {
        "Retrieval-query": Task.QUERY,
        "Retrieval": Task.QUERY,
        "Reranking": Task.QUERY,
        "BitextMining": Task.QUERY,
        "SearchQuery": Task.QUERY,
        "Retrieval-document": Task.DOCUMENT,
        "passage": Task.DOCUMENT,
        "MultilabelClassification": Task.CLASSIFICATION,
        "STS": Task.SIMILARITY,
        "PairClassification": Task.SIMILARITY,
        "SentenceSimilarity": Task.SIMILARITY,
        "InstructionRetrieval": Task.CODE_QUERY,
        "CodeRetrieval": Task.CODE_QUERY,
        "QuestionAnswering": Task.QUESTION_ANSWERING,
        "FactChecking": Task.FACT_CHECKING,
    }
)
"""Names that the models' own configurations use for a task, beside `Task`'s values."""


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


_TASK_BY_NAME = {_key(task.value): task for task in Task} | {_key(name): task for name, task in MODEL_PROMPT_NAMES.items()}

_NO_TITLE = "title: none | text: "
_GEMMA_TITLED = re.compile(r"title: [^\n]*? \| text: ")


@dataclass(frozen=True)
class PromptProfile:
    """The prompts of one model family.

    Attributes:
        name: A short name; users choose a profile by it.
        prompts: Prompt by task, "" for none. A task that is absent uses the prompt of `Task.QUERY`, except
            `Task.DOCUMENT`, which then has none.
        models: Regular expressions; a model whose id contains one of them (any case) has this profile.
        marks: Prompt names that only this family's own configuration has, to recognise a local copy by.
        category_threshold: Default cosine threshold of stage one; None where nobody measured one.
        document_threshold: Default cosine threshold of stage two; None where nobody measured one.
        matryoshka: Dimensions that the family was trained to be cut to, besides its native one.
        float16: Whether the family computes correctly in float16.
        languages: ISO 639-1 codes of the languages it reads, empty where that is not the point (multilingual models).
    """

    name: str
    prompts: Mapping[Task, str] = field(default_factory=dict, hash=False)
    models: tuple[str, ...] = ()
    marks: frozenset[str] = frozenset()
    category_threshold: float | None = None
    document_threshold: float | None = None
    matryoshka: tuple[int, ...] = ()
    float16: bool = True
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", MappingProxyType(dict(self.prompts)))

    def __reduce__(self) -> tuple[type[PromptProfile], tuple[object, ...]]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self), tuple((values | {"prompts": dict(self.prompts)}).values())

    def prompt(self, task: Task, title: str | None = None) -> str:
        """What stands before a text of that task, and of that title where the task is `Task.DOCUMENT`.

        The Gemma families name the title in the prompt; for the others it becomes the first line of the text, which is
        how their training sets join title and text. White space inside a title is collapsed, so that it stays one line.
        """
        prompt = self.prompts.get(task, "" if task is Task.DOCUMENT else self.prompts.get(Task.QUERY, ""))
        title = " ".join((title or "").split())
        if task is not Task.DOCUMENT or not title:
            return prompt
        if prompt.startswith(_NO_TITLE):
            return f"title: {title} | text: {prompt[len(_NO_TITLE) :]}"
        return f"{prompt}{title}\n"

    def render(self, text: str, task: Task, title: str | None = None) -> str:
        """The text as the model reads it: prompt, title and text."""
        return self.prompt(task, title) + text

    def prompt_of(self, text: str) -> str:
        """The profile's prompt, whichever, that a text already starts with; "" for none."""
        used = [prompt for prompt in self.prompts.values() if prompt]
        found = max((prompt for prompt in used if text.startswith(prompt)), key=len, default="")
        if not found and any(prompt.startswith(_NO_TITLE) for prompt in used):
            titled = _GEMMA_TITLED.match(text)
            found = titled.group() if titled else ""
        return found

    def is_prompted(self, text: str) -> bool:
        """Whether the text already starts with one of the profile's prompts, whichever."""
        return bool(self.prompt_of(text))


_GEMMA_PROMPTS = {
    Task.QUERY: "task: search result | query: ",
    Task.DOCUMENT: _NO_TITLE,
    Task.CLASSIFICATION: "task: classification | query: ",
    Task.CLUSTERING: "task: clustering | query: ",
    Task.SIMILARITY: "task: sentence similarity | query: ",
    Task.CODE_QUERY: "task: code retrieval | query: ",
    Task.QUESTION_ANSWERING: "task: question answering | query: ",
    Task.FACT_CHECKING: "task: fact checking | query: ",
    Task.SUMMARIZATION: "task: summarization | query: ",
}

EMBEDDINGGEMMA = PromptProfile(
    "embeddinggemma",
    prompts=_GEMMA_PROMPTS,
    models=(r"embedding-?gemma",),
    marks=frozenset({"Retrieval-query", "InstructionRetrieval"}),
    category_threshold=0.4,  # the published starting point; no hub in reach of our measurements, see docs/decisions
    document_threshold=0.4,
    matryoshka=(768, 512, 256, 128),
    float16=False,
)

EMBEDDINGGEMMA_2 = PromptProfile(
    "embeddinggemma-2",
    prompts=_GEMMA_PROMPTS | {Task.SUMMARIZATION: "task: sentence similarity | query: "},
    models=(r"embedding-?gemma-?2(?!\d)",),
    marks=frozenset({"SearchQuery", "SentenceSimilarity", "CodeRetrieval"}),
    category_threshold=0.4,
    document_threshold=0.4,
    matryoshka=(768, 512, 256, 128),
    float16=False,
)

E5 = PromptProfile(
    "e5",
    prompts={Task.QUERY: "query: ", Task.DOCUMENT: "passage: "},
    models=(r"(^|[/-])e5-(small|base|large)(-v2)?(:|$)", r"multilingual-e5-(small|base|large)(:|$)"),
)

BGE = PromptProfile(
    "bge",
    prompts={
        Task.QUERY: "Represent this sentence for searching relevant passages: ",
        **dict.fromkeys((Task.CLASSIFICATION, Task.CLUSTERING, Task.SIMILARITY, Task.SUMMARIZATION), ""),
    },
    models=(r"bge-(small|base|large)-en",),
)

BGE_ZH = PromptProfile(
    "bge-zh",
    prompts={
        Task.QUERY: "为这个句子生成表示以用于检索相关文章：",
        **dict.fromkeys((Task.CLASSIFICATION, Task.CLUSTERING, Task.SIMILARITY, Task.SUMMARIZATION), ""),
    },
    models=(r"bge-(small|base|large)-zh",),
)

NOMIC = PromptProfile(
    "nomic",
    prompts={
        Task.QUERY: "search_query: ",
        Task.DOCUMENT: "search_document: ",
        Task.CLASSIFICATION: "classification: ",
        Task.CLUSTERING: "clustering: ",
        Task.SIMILARITY: "classification: ",
    },
    models=(r"nomic-embed-text",),
    matryoshka=(768, 512, 256, 128, 64),
)

MINILM = PromptProfile(
    "minilm",
    models=(r"all-minilm",),
    category_threshold=0.15,  # these two: measured on squad2 and clinc150, see docs/decisions/0006
    document_threshold=0.3,
    languages=("en",),
)

NO_PROMPTS = PromptProfile("none")

PROFILES: Mapping[str, PromptProfile] = MappingProxyType(
    {profile.name: profile for profile in (EMBEDDINGGEMMA_2, EMBEDDINGGEMMA, E5, BGE, BGE_ZH, NOMIC, MINILM, NO_PROMPTS)}
)
"""Every profile by its name, in the order in which model ids are tried."""


def named_profile(name: str) -> PromptProfile:
    """The profile of that name.

    Raises:
        InputError: There is none; the message lists those there are.
    """
    if name not in PROFILES:
        raise InputError(f"no prompt profile is named {name!r}. There are {', '.join(PROFILES)}")
    return PROFILES[name]


def profile_for(model: str, configured: Mapping[str, str] | None = None) -> PromptProfile:
    """Choose the profile of a model.

    The table is searched by the model's id, then by the prompt names in its own configuration. What the configuration
    says about a prompt wins over the table, and a difference is logged, once for each model.

    Args:
        model: The model's id or folder name.
        configured: The ``prompts`` of the model's ``config_sentence_transformers.json``, by prompt name, or None.

    Returns:
        The profile; `NO_PROMPTS` where nothing is known.
    """
    configured = {name: prompt for name, prompt in (configured or {}).items() if isinstance(prompt, str)}
    used = {name: prompt for name, prompt in configured.items() if prompt}
    known = next((p for p in PROFILES.values() if any(re.search(rx, model, re.IGNORECASE) for rx in p.models)), None)
    if known is None:
        known = next((p for p in PROFILES.values() if p.marks & used.keys()), None)
    table = known or NO_PROMPTS
    own: dict[Task, str] = {}
    for name, prompt in used.items():
        task = _TASK_BY_NAME.get(_key(name))
        if task is not None:
            own.setdefault(task, prompt)
    differing = {task: prompt for task, prompt in own.items() if table.prompt(task) != prompt}
    if not differing:
        return table
    if known is not None and (model, tuple(differing.items())) not in _reported:
        _reported.add((model, tuple(differing.items())))
        logger.warning(
            "the configuration of %s has other prompts than our table for %s, and its own are used: %s",
            model,
            ", ".join(task.value for task in differing),
            "; ".join(f"{task.value}: {prompt!r} instead of {table.prompt(task)!r}" for task, prompt in differing.items()),
        )
    return replace(table, name=known.name if known else "configured", prompts={**table.prompts, **own})


_reported: set[tuple[str, tuple[tuple[Task, str], ...]]] = set()
