"""The prompts of every family, against a table copied by hand from the model cards, and the choice of a family."""

import dataclasses
import logging

import pytest

from gemma_rag.errors import InputError
from gemma_rag.prompts import EMBEDDINGGEMMA, PROFILES, PromptProfile, Task, named_profile, profile_for

GEMMA_1_AND_2 = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "classification": "task: classification | query: ",
    "clustering": "task: clustering | query: ",
    "similarity": "task: sentence similarity | query: ",
    "code_query": "task: code retrieval | query: ",
    "question_answering": "task: question answering | query: ",
    "fact_checking": "task: fact checking | query: ",
}
GEMMA_1 = GEMMA_1_AND_2 | {"summarization": "task: summarization | query: "}
GEMMA_2 = GEMMA_1_AND_2 | {"summarization": "task: sentence similarity | query: "}

# The names of both models' own configurations, with the task of each.
NAMES_1 = (
    dict.fromkeys(("query", "Retrieval-query", "Retrieval", "Reranking", "BitextMining"), Task.QUERY)
    | dict.fromkeys(("document", "Retrieval-document"), Task.DOCUMENT)
    | dict.fromkeys(("Classification", "MultilabelClassification"), Task.CLASSIFICATION)
    | dict.fromkeys(("STS", "PairClassification"), Task.SIMILARITY)
    | {"Clustering": Task.CLUSTERING, "InstructionRetrieval": Task.CODE_QUERY, "Summarization": Task.SUMMARIZATION}
)
NAMES_2 = (
    NAMES_1
    | {"SearchQuery": Task.QUERY, "Document": Task.DOCUMENT, "SentenceSimilarity": Task.SIMILARITY}
    | {"CodeRetrieval": Task.CODE_QUERY, "FactChecking": Task.FACT_CHECKING, "QuestionAnswering": Task.QUESTION_ANSWERING}
)
CONFIG_1 = {name: GEMMA_1[task.value] for name, task in NAMES_1.items()}
CONFIG_2 = {name: GEMMA_2[task.value] for name, task in NAMES_2.items()}
OTHER_QUERY = CONFIG_1 | dict.fromkeys(["query", "Retrieval-query", "Retrieval", "Reranking", "BitextMining"], "ask: ")

# The profile of each model, by the ids that hubs and servers give it.
MODELS = {
    "embeddinggemma": (
        *("google/embeddinggemma-300m", "google/EmbeddingGemma-300M", "onnx-community/embeddinggemma-300m-ONNX"),
        *("embeddinggemma", "embeddinggemma:300m", "embeddinggemma:300m-qat-q8_0"),
    ),
    "embeddinggemma-2": ("google/embeddinggemma-2", "embeddinggemma-2:latest", "embeddinggemma2"),
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "all-minilm:l6-v2"),
    "e5": ("intfloat/e5-base-v2", "intfloat/e5-small", "intfloat/multilingual-e5-small", "intfloat/multilingual-e5-large"),
    "bge": ("BAAI/bge-small-en-v1.5", "BAAI/bge-large-en"),
    "bge-zh": ("BAAI/bge-base-zh-v1.5",),
    "nomic": ("nomic-ai/nomic-embed-text-v1.5",),
    "none": ("intfloat/multilingual-e5-large-instruct", "intfloat/e5-mistral-7b-instruct", "BAAI/bge-m3", "team/encoder", ""),
}


@pytest.mark.parametrize(
    ("family", "task", "prompt"),
    [("embeddinggemma", *row) for row in GEMMA_1.items()] + [("embeddinggemma-2", *row) for row in GEMMA_2.items()],
)
def test_embeddinggemma_reads_a_task_behind_its_prompt(family, task, prompt):
    assert named_profile(family).render("text", Task(task)) == prompt + "text"


def test_the_table_above_has_every_task():
    assert list(GEMMA_1) == [task.value for task in Task]


@pytest.mark.parametrize(
    ("family", "query", "document", "similarity"),
    [
        ("e5", "query: ", "passage: ", "query: "),
        ("bge", "Represent this sentence for searching relevant passages: ", "", ""),
        ("bge-zh", "为这个句子生成表示以用于检索相关文章：", "", ""),
        ("nomic", "search_query: ", "search_document: ", "classification: "),
        ("minilm", "", "", ""),
        ("none", "", "", ""),
    ],
)
def test_another_family_has_its_own_prompts(family, query, document, similarity):
    prompts = [named_profile(family).prompt(task) for task in (Task.QUERY, Task.DOCUMENT, Task.SIMILARITY)]
    assert prompts == [query, document, similarity]


@pytest.mark.parametrize("family", ["e5", "bge", "bge-zh", "nomic"])
def test_a_task_without_a_prompt_of_its_own_is_asked_like_a_query(family):
    assert named_profile(family).prompt(Task.QUESTION_ANSWERING) == named_profile(family).prompt(Task.QUERY)


@pytest.mark.parametrize(
    ("name", "task"),
    [*NAMES_2.items(), ("passage", Task.DOCUMENT), *((task.value, task) for task in Task), *((task, task) for task in Task)],
)
def test_a_task_is_read_from_its_name(name, task):
    assert Task.parse(name) is task


@pytest.mark.parametrize("name", ["CODE_QUERY", "code-query", "Code Query", "codequery"])
def test_a_task_is_read_whatever_its_case_and_separators(name):
    assert Task.parse(name) is Task.CODE_QUERY


@pytest.mark.parametrize("name", ["translation", "", None, 3])
def test_an_unknown_task_lists_every_task(name):
    with pytest.raises(InputError, match=f"unknown task {name!r}.*" + ", ".join(GEMMA_1)):
        Task.parse(name)


def test_an_unknown_task_lists_the_models_own_names():
    with pytest.raises(InputError) as caught:
        Task.parse("translation")
    listed = str(caught.value).split("own names are read too: ")[1].split(", ")
    assert [name for name in NAMES_2 if name.lower() not in GEMMA_1 and name not in listed] == []


@pytest.mark.parametrize(
    ("family", "title", "expected"),
    [
        ("embeddinggemma", "Passwords", "title: Passwords | text: body"),
        ("embeddinggemma-2", "Passwords", "title: Passwords | text: body"),
        ("embeddinggemma", "密码", "title: 密码 | text: body"),
        ("embeddinggemma", " Reset\n\tit \r\n now ", "title: Reset it now | text: body"),
        ("embeddinggemma", r"a \1 | b", r"title: a \1 | b | text: body"),
        *(("embeddinggemma", empty, "title: none | text: body") for empty in (None, "", "  ", "\n")),
        ("e5", "Passwords", "passage: Passwords\nbody"),
        ("e5", "Reset\nit", "passage: Reset it\nbody"),
        ("e5", "\n", "passage: body"),
        ("bge", "Passwords", "Passwords\nbody"),
        ("none", "", "body"),
    ],
)
def test_a_title_goes_where_the_family_reads_it(family, title, expected):
    assert named_profile(family).render("body", Task.DOCUMENT, title) == expected


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.DOCUMENT])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_title_is_ignored_for_another_task(profile, task):
    assert profile.render("text", task, "Passwords") == profile.render("text", task)


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("family", ["embeddinggemma", "embeddinggemma-2", "nomic"])
def test_a_text_behind_a_prompt_is_prompted(family, task):
    profile = named_profile(family)
    assert profile.is_prompted(profile.render("text", task))


@pytest.mark.parametrize("title", ["Passwords", "Reset\nit", "a | b", "密码"])
@pytest.mark.parametrize("family", ["embeddinggemma", "embeddinggemma-2", "e5"])
def test_a_text_behind_a_title_is_prompted(family, title):
    profile = named_profile(family)
    assert profile.is_prompted(profile.render("text", Task.DOCUMENT, title))


@pytest.mark.parametrize("text", ["", "How do I reset it?", "The title: none", "title: Passwords\n\n | text: ", "task: mow"])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_plain_text_is_not_prompted(profile, text):
    assert not profile.is_prompted(text)


@pytest.mark.parametrize("task", Task)
def test_nothing_is_prompted_where_a_profile_has_no_prompts(task):
    assert not named_profile("none").is_prompted(EMBEDDINGGEMMA.render("text", task, "Passwords"))


@pytest.mark.parametrize(("model", "name"), [(model, name) for name, models in MODELS.items() for model in models])
def test_the_profile_of_a_model_is_found_by_its_id(model, name):
    assert profile_for(model) is named_profile(name)


# the third is what sentence-transformers writes for a model without prompts
UNNAMED = [
    (CONFIG_1, "embeddinggemma"),
    (CONFIG_2, "embeddinggemma-2"),
    ({"query": "", "document": ""}, "none"),
    (None, "none"),
]


@pytest.mark.parametrize(("configured", "expected"), UNNAMED, ids=["v1", "v2", "empty", "absent"])
def test_the_profile_of_an_unnamed_folder_is_found_by_its_configuration(configured, expected):
    assert profile_for("checkpoint", configured) is named_profile(expected)


@pytest.mark.parametrize("task", Task)
def test_a_configuration_of_an_unknown_family_is_the_profile(task):
    profile = profile_for("unknown-family", {"query": "ask: ", "passage": "say: "})
    assert profile.prompt(task) == ("say: " if task is Task.DOCUMENT else "ask: ")


def test_empty_prompts_of_a_configuration_leave_the_table_as_it_is():
    assert profile_for("intfloat/e5-base-v2", {"query": "", "document": ""}) is named_profile("e5")


@pytest.mark.parametrize("task", Task)
def test_the_configuration_wins_over_the_table(task):
    expected = "ask: " if task is Task.QUERY else GEMMA_1[task.value]
    assert profile_for("wins/embeddinggemma-300m", OTHER_QUERY).prompt(task) == expected


def test_a_configuration_that_wins_keeps_all_else_of_the_family():
    changed = profile_for("keeps/embeddinggemma-300m", OTHER_QUERY)
    assert dataclasses.replace(changed, prompts=EMBEDDINGGEMMA.prompts) == EMBEDDINGGEMMA


def test_a_difference_from_the_table_is_logged_once_for_each_model(caplog):
    with caplog.at_level(logging.DEBUG, "gemma_rag"):
        for model in ("one/embeddinggemma-300m", "one/embeddinggemma-300m", "two/embeddinggemma-300m"):
            profile_for(model, OTHER_QUERY)
    assert [record.args[0] for record in caplog.records] == ["one/embeddinggemma-300m", "two/embeddinggemma-300m"]


def test_the_warning_of_a_difference_names_both_prompts(caplog):
    profile_for("both/embeddinggemma-300m", OTHER_QUERY)
    assert "query: 'ask: ' instead of 'task: search result | query: '" in caplog.text


@pytest.mark.parametrize(
    ("model", "configured"),
    [("equal/embeddinggemma-300m", CONFIG_1), ("equal/embeddinggemma-2", CONFIG_2), ("equal", CONFIG_1)],
)
def test_a_configuration_equal_to_the_table_logs_nothing(model, configured, caplog):
    with caplog.at_level(logging.DEBUG, "gemma_rag"):
        profile_for(model, configured)
    assert caplog.records == []


def test_an_unknown_profile_name_lists_those_there_are():
    with pytest.raises(InputError, match=r"'gemma'\. There are embeddinggemma-2, embeddinggemma, e5, bge, bge-zh"):
        named_profile("gemma")


@pytest.mark.parametrize("container", [EMBEDDINGGEMMA.prompts, PROFILES], ids=["prompts", "profiles"])
def test_the_tables_cannot_be_changed(container):
    with pytest.raises(TypeError, match="does not support item assignment"):
        container[Task.QUERY] = "ask: "


def test_a_profile_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EMBEDDINGGEMMA.name = "other"


def test_a_profile_keeps_its_prompts_when_the_dictionary_it_came_from_changes():
    given = {Task.QUERY: "ask: "}
    profile = PromptProfile("own", prompts=given)
    given[Task.QUERY] = "tell: "
    assert profile.prompt(Task.QUERY) == "ask: "
