"""`gemma-rag verify`: what it prints, writes and exits with."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from gemma_rag import cli
from gemma_rag.cli_models import _same_model
from gemma_rag.encoders import EncoderSettings, Space
from gemma_rag.errors import ModelUnavailable
from gemma_rag.verify import Reference

CONTEXT = 128  # of the tiny model here, for the time it takes


@pytest.fixture
def gemma_rag(capsys):
    """Run a command; returns exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def reference(tiny_gemma, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "tiny.npz"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.run(["verify", str(tiny_gemma), "--max-tokens", str(CONTEXT), "--write", str(file)])
    assert (status, out.getvalue()) == (0, f"wrote {file}: 206 texts, 48 dimensions of {tiny_gemma.name}\n")
    return file


def test_a_right_model_exits_with_0(gemma_rag, tiny_gemma, reference):
    words = ("verify", "--model", tiny_gemma, "--max-tokens", CONTEXT, "--device", "cpu", "--reference", reference)
    status, out, err = gemma_rag(*words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["passed"], found["faults"], found["bound"]) == (True, [], 0.9999)
    assert "WARNING" not in err
    status, out, err = gemma_rag(*words, "--dimensions", 16, "--untrained-dimensions")
    assert status == 0, err
    assert out.startswith("verified: 206 texts, cosine with the right vectors 1.00000 at least")


def test_a_fault_exits_with_3_and_is_named(gemma_rag, tiny_gemma, reference):
    words = ("verify", tiny_gemma, "--prompts", "none", "--max-tokens", CONTEXT, "--device", "cpu", "--reference", reference)
    status, out, _ = gemma_rag(*words, "--json")
    assert status == 3
    assert [fault["name"] for fault in json.loads(out)["faults"]] == ["prompts_missing"]
    status, out, _ = gemma_rag(*words)
    assert status == 3
    assert out.startswith("NOT verified: ")
    assert "Cure: Put the model's prompt for the task before each text" in out


def test_another_bound_can_be_asked_for(gemma_rag, tiny_gemma, reference):
    words = ("verify", tiny_gemma, "--max-tokens", CONTEXT, "--device", "cpu", "--reference", reference, "--json")
    status, out, _ = gemma_rag(*words, "--precision", "bfloat16", "--bound-of", "float32")
    assert status == 3
    assert [fault["name"] for fault in json.loads(out)["faults"]] == ["low_precision"]


@pytest.mark.parametrize("named", [True, False])
def test_the_reference_can_be_a_model_and_is_the_same_one_where_none_is_named(gemma_rag, tiny_gemma, named):
    words = ["verify", tiny_gemma, "--max-tokens", 32, "--device", "cpu", "--json"]
    status, out, err = gemma_rag(*words, *(["--reference", tiny_gemma] if named else []))
    assert status == 0, err
    assert json.loads(out)["reference"]["runtime"] == "sentence-transformers"


def test_writing_with_json_prints_one_object(gemma_rag, tiny_gemma, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Reference, "from_model", lambda settings: made.append(settings) or FakeReference())
    status, out, _ = gemma_rag("verify", tiny_gemma, "--prompts", "none", "--write", tmp_path / "x.npz", "--json")
    assert status == 0
    assert json.loads(out) == {"written": str(tmp_path / "x.npz"), "texts": 1, "reference": FakeReference.space.model_dump()}
    assert (made[0].model, made[0].prompts) == (str(tiny_gemma), "none")


class FakeReference:
    right = (0,)
    space = Space(
        model="fake", weights="", prompts="", dimensions=8, max_tokens=8, overflow="truncate", runtime="x", precision="float32"
    )

    def save(self, file: Path) -> None:
        pass


def test_nothing_to_compare_with_says_what_to_give(gemma_rag, tiny_gemma, monkeypatch):
    def absent(settings: EncoderSettings) -> Reference:
        raise ModelUnavailable("the model is not there")

    monkeypatch.setattr(Reference, "from_model", absent)
    status, out, err = gemma_rag("verify", tiny_gemma, "--max-tokens", 32, "--device", "cpu")
    assert (status, out) == (1, "")
    assert f"there is nothing to compare {tiny_gemma.name} with: the model is not there" in err
    assert "Give --reference FILE: a file that `gemma-rag verify MODEL --write FILE` made where the model is" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one", "--model", "two"], "two models are given, one and two"),
        (["--write", "x.npz", "--runtime", "ollama", "--dimensions", "8"], "leave --runtime, --dimensions out"),
        (["minilm", "--write", "nowhere/at/all/x.npz"], "there is no folder"),
        (["minilm", "--reference", "absent.npz"], "there is no reference file absent.npz"),
        (["minilm", "--url", "http://localhost:1"], "does not use url"),
        (["minilm", "--precision", "int7"], "--precision: "),
    ],
)
def test_bad_input_exits_with_2(gemma_rag, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = gemma_rag("verify", *words)
    assert (status, out) == (2, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_had_exits_with_1(gemma_rag, tmp_path):
    status, _, err = gemma_rag("verify", tmp_path / "absent")
    assert status == 1
    assert "there is no folder" in err


@pytest.mark.parametrize(
    ("served", "model"),
    [
        ("embeddinggemma:300m", "google/embeddinggemma-300m"),
        ("embeddinggemma-2:latest", "google/embeddinggemma-2"),
        ("google/embeddinggemma-300m", "google/embeddinggemma-300m"),
        ("all-minilm:latest", "minilm"),
        ("all-minilm:33m", "all-minilm:33m"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm"),
        ("owner/of-its-own", "owner/of-its-own"),
    ],
)
def test_the_model_behind_a_servers_name_is_known(served, model):
    fields = {"weights": "", "prompts": "", "dimensions": 8, "max_tokens": 8, "overflow": "truncate", "runtime": "ollama"}
    space = Space(model=served, precision="server", **fields)
    assert _same_model(EncoderSettings(model=served, runtime="ollama"), space) == model
