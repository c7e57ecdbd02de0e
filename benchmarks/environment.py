"""What a measurement ran on, to be kept beside its numbers."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "gemma-rag",
    "torch",
    "sentence-transformers",
    "transformers",
    "openvino",
    "onnxruntime",
    "numpy",
    "bm25s",
    "rjieba",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast a CPU multiplies small numbers."""


def environment() -> dict[str, Any]:
    """Command, hardware and versions, as plain JSON."""
    script = Path(sys.argv[0])
    words = [f"{script.parent.name}/{script.name}", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    return {
        "command": f"python {shlex.join(words)}",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "instructions": instructions()},
        "versions": {"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}},
    }


def instructions() -> list[str]:
    """Those of `INSTRUCTIONS` that this CPU has, where the system says so (Linux)."""
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.is_file() else set()
    return [name for name in INSTRUCTIONS if name in words]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
