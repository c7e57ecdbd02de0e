"""What a language model writes, whole or piece by piece: one of LlamaIndex's, or a plain function."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, MessageRole

from gemma_rag.answer import Draft, Writer, in_thread


def is_asynchronous(write: Any) -> bool:
    """Whether a function, or an object that is called as one, is asynchronous."""
    return any(
        test(each) for test in (inspect.iscoroutinefunction, inspect.isasyncgenfunction) for each in (write, write.__call__)
    )


def written(llm: BaseLLM | Writer, draft: Draft) -> str:
    """All that a model writes for a draft."""
    if isinstance(llm, BaseLLM):
        return llm.chat(_messages(draft)).message.content or ""
    return "".join(llm(*draft.messages))


async def awritten(llm: BaseLLM | Writer, draft: Draft) -> str:
    """`written` without holding up the event loop: a model is awaited, a function works in a thread."""
    if isinstance(llm, BaseLLM):
        return (await llm.achat(_messages(draft))).message.content or ""
    return await asyncio.to_thread(written, llm, draft)


def pieces(llm: BaseLLM | Writer, draft: Draft) -> Iterable[str]:
    """What a model writes for a draft, piece by piece; it is called now."""
    if isinstance(llm, BaseLLM):
        return (response.delta or "" for response in llm.stream_chat(_messages(draft)))
    return llm(*draft.messages)


async def apieces(llm: BaseLLM | Writer, draft: Draft) -> AsyncIterator[str]:
    """`pieces` without holding up the event loop."""
    if isinstance(llm, BaseLLM):
        stream = await llm.astream_chat(_messages(draft))
        return (response.delta or "" async for response in stream)
    return in_thread(await asyncio.to_thread(lambda: iter(pieces(llm, draft))))


def _messages(draft: Draft) -> list[ChatMessage]:
    system, user = draft.messages
    return [ChatMessage(role=MessageRole.SYSTEM, content=system), ChatMessage(role=MessageRole.USER, content=user)]
