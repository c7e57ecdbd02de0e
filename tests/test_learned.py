"""What a knowledge base has learned: computed by hand, kept with the folder, bound to the space of its vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gemma_rag.calibration import OperatingPoint, best_f1
from gemma_rag.documents import Document
from gemma_rag.errors import InputError, KnowledgeBaseError, SpaceMismatch
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.learned import CALIBRATION, RANKING, ROUTER, Calibration, Evidence, KindCalibration, Learned, Ranking, Router

DOCUMENTS = [
    Document(id="apple", text="A red apple.", category="fruit"),
    Document(id="car", text="A blue car.", category="traffic"),
]
EVIDENCE = Evidence(features=("cosine", "lexical"), coefficients=(2.0, -1.0), intercept=0.5)
POINT: OperatingPoint = best_f1([0.2, 0.8], [False, True], [False, True])  # threshold 0.5, between the two


def learned(fingerprint: str, *, dimensions: int = 10) -> Learned:
    """A ranking with its router, and a calibration."""
    random = np.random.default_rng(0)
    router = Router(
        ("fruit", "traffic"),
        random.normal(size=(2, dimensions)).astype(np.float32),
        random.normal(size=2).astype(np.float32),
    )
    ranking = Ranking(
        lexical_weight=0.3,
        router_weight=0.02,
        categories=router.categories,
        fingerprint=fingerprint,
        questions=40,
        trials={"0.3 0.02": 0.75},
    )
    kind = KindCalibration(evidence=EVIDENCE, document=POINT, by_category={"fruit": 0.25}, questions=(1, 1))
    return Learned(ranking, router, Calibration(fingerprint=fingerprint, kinds={"hybrid": kind}, notes=("a note",)))


def same(one: Learned, other: Learned) -> bool:
    """Routers hold arrays, which do not compare as a whole: their bytes do."""
    return one.to_files() == other.to_files()


@pytest.fixture
def memory(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        yield base


@pytest.fixture
def folder(memory, tmp_path) -> Path:
    """A folder whose knowledge base has learned something; nobody has it open."""
    memory.learn(learned(memory.manifest.fingerprint))
    memory.save(tmp_path / "kb")
    memory.close()
    return tmp_path / "kb"


def attached(folder: Path, name: str) -> Path:
    [file] = folder.glob(f"attached-*-{name}")
    return file


# -- the router -------------------------------------------------------------------------------------------------------

floats = st.floats(-20, 20, width=32)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_probabilities_of_all_categories_sum_to_1(categories, questions, seed) -> None:
    random = np.random.default_rng(seed)
    router = Router(
        tuple("abcde"[:categories]),
        random.normal(0, 50, (categories, 3)).astype(np.float32),
        random.normal(0, 50, categories).astype(np.float32),
    )
    log = router.log_probabilities(random.normal(0, 5, (questions, 3)).astype(np.float32))
    assert log.shape == (questions, categories)
    assert np.exp(log.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(questions), abs=1e-5)


def test_probabilities_of_two_categories_by_hand() -> None:
    # logits 1 * 2 + 0 = 2 and -1 * 2 + 1 = -1: a difference of 3
    router = Router(("a", "b"), np.array([[1.0], [-1.0]], np.float32), np.array([0.0, 1.0], np.float32))
    [log] = router.log_probabilities(np.array([[2.0]], np.float32))
    assert np.exp(log) == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3))], rel=1e-5)


def test_a_category_that_is_out_of_the_question_has_a_finite_logarithm() -> None:
    router = Router(("a", "b"), np.array([[1e4], [-1e4]], np.float32), np.zeros(2, np.float32))
    assert router.log_probabilities(np.ones((1, 1), np.float32)).tolist() == [[0.0, -2e4]]


@given(st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=4))
def test_a_router_comes_back_from_its_bytes_as_it_was(rows) -> None:
    array = np.array(rows, dtype=np.float32)
    names = [f"c{i}" for i in range(len(rows))]
    router = Router(tuple(names), array[:, :2], array[:, 2])
    back = Router.from_bytes(router.to_bytes(), names)
    assert back.categories == router.categories
    assert np.array_equal(back.weights, router.weights)
    assert np.array_equal(back.bias, router.bias)
    assert (back.weights.dtype, back.bias.dtype) == (np.float32, np.float32)


# -- evidence and thresholds ------------------------------------------------------------------------------------------


def test_evidence_is_a_weighted_sum() -> None:
    # 0.5 + 2 * 0.5 - 0.25 and 0.5 + 2 * 0 - 1
    values = {"cosine": [0.5, 0.0], "lexical": [0.25, 1.0], "coverage": [9.0, 9.0]}
    assert EVIDENCE.score(values).tolist() == [1.25, -0.5]


def test_evidence_of_no_hits_is_empty() -> None:
    assert EVIDENCE.score({"cosine": [], "lexical": []}).shape == (0,)


def test_evidence_names_the_features_that_are_missing() -> None:
    with pytest.raises(InputError, match="the calibration needs lexical, which this search does not give"):
        EVIDENCE.score({"cosine": [0.5]})


def test_a_category_without_a_threshold_of_its_own_has_the_common_one() -> None:
    kind = KindCalibration(evidence=EVIDENCE, document=POINT, by_category={"fruit": 0.25}, questions=(1, 1))
    assert (kind.threshold("fruit"), kind.threshold("traffic")) == (0.25, 0.5)


@pytest.mark.parametrize(
    "changes", [{"lexical_weight": 1.1}, {"lexical_weight": float("nan")}, {"router_weight": -0.1}, {"surplus": 1}]
)
def test_a_ranking_with_weights_out_of_range_is_refused(changes) -> None:
    fields = {"lexical_weight": 0.5, "router_weight": 0.0, "categories": (), "fingerprint": "f", "questions": 20}
    Ranking(**fields)
    with pytest.raises(ValidationError):
        Ranking(**fields | changes)


def test_the_summary_of_a_calibration_is_plain_and_says_what_was_promised() -> None:
    calibration = learned("f").calibration
    assert calibration is not None
    assert calibration.summary() == {
        "estimated": False,
        "notes": ["a note"],
        "kinds": {
            "hybrid": {
                "rule": "best_f1",
                "document": 0.5,
                "category": None,
                "statement": POINT.statement,
                "answerable": 1,
                "unanswerable": 1,
            }
        },
    }


# -- as files ---------------------------------------------------------------------------------------------------------


def test_what_was_learned_comes_back_from_its_files() -> None:
    before = learned("f")
    after = Learned.from_files(before.to_files(), "the knowledge base")
    assert (after.ranking, after.calibration) == (before.ranking, before.calibration)
    assert same(after, before)


def test_nothing_learned_keeps_no_files() -> None:
    assert Learned().to_files() == {RANKING: None, ROUTER: None, CALIBRATION: None}
    assert Learned.from_files(Learned().to_files(), "the knowledge base") == Learned()


def test_a_router_without_its_ranking_is_not_read() -> None:
    files = learned("f").to_files() | {RANKING: None}
    assert Learned.from_files(files, "the knowledge base").router is None


@pytest.mark.parametrize("name", [RANKING, ROUTER, CALIBRATION])
@pytest.mark.parametrize("data", [b"garbage", b"{}"])
def test_files_of_another_form_are_refused_with_the_cure(name, data) -> None:
    with pytest.raises(KnowledgeBaseError, match=r"(?s)what my base has learned cannot be read: .*Fit and calibrate it again$"):
        Learned.from_files(learned("f").to_files() | {name: data}, "my base")


@pytest.mark.parametrize("part", ["ranking", "calibration"])
def test_what_was_learned_in_another_space_is_refused(part) -> None:
    mixed = Learned(**{part: getattr(learned("theirs"), part)})
    mixed.check("theirs")
    with pytest.raises(SpaceMismatch, match="space of what was learned: stored 'ours', given 'theirs'"):
        mixed.check("ours")


# -- in a knowledge base ----------------------------------------------------------------------------------------------


def test_a_knowledge_base_has_learned_nothing_at_first(memory) -> None:
    assert memory.learned == Learned()


def test_a_knowledge_base_in_memory_keeps_what_it_learned_when_it_changes(memory) -> None:
    wanted = learned(memory.manifest.fingerprint)
    memory.learn(wanted)
    memory.add([Document(id="pear", text="A green pear.", category="fruit")])
    memory.delete(["car"])
    assert same(memory.learned, wanted)


def test_a_saved_knowledge_base_has_learned_the_same_when_it_is_opened_again(folder, words) -> None:
    with KnowledgeBase.open(folder, words) as base:
        assert same(base.learned, learned(base.manifest.fingerprint))


def test_what_is_learned_is_committed_at_once(folder, words) -> None:
    with KnowledgeBase.open(folder, words) as base, KnowledgeBase.open(folder, words) as other:
        assert other.learned.ranking is not None
        base.learn(Learned(calibration=base.learned.calibration))
        assert other.refresh()
        assert (other.learned.ranking, other.learned.router) == (None, None)
        assert other.learned.calibration == base.learned.calibration


def test_what_is_forgotten_leaves_no_files(folder, words) -> None:
    with KnowledgeBase.open(folder, words) as base:
        base.learn(Learned())
        assert list(folder.glob("attached-*")) == []
        assert base.learned == Learned()
    with KnowledgeBase.open(folder, words) as base:
        assert base.learned == Learned()


def test_without_keep_it_is_in_force_and_not_in_the_folder(folder, words) -> None:
    files = sorted(file.name for file in folder.iterdir())
    with KnowledgeBase.open(folder, words) as base:
        base.learn(Learned(), keep=False)
        assert base.learned == Learned()
        assert sorted(file.name for file in folder.iterdir()) == files
    with KnowledgeBase.open(folder, words) as base:
        assert base.learned.ranking is not None


def test_a_knowledge_base_does_not_learn_from_another_space(memory) -> None:
    with pytest.raises(SpaceMismatch, match="space of what was learned"):
        memory.learn(learned("another"))
    assert memory.learned == Learned()


def test_files_from_another_space_are_refused_when_they_are_needed(folder, words) -> None:
    with KnowledgeBase.open(folder, words) as base:
        base._store.attach({CALIBRATION: learned("another").to_files()[CALIBRATION]})
    with KnowledgeBase.open(folder, words) as base, pytest.raises(SpaceMismatch, match="'another'"):
        _ = base.learned


@pytest.mark.parametrize("name", [RANKING, ROUTER, CALIBRATION])
def test_a_damaged_file_is_named(folder, words, name) -> None:
    file = attached(folder, name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(KnowledgeBaseError, match=rf"{file.name} is damaged: its checksum is wrong"):
        KnowledgeBase.open(folder, words)
    with (
        KnowledgeBase.open(folder, words, verify=False) as base,
        pytest.raises(KnowledgeBaseError, match=f"{file.name} is damaged"),
    ):
        _ = base.learned


def test_a_missing_file_is_named(folder, words) -> None:
    file = attached(folder, ROUTER)
    file.unlink()
    with pytest.raises(KnowledgeBaseError, match=f"{file.name} is missing or cannot be read"):
        KnowledgeBase.open(folder, words)
