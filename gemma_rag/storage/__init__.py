"""Documents, vectors and a manifest on disk, safe against a kill at any moment."""

from __future__ import annotations

from gemma_rag.storage.manifest import Manifest
from gemma_rag.storage.reader import Snapshot, StoredCategory
from gemma_rag.storage.store import Entry, Store

__all__ = ["Entry", "Manifest", "Snapshot", "Store", "StoredCategory"]
