"""What every runtime checks before it computes."""

from __future__ import annotations

import pytest

from gemma_rag.encoders import EncoderSettings, Input
from gemma_rag.encoders.checks import (
    CONTEXT,
    check_inputs,
    chosen_context,
    chosen_dimensions,
    chosen_profile,
    refuse_float16,
)
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import BGE, E5, EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, MINILM, NO_PROMPTS, PROFILES, PromptProfile, Task

# -- inputs -------------------------------------------------------------------------------------------------------------


def test_what_can_be_embedded_passes():
    check_inputs([Input("a", task, title) for task in Task for title in (None, "", "Title")])


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (Input("", Task.QUERY), "the text at index 1 is empty"),
        (Input("\u2003\n", Task.QUERY), "the text at index 1 is empty"),
        (Input(None, Task.QUERY), "the text at index 1 is no string but NoneType"),
        (Input(b"dog", Task.QUERY), "the text at index 1 is no string but bytes"),
        (Input("dog", "document"), r"the task at index 1 is 'document': use Task\.parse"),
        (Input("dog", Task.DOCUMENT, 7), "the title at index 1"),
        (Input("a lone \ud83d surrogate", Task.QUERY), "the text at index 1"),
        (Input("dog", Task.DOCUMENT, "a lone \ud83d surrogate"), "the title at index 1"),
        ("dog", "index 1"),
    ],
)
def test_what_cannot_be_embedded_is_named_by_its_index(item, problem):
    with pytest.raises(InputError, match=problem):
        check_inputs([Input("fox", Task.QUERY), item])


# -- prompts ------------------------------------------------------------------------------------------------------------

OWN = PromptProfile("own", prompts={Task.QUERY: "q: "})


@pytest.mark.parametrize(
    ("prompts", "name", "configured", "profile"),
    [
        (OWN, "embeddinggemma", {"query": "other: "}, OWN),
        ("e5", "embeddinggemma", {"query": "other: "}, E5),
        ("none", "embeddinggemma", None, NO_PROMPTS),
        (None, "google/embeddinggemma-300m", None, EMBEDDINGGEMMA),
        (None, "google/embeddinggemma-2", None, EMBEDDINGGEMMA_2),
        (None, "BAAI/bge-small-en-v1.5", None, BGE),
        (None, "a-model-of-mine", None, NO_PROMPTS),
        (None, "a-model-of-mine", {"Retrieval-query": "task: search result | query: "}, EMBEDDINGGEMMA),
    ],
)
def test_the_users_profile_wins_then_the_models_name_then_its_configuration(prompts, name, configured, profile):
    assert chosen_profile(EncoderSettings(prompts=prompts), name, configured) == profile


def test_a_profile_that_is_not_there_lists_those_there_are():
    with pytest.raises(InputError, match="embeddinggemma-2, embeddinggemma, e5"):
        chosen_profile(EncoderSettings(prompts="gpt"), "minilm")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_float16_is_refused_for_the_gemma_models_alone(profile, precision):
    settings = EncoderSettings(precision=precision)
    if precision == "float16" and profile in (EMBEDDINGGEMMA, EMBEDDINGGEMMA_2):
        with pytest.raises(InputError, match=r"overflow in float16.*precision='bfloat16'"):
            refuse_float16(settings, profile)
    else:
        refuse_float16(settings, profile)


# -- context ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reported", "profile", "context"),
    [
        (None, 256, MINILM, 256),
        (100, 256, MINILM, 100),
        (256, 256, MINILM, 256),
        (None, 512, EMBEDDINGGEMMA, 512),  # what the model says wins over what its family has
        (None, None, EMBEDDINGGEMMA, 2048),
        (None, 0, EMBEDDINGGEMMA, 2048),
        (None, 10**30, EMBEDDINGGEMMA_2, 8192),
        (64, None, NO_PROMPTS, 64),
        (64, 10**30, NO_PROMPTS, 64),
    ],
)
def test_the_context_is_what_is_asked_for_within_what_the_model_has(asked, reported, profile, context):
    assert chosen_context(EncoderSettings(max_tokens=asked), reported, profile, "it") == context


@pytest.mark.parametrize(("reported", "profile", "own"), [(256, MINILM, 256), (None, EMBEDDINGGEMMA, 2048)])
def test_more_context_than_there_is_names_both(reported, profile, own):
    with pytest.raises(InputError, match=f"max_tokens is 9000, and it takes {own} tokens at most"):
        chosen_context(EncoderSettings(max_tokens=9000), reported, profile, "it")


@pytest.mark.parametrize("reported", [None, 0, 10**30])
def test_a_model_that_says_nothing_has_to_be_given_a_context(reported):
    with pytest.raises(ModelUnavailable, match="it does not say how many tokens it takes: give max_tokens"):
        chosen_context(EncoderSettings(), reported, NO_PROMPTS, "it")


def test_the_known_contexts_are_those_of_the_model_cards():
    assert dict(CONTEXT) == {"embeddinggemma": 2048, "embeddinggemma-2": 8192}


# -- dimensions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "untrained", "native", "profile", "dimensions"),
    [
        (None, False, 768, EMBEDDINGGEMMA, 768),
        (768, False, 768, EMBEDDINGGEMMA, 768),
        (512, False, 768, EMBEDDINGGEMMA, 512),
        (128, False, 768, EMBEDDINGGEMMA_2, 128),
        (128, False, 300, EMBEDDINGGEMMA, 128),
        (384, False, 384, MINILM, 384),
        (100, True, 768, EMBEDDINGGEMMA, 100),
        (1, True, 384, MINILM, 1),
    ],
)
def test_dimensions_that_the_model_can_give(wanted, untrained, native, profile, dimensions):
    assert chosen_dimensions(wanted, untrained, native, profile, "it") == dimensions


@pytest.mark.parametrize(
    ("wanted", "native", "profile", "offer"),
    [
        (100, 768, EMBEDDINGGEMMA, "only 768, 512, 256, 128"),
        (256, 384, MINILM, "only 384"),
        (200, 300, EMBEDDINGGEMMA, "only 300, 256, 128"),  # what is larger than the model's own is not offered
    ],
)
def test_a_dimension_without_training_names_those_with_it(wanted, native, profile, offer):
    with pytest.raises(
        InputError, match=f"it was not trained to be cut to {wanted} dimensions, {offer}\\..*untrained_dimensions"
    ):
        chosen_dimensions(wanted, False, native, profile, "it")


@pytest.mark.parametrize("untrained", [False, True])
def test_more_dimensions_than_there_are_cannot_be_had(untrained):
    with pytest.raises(InputError, match="it gives vectors of 768 dimensions: it cannot be asked for 1024"):
        chosen_dimensions(1024, untrained, 768, EMBEDDINGGEMMA, "it")


@pytest.mark.parametrize("wrong", [0, -1])
def test_less_than_one_dimension_cannot_be_had(wrong):
    with pytest.raises(InputError, match=str(wrong)):
        chosen_dimensions(wrong, True, 768, EMBEDDINGGEMMA, "it")
