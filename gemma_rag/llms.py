"""Language models by name, for the command line: any of LangChain's chat models, or one that runs here on transformers."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Iterator
from typing import Any

from gemma_rag.answer import ChatModel, Writer
from gemma_rag.encoders.models import find_model
from gemma_rag.encoders.sentence_transformers import quiet_loading
from gemma_rag.errors import InputError, LanguageModelError, MissingExtra, without_secrets

LOCAL = "transformers"
DEFAULT_LOCAL_MODEL = "google/gemma-3-1b-it"


def load_llm(name: str) -> ChatModel | Writer:
    """Load a language model by its name.

    Args:
        name: ``transformers:MODEL`` runs a model here, MODEL a folder or an id on the hub (``transformers`` alone is
            Gemma 3 1B); any other ``provider:model``, such as ``ollama:gemma3``, is one of LangChain's chat models and
            needs that provider's package.

    Raises:
        InputError: The name has no provider.
        MissingExtra: langchain or sentence-transformers is not installed.
        LanguageModelError: The model cannot be loaded; the message says what is missing.
        ModelUnavailable: The local model cannot be had.
    """
    provider, _, model = name.partition(":")
    if provider == LOCAL:
        return LocalModel(model or DEFAULT_LOCAL_MODEL)
    if not provider or not model:
        raise InputError(
            f"{name!r} names no language model: write provider:model, for example ollama:gemma3, or transformers:FOLDER_OR_ID"
        )
    if importlib.util.find_spec("langchain") is None:
        raise MissingExtra("LangChain, which loads chat models by name,", "llm")
    from langchain.chat_models import init_chat_model

    try:
        loaded: ChatModel = init_chat_model(name)
    except Exception as error:  # each provider raises errors of its own, about keys and settings
        problem = without_secrets(str(error))
        if isinstance(error, (AttributeError, ImportError)) and "pip install" not in problem:
            problem += f". Its chat models are in a package of their own: pip install langchain-{provider.replace('_', '-')}"
        raise LanguageModelError(f"the language model {name} cannot be loaded: {problem}") from error
    return loaded


class LocalModel:
    """A chat model that runs here through transformers, and writes word by word. A `Writer`.

    The weights are loaded with the first question.

    Args:
        model: A folder, or an id on the hub.
        max_new_tokens: The longest answer, in tokens.

    Raises:
        MissingExtra: transformers is not installed.
        ModelUnavailable: The model cannot be had; the message says what to do.
    """

    def __init__(self, model: str, *, max_new_tokens: int = 512) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise MissingExtra("transformers, which runs local language models,", "local")
        self._source = find_model(model)
        self._max_new_tokens = max_new_tokens
        self._pipeline: Any = None

    def __call__(self, system: str, user: str) -> Iterator[str]:
        """Answer, piece by piece."""
        from transformers import TextIteratorStreamer

        pipeline = self._load()
        streamer = TextIteratorStreamer(pipeline.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                pipeline(
                    [
                        {"role": "system", "content": system},
                        {"role": "user", "content": _without_control_tokens(user, pipeline.tokenizer)},
                    ],
                    max_new_tokens=self._max_new_tokens,
                    do_sample=False,
                    streamer=streamer,
                )
            except BaseException as error:  # handed to the reader's thread, which raises it
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name="gemma-rag local model", daemon=True)
        thread.start()
        yield from filter(None, streamer)
        thread.join()
        if failure:
            raise LanguageModelError(f"the language model {self._source.name} failed: {failure[0]}") from failure[0]

    def _load(self) -> Any:
        if self._pipeline is None:
            from transformers import pipeline

            try:
                with quiet_loading():
                    self._pipeline = pipeline("text-generation", model=self._source.location)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise LanguageModelError(f"the language model {self._source.name} cannot be loaded: {error}") from error
        return self._pipeline


def _without_control_tokens(text: str, tokenizer: Any) -> str:
    """Take the brackets off what the tokenizer would read as a token of its own, such as ``<end_of_turn>``.

    A passage that holds one could else end the user's turn and speak as the model.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.content.strip() and (token.special or re.fullmatch(r"<.+>", token.content)):
            text = text.replace(token.content, token.content.strip("<>|[]") or " ")
    return text
