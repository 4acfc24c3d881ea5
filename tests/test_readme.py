"""The README's code runs, in order, and its tables are what the code prints."""

import re
from pathlib import Path

import pytest

import funcnet as fn

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_code_runs_and_prints_the_tables(capsys, standard_promotion):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    tables = [text for language, text in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if not language]
    assert len(tables) == 3
    # Last digits may differ, and by them which element is worst, and the order of leaves that are right.
    words = lambda text: sorted(re.findall(r"[^\d\s.e+-][^\s]*", re.sub(r"\d+", "0", text)))
    assert words(printed[printed.index("1. forward") :]) == words("".join(tables))
    assert "'loss': 0.0" in printed


def test_the_example_has_twenty_lines_or_so():
    first = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("command", ["examples/digits.py", "pytest -n auto"])
def test_the_two_commands_stand_on_a_line_each(command):
    assert re.search(rf'```sh\npython -m pip install -e "\.\[\w+\]" && python .*{command}\n```', TEXT)


def test_every_public_name_stands_in_it():
    assert [name for name in fn.__all__ if not re.search(rf"\b{name}\b", TEXT)] == []
