"""What a measurement ran on, to be kept beside its numbers."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("gemma-rag", "torch", "sentence-transformers", "transformers", "numpy", "bm25s", "rjieba")


def environment() -> dict[str, Any]:
    """Command, hardware and versions, as plain JSON."""
    script = Path(sys.argv[0])
    words = [f"{script.parent.name}/{script.name}", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    return {
        "command": f"python {shlex.join(words)}",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
