"""What decides a vector: the space, its fingerprint, and the digest of the prompts."""

import dataclasses
import hashlib

import numpy as np
import pytest
from pydantic import ValidationError

from gemma_rag.encoders.base import Input, Space, is_encoder, prompts_digest
from gemma_rag.prompts import EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, NO_PROMPTS, PROFILES, PromptProfile, Task

FIELDS = {
    "model": "google/embeddinggemma-300m",
    "weights": "sha256:abc",
    "prompts": "0123456789abcdef",
    "dimensions": 768,
    "max_tokens": 2048,
    "overflow": "truncate",
    "runtime": "sentence-transformers",
    "precision": "float32",
}
DECIDING = {
    "weights": "sha256:def",
    "prompts": "fedcba9876543210",
    "dimensions": 256,
    "max_tokens": 512,
    "overflow": "average",
    "runtime": "ollama",
    "precision": "int8",
}


def test_the_fingerprint_is_the_sha256_of_all_fields_but_the_model():
    # Written out by hand, because stored knowledge bases keep it: JSON with sorted keys, without the model.
    plain = (
        '{"dimensions": 768, "max_tokens": 2048, "overflow": "truncate", "precision": "float32", '
        '"prompts": "0123456789abcdef", "runtime": "sentence-transformers", "weights": "sha256:abc"}'
    )
    assert Space(**FIELDS).fingerprint == hashlib.sha256(plain.encode()).hexdigest()


def test_every_field_but_the_model_is_tried_below():
    assert {*DECIDING, "model"} == set(Space.model_fields)


@pytest.mark.parametrize(("field", "value"), DECIDING.items())
def test_the_fingerprint_changes_with(field, value):
    assert Space(**FIELDS | {field: value}).fingerprint != Space(**FIELDS).fingerprint


def test_the_fingerprint_does_not_change_with_the_name_of_the_model():
    assert Space(**FIELDS | {"model": "checkpoint"}).fingerprint == Space(**FIELDS).fingerprint


def test_the_two_models_of_768_dimensions_do_not_share_a_fingerprint():
    one = Space(**FIELDS | {"prompts": prompts_digest(EMBEDDINGGEMMA)})
    other = Space(**FIELDS | {"prompts": prompts_digest(EMBEDDINGGEMMA_2)})
    assert one.fingerprint != other.fingerprint


def test_a_space_does_not_differ_from_itself():
    assert Space(**FIELDS).differences(Space(**FIELDS)) == {}


def test_a_space_does_not_differ_by_the_name_of_the_model_alone():
    assert Space(**FIELDS).differences(Space(**FIELDS | {"model": "checkpoint"})) == {}


@pytest.mark.parametrize(("field", "value"), DECIDING.items())
def test_a_difference_is_named_with_the_value_here_and_there(field, value):
    assert Space(**FIELDS).differences(Space(**FIELDS | {field: value})) == {field: (FIELDS[field], value)}


def test_spaces_that_differ_name_their_models_too():
    other = Space(**FIELDS | {"model": "google/embeddinggemma-2", "weights": "sha256:def"})
    assert Space(**FIELDS).differences(other) == {
        "model": ("google/embeddinggemma-300m", "google/embeddinggemma-2"),
        "weights": ("sha256:abc", "sha256:def"),
    }


def test_a_space_survives_json():
    assert Space.model_validate_json(Space(**FIELDS).model_dump_json()) == Space(**FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_space_needs(field):
    with pytest.raises(ValidationError, match=field):
        Space(**{name: value for name, value in FIELDS.items() if name != field})


def test_a_space_refuses_an_unknown_field():
    with pytest.raises(ValidationError, match="dimension"):
        Space(**FIELDS, dimension=768)


def test_a_space_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Space(**FIELDS).dimensions = 256


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_digest_of_prompts_is_sixteen_hexadecimal_digits(profile):
    digest = prompts_digest(profile)
    assert len(digest) == 16
    assert set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize("task", Task)
def test_the_digest_of_prompts_changes_with_the_prompt_of_each_task(task):
    changed = dataclasses.replace(EMBEDDINGGEMMA, prompts={**EMBEDDINGGEMMA.prompts, task: "other: "})
    assert prompts_digest(changed) != prompts_digest(EMBEDDINGGEMMA)


class Titleless(PromptProfile):
    def prompt(self, task, title=None):
        return super().prompt(task)


def test_the_digest_of_prompts_changes_with_what_becomes_of_a_title():
    titleless = Titleless("titleless", prompts=EMBEDDINGGEMMA.prompts)
    assert prompts_digest(titleless) != prompts_digest(EMBEDDINGGEMMA)


def test_the_digest_of_prompts_is_the_same_for_the_same_prompts_under_another_name():
    assert prompts_digest(dataclasses.replace(EMBEDDINGGEMMA, name="own")) == prompts_digest(EMBEDDINGGEMMA)


def test_the_digest_of_prompts_is_the_same_whether_a_prompt_is_inherited_or_written_out():
    # a task that is absent uses the prompt of the query
    inherited = PromptProfile("inherited", prompts={Task.QUERY: "ask: "})
    written = PromptProfile("written", prompts={task: "ask: " for task in Task if task is not Task.DOCUMENT})
    assert prompts_digest(inherited) == prompts_digest(written)


def test_an_input_has_no_title_unless_given():
    assert Input("text", Task.QUERY).title is None


class Complete:
    space = Space(**FIELDS)
    profile = NO_PROMPTS

    def encode(self, inputs):
        return np.ones((len(inputs), 1), dtype=np.float32)

    def count_tokens(self, texts):
        return [1 for _ in texts]


def test_what_has_every_member_is_an_encoder():
    assert is_encoder(Complete())


@pytest.mark.parametrize("member", ["space", "profile", "encode", "count_tokens"])
def test_what_lacks_a_member_is_no_encoder(member):
    members = {name: value for name, value in vars(Complete).items() if not name.startswith("__") and name != member}
    assert not is_encoder(type("Incomplete", (), members)())


def test_asking_whether_it_is_an_encoder_loads_nothing():
    class Lazy(Complete):
        @property
        def space(self):
            raise AssertionError("loaded")

    assert is_encoder(Lazy())
