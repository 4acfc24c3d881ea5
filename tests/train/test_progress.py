"""Plain lines without a terminal, a bar with one."""

import sys

from funcnet.train.progress import progress

RECORD = {"step": 2, "loss": 0.5}


def run(last=3):
    with progress(0, last) as report:
        for step in range(1, last + 1):
            report(step, RECORD if step == 2 else None)


def test_lines_for_records_only(capsys):
    run()
    assert capsys.readouterr().out == "step 2/3  loss 0.5\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    run()
    out = capsys.readouterr().out
    assert "3/3" in out
    assert "loss 0.5" in out


def test_lines_on_a_terminal_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    run()
    assert capsys.readouterr().out == "step 2/3  loss 0.5\n"


def test_another_word_and_another_stream(capsys):
    with progress(0, 9, "check", sys.stderr) as report:
        report(7, {"wrong": 1})
    assert capsys.readouterr() == ("", "check 7/9  wrong 1\n")
