"""The README's code runs, in order, and its tables are what the code prints."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_code_runs_and_prints_the_tables(capsys, standard_promotion):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    tables = [text for language, text in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if not language]
    assert len(tables) == 3
    words = re.compile(r"[^\d\s.e+-][^\s]*")  # numbers may differ in their last digits
    shown = words.findall("".join(tables))
    assert sorted(words.findall(printed[printed.index("1. forward") :])) == sorted(
        shown
    )  # right leaves sort by rounding
    assert "'loss': 0.0" in printed


def test_the_example_has_twenty_lines_or_so():
    first = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("command", ["examples/digits.py", "pytest -n auto"])
def test_the_two_commands_stand_on_a_line_each(command):
    assert re.search(rf'```sh\npython -m pip install -e "\.\[\w+\]" && python .*{command}\n```', TEXT)
