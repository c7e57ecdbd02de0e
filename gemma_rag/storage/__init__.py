"""Documents, vectors and a manifest on disk, safe against a kill at any moment."""

from __future__ import annotations

from gemma_rag.storage.base import Entry, KnowledgeStore, StoredCategory
from gemma_rag.storage.manifest import EngineAddress, Manifest
from gemma_rag.storage.reader import Snapshot
from gemma_rag.storage.store import Store

__all__ = ["EngineAddress", "Entry", "KnowledgeStore", "Manifest", "Snapshot", "Store", "StoredCategory"]
