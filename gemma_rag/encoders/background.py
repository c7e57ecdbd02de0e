"""The event loop in a thread of its own on which every connection of this process lives.

Callers from any thread, and from any event loop of theirs, share it: one pool of connections, one bound on how many work.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from typing import Any, Protocol


class Client(Protocol):
    """What is closed on the loop: an `httpx.AsyncClient`."""

    async def aclose(self) -> None:
        """Close every connection."""
        ...


class Closable(Protocol):
    """What holds a client."""

    def close(self) -> None:
        """Close it, and come back when that is done."""
        ...


class Background:
    """The event loop of this process, in a thread of its own, from the first request on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop; started with the first call."""
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                self.thread = threading.Thread(target=self.loop.run_forever, name="gemma-rag requests", daemon=True)
                self.thread.start()
            return self.loop

    def is_own(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a loop is this process's one, and runs."""
        return loop is self.loop and loop.is_running()

    def forget(self) -> None:
        """Start anew: in a process that was forked, whose parent alone has the thread, and may have held the lock."""
        self.lock, self.loop, self.thread = threading.Lock(), None, None

    def stop(self) -> None:
        """End what still runs and close all connections, so that nothing is left to warn of when Python ends."""
        loop, thread = self.loop, self.thread
        if loop is None or thread is None or not self.is_own(loop):
            return
        for user in list(users):
            user.close()
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout=5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()
        self.forget()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


background = Background()
users: weakref.WeakSet[Closable] = weakref.WeakSet()
"""Whoever may still hold a client when Python ends."""
_of_another_process: list[Any] = []  # clients that came over a fork: their sockets are the parent's to close


def close_client(loop: asyncio.AbstractEventLoop, client: Client, wait: bool = False) -> None:
    """Close a client on its loop."""
    if not background.is_own(loop):
        _of_another_process.append(client)
        return
    future = asyncio.run_coroutine_threadsafe(client.aclose(), loop)
    if wait:
        with contextlib.suppress(Exception):  # it was to be left anyway
            future.result(timeout=5)


atexit.register(background.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=background.forget)
