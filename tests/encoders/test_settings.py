"""`EncoderSettings`: what a runtime does not use is refused, secrets stay secret, and a recipe makes the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import EncoderSettings
from gemma_rag.encoders.settings import API_KEY, REMOTE
from gemma_rag.prompts import E5

LOCAL = ("auto", "sentence-transformers", "onnx", "openvino")
SERVERS = {
    "url": "http://localhost:8080",
    "api_key": "k3y",
    "tokenizer": "google/embeddinggemma-300m",
    "timeout": 5.0,
    "retries": 0,
    "concurrency": 9,
    "batch_texts": 7,
}
HERE = {"device": "cpu", "batch_tokens": 512}


def refusal(**settings) -> str:
    with pytest.raises(ValidationError) as caught:
        EncoderSettings(**settings)
    return str(caught.value)


# -- what a runtime does not use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", LOCAL)
@pytest.mark.parametrize(("name", "value"), SERVERS.items())
def test_what_is_for_servers_is_refused_by_a_local_runtime(runtime, name, value):
    assert f"the runtime {runtime} does not use {name}" in refusal(runtime=runtime, **{name: value})


@pytest.mark.parametrize("runtime", REMOTE)
@pytest.mark.parametrize(("name", "value"), HERE.items())
def test_what_is_for_this_machine_is_refused_by_a_server(runtime, name, value):
    assert f"the runtime {runtime} does not use {name}" in refusal(runtime=runtime, **{name: value})


@pytest.mark.parametrize("runtime", REMOTE)
@pytest.mark.parametrize(("name", "value"), {"revision": "v2", "token": "hf_t0ken"}.items())
def test_what_is_for_the_hub_is_refused_by_a_server(runtime, name, value):
    assert f"does not use {name}" in refusal(runtime=runtime, **{name: value})


@pytest.mark.parametrize("runtime", [*LOCAL, "tei", "openai"])
def test_keep_alive_is_for_ollama_alone(runtime):
    assert f"the runtime {runtime} does not use keep_alive" in refusal(runtime=runtime, keep_alive="5m")
    assert EncoderSettings(runtime="ollama", keep_alive="5m").keep_alive == "5m"


@pytest.mark.parametrize("runtime", ["onnx", *REMOTE])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_is_refused_where_it_is_the_models_own(runtime, precision):
    assert f"the precision of the runtime {runtime} is its model's own" in refusal(runtime=runtime, precision=precision)


@pytest.mark.parametrize("runtime", ["auto", "sentence-transformers", "openvino"])
def test_a_precision_is_taken_where_it_can_be_chosen(runtime):
    assert EncoderSettings(runtime=runtime, precision="bfloat16").precision == "bfloat16"


def test_all_that_is_not_used_is_named_at_once():
    assert "does not use url, timeout, batch_texts" in refusal(batch_texts=3, url="http://localhost:1", timeout=1)


@pytest.mark.parametrize("runtime", REMOTE)
def test_a_server_takes_all_that_is_for_servers(runtime):
    settings = EncoderSettings(runtime=runtime, **SERVERS)
    assert settings.batch_texts == 7
    assert settings.url == "http://localhost:8080"


@pytest.mark.parametrize("runtime", LOCAL)
def test_a_local_runtime_takes_all_that_is_for_this_machine(runtime):
    assert EncoderSettings(runtime=runtime, **HERE).batch_tokens == 512


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "dimensions": 0,
        "max_tokens": 7,
        "batch_tokens": 0,
        "timeout": 0,
        "retries": -1,
        "concurrency": 0,
        "batch_texts": 0,
        "runtime": "torch",
        "precision": "int8",
        "on_overflow": "ignore",
        "modell": "minilm",
    }.items(),
)
def test_a_value_out_of_range_and_an_unknown_name_are_refused_by_name(name, value):
    runtime = {"runtime": "ollama"} if name in SERVERS else {}
    assert f"\n{name}\n" in refusal(**runtime, **{name: value})


def test_more_requests_at_a_time_than_a_server_can_bear_are_refused():
    assert "concurrency" in refusal(runtime="tei", concurrency=257)


# -- addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://localhost:11434", "https://embed.example.org/tei/", "http://[::1]:8080", "http://10.0.0.1", "HTTP://host"]
)
def test_an_address_is_taken_as_it_is(url):
    assert EncoderSettings(runtime="ollama", url=url).url == url


@pytest.mark.parametrize("url", ["localhost:11434", "ftp://host", "http://", "//host", "/v1", "", "unix:/run/x", "http:host"])
def test_what_is_no_address_is_refused_with_an_example(url):
    assert "url is an address as http://localhost:11434" in refusal(runtime="ollama", url=url)


@pytest.mark.parametrize("url", ["http://host/?key=s3cret", "http://host/#s3cret", "http://host:80?s3cret"])
def test_nothing_may_follow_the_address(url):
    problem = refusal(runtime="ollama", url=url)
    assert "nothing after ? or #" in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize(
    "url",
    [
        "http://anna:s3cret@host:8080",
        "https://anna:s3cret@host/v1",
        "http://:s3cret@host",
        "http://s3cret@host",
        "http://anna:s3cret@",
        "ftp://anna:s3cret@host",
        "http://anna:s3cret@[::1",
        "http://anna:s3cret@ho\u2100st",  # a sign that becomes "a/c": the standard library quotes what stands before it
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(url):
    assert "s3cret" not in refusal(runtime="openai", url=url)


@pytest.mark.parametrize("url", ["http://localhost:99999", "http://localhost:http"])
def test_a_port_that_cannot_be_is_refused(url):
    assert "url is an address" in refusal(runtime="ollama", url=url)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"runtime": "ollama", "url": "http://anna:s3cret@host:8080"}, "no password"),
        ({"runtime": "tei", "device": "cuda"}, "does not use device"),
        ({"model": "minilm", "url": "http://host"}, "does not use url"),
    ],
)
def test_the_front_door_refuses_before_it_looks_for_a_model_or_asks_a_server(monkeypatch, settings, problem):
    loaded: list[object] = []
    monkeypatch.setattr("gemma_rag.embeddings.load_encoder", loaded.append)
    with pytest.raises(ValidationError, match=problem) as caught:
        GemmaEmbeddings(**settings)
    assert "s3cret" not in str(caught.value)
    assert loaded == []


# -- secrets ------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEY, "k3y-of-the-environment")
    assert API_KEY == "GEMMA_RAG_API_KEY"
    assert EncoderSettings(runtime="tei").secret() == "k3y-of-the-environment"


def test_a_key_that_is_given_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEY, "k3y-of-the-environment")
    assert EncoderSettings(runtime="tei", api_key="k3y-given").secret() == "k3y-given"


@pytest.mark.parametrize("value", [None, ""])
def test_no_key_is_none(monkeypatch, value):
    monkeypatch.delenv(API_KEY, raising=False)
    if value is not None:
        monkeypatch.setenv(API_KEY, value)
    assert EncoderSettings(runtime="tei").secret() is None


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_the_key_shows_nowhere(monkeypatch, given):
    monkeypatch.setenv(API_KEY, "s3cret-k3y")
    settings = EncoderSettings(runtime="tei", **({"api_key": "s3cret-k3y"} if given == "argument" else {}))
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump()), str(settings.recipe())]
    assert not any("s3cret" in text for text in shown)
    assert settings.secret() == "s3cret-k3y"


@pytest.mark.parametrize("name", ["api_key", "token"])
def test_a_secret_of_a_wrong_type_is_not_repeated(name):
    assert "s3cret" not in refusal(runtime="tei", **{name: {"value": "s3cret"}})


def test_a_key_beside_a_wrong_value_is_not_repeated():
    assert "s3cret" not in refusal(runtime="tei", api_key="s3cret-k3y", timeout=-1)
    assert "s3cret" not in refusal(runtime="sentence-transformers", api_key="s3cret-k3y")


# -- changes ------------------------------------------------------------------------------------------------------------


def test_changed_settings_keep_the_rest():
    settings = EncoderSettings(runtime="tei", api_key="k3y", dimensions=256, prompts=E5)
    other = settings.changed(dimensions=128)
    assert other == EncoderSettings(runtime="tei", api_key="k3y", dimensions=128, prompts=E5)
    assert settings.dimensions == 256
    assert other.secret() == "k3y"


def test_changed_settings_are_checked_as_new_ones_are():
    settings = EncoderSettings(runtime="tei", url="http://localhost:8080")
    with pytest.raises(ValidationError, match="the runtime onnx does not use url"):
        settings.changed(runtime="onnx")
    with pytest.raises(ValidationError, match="dimensions"):
        settings.changed(dimensions=0)
    with pytest.raises(ValidationError, match="modell"):
        settings.changed(modell="minilm")


def test_changed_embeddings_are_settings_and_load_nothing():
    changed = GemmaEmbeddings(model="minilm").changed(model="no-such-owner/no-such-model")
    assert type(changed) is EncoderSettings


def test_settings_do_not_change():
    settings = EncoderSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.model = "minilm"


# -- recipes ------------------------------------------------------------------------------------------------------------

LEFT_OUT = {"token": "hf_t0ken", "api_key": "k3y", "show_progress": False, "cache": "vectors"}
OTHER_VALUES = {
    "model": "intfloat/e5-small",
    "runtime": "sentence-transformers",
    "dimensions": 256,
    "untrained_dimensions": True,
    "prompts": "e5",
    "detect_prompts": False,
    "max_tokens": 64,
    "on_overflow": "average",
    "precision": "bfloat16",
    "revision": "v2",
    "keep_alive": "-1",
    **HERE,
    **{name: value for name, value in SERVERS.items() if name != "api_key"},
}


def test_every_setting_is_tried_below():
    assert {*OTHER_VALUES, *LEFT_OUT} == set(EncoderSettings.model_fields)


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_a_recipe_makes_the_same_settings_again(name, value):
    runtime = {"runtime": "ollama"} if name in SERVERS or name == "keep_alive" else {}
    settings = EncoderSettings(**{**runtime, name: value})
    recipe = json.loads(json.dumps(settings.recipe()))
    assert recipe[name] == value
    assert EncoderSettings(**recipe) == settings


@pytest.mark.parametrize(("name", "value"), LEFT_OUT.items())
def test_a_recipe_holds_no_secret_and_nothing_of_this_machine_alone(name, value):
    settings = EncoderSettings(**({"runtime": "tei"} if name == "api_key" else {}), **{name: value})
    assert name not in settings.recipe()
    assert str(value) not in json.dumps(settings.recipe())


def test_a_recipe_of_defaults_names_the_model_alone():
    assert EncoderSettings().recipe() == {"model": "google/embeddinggemma-300m"}


def test_a_profile_of_your_own_is_left_out_of_the_recipe():
    assert EncoderSettings(prompts=E5).recipe() == {"model": "google/embeddinggemma-300m"}


@pytest.mark.parametrize("model", ["minilm", "owner/name", "nothing-here"])
def test_a_name_stays_a_name_in_the_recipe(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert EncoderSettings(model=model).recipe()["model"] == model


def test_a_folder_is_written_out_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert EncoderSettings(model="model").recipe()["model"] == str((tmp_path / "model").resolve())


def test_a_servers_name_is_no_folder_though_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embeddinggemma").mkdir()
    assert EncoderSettings(model="embeddinggemma", runtime="ollama").recipe()["model"] == "embeddinggemma"


def test_an_onnx_file_is_written_out_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert EncoderSettings(model="model.onnx").recipe()["model"] == str((tmp_path / "model.onnx").resolve())


def test_a_tokenizer_on_this_machine_is_written_out_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    recipe = EncoderSettings(runtime="ollama", tokenizer="tokenizer.json").recipe()
    assert recipe["tokenizer"] == str((tmp_path / "tokenizer.json").resolve())


def test_a_cache_is_a_path():
    assert EncoderSettings(cache="vectors").cache == Path("vectors")
