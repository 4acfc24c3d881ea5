"""The README's code runs, in order, prints what it shows, and is as short as it should be."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_code_runs_and_prints_the_report(capsys, standard_promotion):
    namespace: dict = {}
    for block in CODE:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    [report] = [text for language, text in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if not language]
    # Last digits may differ, and by them which element is worst.
    words = lambda text: re.findall(r"[^\d\s.e+-][^\s]*", re.sub(r"\d+", "0", text))
    assert "'loss': 0.0" in printed
    assert "\nTrue\n" in printed
    assert words(printed[printed.index("rms: ") :]) == words(report)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    train, norms, layer, _ = (len([line for line in block.splitlines() if line.strip()]) for block in CODE)
    assert (train <= 16, norms <= 5, layer <= 10) == (True,) * 3


@pytest.mark.parametrize("command", ["examples/digits.py", "pytest -n auto"])
def test_the_two_commands_stand_on_a_line_each(command):
    assert re.search(rf'```sh\npython -m pip install -e "\.\[\w+\]" && python .*{command}\n```', TEXT)


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)(.+?)\)", TEXT):
        assert (Path(__file__).parents[1] / link).exists(), link
