"""Servers of vector databases, one of each for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .servers import serving, why_not


@pytest.fixture(scope="session")
def chroma_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Chroma server; tests that use it are marked ``allow_hosts(["127.0.0.1"])``."""
    if reason := why_not("chroma"):
        pytest.skip(reason)
    with serving("chroma", tmp_path_factory.mktemp("chroma")) as server:
        yield server.url


@pytest.fixture(scope="session")
def milvus_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Milvus server over TCP; tests that use it are marked ``allow_hosts(["127.0.0.1"])``."""
    if reason := why_not("milvus"):
        pytest.skip(reason)
    with serving("milvus", tmp_path_factory.mktemp("milvus")) as server:
        yield server.url
