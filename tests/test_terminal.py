"""What people see while something is going on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gemma_rag.bulk import Progress
from gemma_rag.terminal import Terminal


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def seen(request) -> str:
    """What half of an indexing run writes on standard error."""
    show, text = Terminal(), io.StringIO()
    show._notes = Console(file=text, force_terminal=request.param, width=100)
    with show.progress() as on_progress:
        on_progress(Progress(done=1500, share=0.25, embedded=500))
        on_progress(Progress(done=3000, share=0.5, embedded=2000))
    return text.getvalue()


def test_progress_is_shown_on_a_terminal_only(seen, request):
    on_terminal = request.node.callspec.id == "terminal"
    assert ("3,000 documents" in seen) is on_terminal
    assert ("50%" in seen) is on_terminal
