import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_the_first_example_has_twelve_lines_at_most():
    assert len(BLOCKS[0].splitlines()) <= 12


def test_the_first_example_answers_with_a_citation_and_refuses(capsys):
    answer, refusal = run(BLOCKS[0], capsys).splitlines()
    assert answer.startswith("“Install the client, then sign in with your card.” [1] [{'number': 1, 'id': 'vpn'")
    assert refusal.startswith("I don't know.")


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_second_example_finds_its_node(block, capsys):
    assert run(block, capsys).startswith("VPN 0.")
