"""Reference files and the texts that they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_rag.encoders import EncoderSettings
from gemma_rag.encoders.base import prompts_digest
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import BGE, E5, EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, MINILM, Task
from gemma_rag.verify import verify
from gemma_rag.verify_reference import Reference
from gemma_rag.verify_texts import Fault, Probe, group_of, misreadings, probes, probes_digest, right_text, suspects

CONTEXT = 96  # of the tiny model here, for the time it takes


@pytest.fixture(scope="module")
def reference(tiny_gemma):
    """Made from settings of which most do not count: a reference is whole, exact, and leaves prompted texts alone."""
    given = {"dimensions": 16, "untrained_dimensions": True, "precision": "bfloat16", "detect_prompts": False}
    return Reference.from_model(EncoderSettings(model=str(tiny_gemma), max_tokens=CONTEXT, **given))


@pytest.fixture
def file(reference, tmp_path):
    reference.save(tmp_path / "reference.npz")
    return tmp_path / "reference.npz"


# -- the texts --------------------------------------------------------------------------------------------------------


def test_the_texts_cover_what_they_should():
    texts = probes()
    assert 180 <= len(texts) <= 220
    assert len(set(texts)) == len(texts)
    assert {probe.task for probe in texts} == set(Task)
    assert len({probe.language for probe in texts} - {""}) >= 40
    assert {"zh", "zh-Hant"} <= {probe.language for probe in texts}
    assert all(probe.text.strip() for probe in texts)
    assert {"code", "emoji", "numbers", "short", "space", "lines", "prompted", "long"} <= {probe.kind for probe in texts}
    assert sum(probe.titled for probe in texts) >= 20
    assert all(probe.title is None or probe.task is Task.DOCUMENT for probe in texts)
    assert sum(EMBEDDINGGEMMA.is_prompted(probe.text) for probe in texts) == 6


def test_long_texts_grow_and_say_something_new_to_the_end():
    long = [probe.text for probe in probes() if probe.kind == "long"]
    assert len(long[0]) < 300
    assert len(long[-1]) > 35_000
    for text in long[4:]:
        half = len(text) // 2
        first, second = set(text[:half].split()), set(text[half:].split())
        assert len(second - first) > 0.25 * len(second)


def test_every_group_has_suspects():
    groups = {group_of(probe) for probe in probes() if probe.kind != "long"}
    assert {group_of(probes()[i]) for i in suspects()} == groups


DOCUMENT = Probe("body", Task.DOCUMENT, " A \n title ")


def test_the_right_text_has_its_prompt_once():
    assert right_text(DOCUMENT, EMBEDDINGGEMMA) == "title: A title | text: body"
    assert right_text(Probe("q", Task.CODE_QUERY), EMBEDDINGGEMMA) == "task: code retrieval | query: q"
    prompted = Probe("task: clustering | query: q", Task.QUERY, kind="prompted")
    assert right_text(prompted, EMBEDDINGGEMMA) == prompted.text
    assert right_text(DOCUMENT, MINILM) == "A title\nbody"


def test_a_titled_document_can_be_misread_in_these_ways():
    found = {(reading.faults, reading.text) for reading in misreadings(DOCUMENT, EMBEDDINGGEMMA)}
    assert found == {
        ((Fault.PROMPTS_MISSING,), "body"),
        ((Fault.PROMPTS_MISSING,), "A title\nbody"),
        ((Fault.PROMPTS_MISSING,), "title: A title\n\nbody"),
        ((Fault.PROMPTS_DOUBLED,), "title: A title | text: title: A title | text: body"),
        ((Fault.PROMPTS_DOUBLED,), "title: none | text: title: A title | text: body"),
        ((Fault.PROMPTS_DOUBLED,), "task: search result | query: title: A title | text: body"),
        ((Fault.WRONG_ROLE,), "task: search result | query: body"),
        ((Fault.TITLE_LOST,), "title: none | text: body"),
        ((Fault.TITLE_LOST,), "title: none | text: title: A title\n\nbody"),
        ((Fault.TITLE_LOST,), "title: none | text: A title\nbody"),
    }


@pytest.mark.parametrize("profile", [EMBEDDINGGEMMA, EMBEDDINGGEMMA_2, E5, BGE, MINILM], ids=lambda profile: profile.name)
def test_no_misreading_is_right_or_there_twice(profile):
    for probe in probes():
        texts = [reading.text for reading in misreadings(probe, profile)]
        assert len(set(texts)) == len(texts)
        assert right_text(probe, profile) not in texts


def test_a_model_without_prompts_cannot_miss_them():
    readings = [reading for probe in probes() for reading in misreadings(probe, MINILM)]
    assert {fault for reading in readings for fault in reading.faults} == {Fault.TITLE_LOST, Fault.TEXTS_CHANGED}


# -- the vectors ------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_library_given_whole_texts(reference, tiny_gemma):
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(tiny_gemma), device="cpu", local_files_only=True)
    library.max_seq_length = CONTEXT
    i = next(i for i, probe in enumerate(probes()) if probe.title == "車票")
    text = f"title: {probes()[i].title} | text: {probes()[i].text}"
    expected = library.encode([text], prompt="", normalize_embeddings=True)[0]
    assert np.abs(reference.right[i] - expected).max() < 1e-6
    assert reference.lengths[i] == len(library.tokenizer(text)["input_ids"])
    bare = SentenceTransformer(modules=[m for m in library if type(m).__name__ != "Dense"], device="cpu")
    i, row = next((a.probe, row) for a, row in zip(reference.pooled, reference.pooled_wrong, strict=True) if len(a.faults) == 1)
    pooled = bare.encode([right_text(probes()[i], EMBEDDINGGEMMA)], prompt="", normalize_embeddings=True)[0]
    assert np.abs(row - pooled).max() < 1e-3
    cut, row = next((a, row) for a, row in zip(reference.alternatives, reference.wrong, strict=True) if a.cut == 64)
    library.max_seq_length = 64
    expected = library.encode([right_text(probes()[cut.probe], EMBEDDINGGEMMA)], prompt="", normalize_embeddings=True)[0]
    assert np.abs(row - expected).max() < 1e-3


def test_the_space_is_that_of_the_model_whatever_else_was_asked_for(reference, tiny_gemma):
    space = reference.space
    assert (space.dimensions, space.precision, space.max_tokens, space.overflow) == (48, "float32", CONTEXT, "truncate")
    assert space.model == tiny_gemma.name
    assert space.prompts == prompts_digest(EMBEDDINGGEMMA)


def test_a_model_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        Reference.from_model(str(tmp_path / "absent"))


# -- the file ---------------------------------------------------------------------------------------------------------


class Wrong:
    """An encoder that gives the vectors of texts without prompts, as far as the reference knows them."""

    def __init__(self, reference: Reference) -> None:
        self.profile, self.space = EMBEDDINGGEMMA, reference.space
        self.rows = dict(enumerate(reference.right))
        for alternative, row in zip(reference.alternatives, reference.wrong, strict=True):
            if alternative.faults == (Fault.PROMPTS_MISSING,) and alternative.how == "texts without a prompt":
                self.rows[alternative.probe] = row.astype(np.float32)
        self.places = {probe.input: i for i, probe in enumerate(probes())}

    def encode(self, inputs):
        return np.stack([self.rows[self.places[item]] for item in inputs])

    def count_tokens(self, texts):
        return [1] * len(texts)


def test_a_reference_that_was_saved_gives_the_same_diagnosis(reference, file):
    loaded = Reference.load(file)
    assert (loaded.right == reference.right).all()
    assert (loaded.space, loaded.lengths, loaded.alternatives) == (reference.space, reference.lengths, reference.alternatives)
    before, after = (verify(Wrong(reference), which).to_json() for which in (reference, loaded))
    assert before == after
    assert {fault["name"] for fault in before["faults"]} == {"prompts_missing"}


def test_the_same_reference_is_written_to_the_same_bytes(reference, file, tmp_path):
    reference.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_a_reference_of_768_dimensions_has_less_than_4_mb(reference):
    rows = 4 * len(reference.right) + 2 * (len(reference.wrong) + len(reference.pooled_wrong) + 20)  # 20: longer contexts
    assert rows * 768 < 3_500_000


def rewritten(file, **changes):
    with np.load(file) as parts:
        kept = dict(parts)
    about = json.loads(bytes(kept["about"]))
    about |= {name: value for name, value in changes.items() if name in about}
    kept |= {name: value for name, value in changes.items() if name in kept}
    kept["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with file.open("wb") as stream:
        np.savez(stream, **kept)


def test_a_reference_of_other_texts_is_refused(file):
    rewritten(file, probes=probes_digest()[::-1])
    with pytest.raises(InputError, match="was made for other texts") as refused:
        Reference.load(file)
    assert "Make it anew: gemma-rag verify MODEL --write FILE" in str(refused.value)


def test_a_reference_of_a_later_version_is_refused(file):
    rewritten(file, version=2)
    with pytest.raises(InputError, match="is no reference file that this version of gemma-rag reads"):
        Reference.load(file)


def test_a_vector_that_was_changed_is_noticed(file, reference):
    changed = reference.right.copy()
    changed[7, 3] += 0.01
    rewritten(file, right=changed)
    with pytest.raises(InputError, match="is damaged: its vectors are not those that were written"):
        Reference.load(file)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_noticed(file, place):
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"reference\.npz is"):
        Reference.load(file)


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_half_a_file_is_noticed(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="is no reference file of gemma-rag, or is damaged"):
        Reference.load(file)


ARRAY = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }            \n" + bytes(8)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no reference file"):
        Reference.load(tmp_path / "absent.npz")
    for name, write in {
        "text.npz": lambda file: file.write_text("hello"),
        "array.npz": lambda file: file.write_bytes(ARRAY),
        "others.npz": lambda file: np.savez(file, a=np.zeros(3)),
        "pickle.npz": lambda file: np.savez(file, about=np.array([{}], dtype=object), right=1, wrong=1, pooled_wrong=1),
    }.items():
        write(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is no reference file of gemma-rag, or is damaged"):
            Reference.load(tmp_path / name)


def test_a_place_that_cannot_be_written_to_is_said(reference, tmp_path):
    with pytest.raises(InputError, match="the reference cannot be written to"):
        reference.save(tmp_path / "absent" / "reference.npz")
