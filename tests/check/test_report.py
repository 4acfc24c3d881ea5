"""The report: as text, JSON, Markdown and a picture."""

import json

import numpy as np
import pytest

import funcnet as fn
from funcnet.check.judge import Leaf

KERNEL = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
WANTED = {"kernel": KERNEL, "bias": KERNEL[0]}
GOT = {"kernel": KERNEL, "bias": -KERNEL[0]}


def a_report(**options):
    found = fn.compare_grads(GOT, WANTED)
    fields = {"title": "title", "leaves": found.leaves, "failures": found.failures, "arrays": found.arrays}
    return fn.Report(**{**fields, **options})


def test_the_text_has_a_table_what_is_wrong_notes_and_the_line_that_shows_it_again():
    lines = str(a_report(notes=("custom rules: none",), repeat="fn.check_vjp(f)")).splitlines()
    assert lines[0] == "title"
    assert lines[1].split()[:3] == ["leaf", "type", "scale"]
    assert lines[3].startswith("['bias']")
    assert lines[4].startswith("['kernel']")
    marks = [line.split()[0] for line in lines[5:-1]]
    assert marks == ["WRONG", "LIKELY", "note", "again"]
    assert lines[-1] == "1 of 2 leaves wrong: ['bias']"


def test_columns_line_up():
    table = str(a_report()).splitlines()[1:5]
    start = table[0].index("worst at")
    assert all(line[start - 2 : start] in ("  ", "--") for line in table)
    assert all(line[start] != " " for line in table)


def test_json_is_whole_and_has_no_number_that_json_has_not():
    got = {"kernel": KERNEL, "bias": np.float32([np.nan, np.inf, 1, 2])}
    report = fn.compare_grads(got, WANTED)
    text = report.to_json()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read["ok"] is False
    assert [leaf["leaf"] for leaf in read["leaves"]] == ["['bias']", "['kernel']"]
    assert [leaf["ok"] for leaf in read["leaves"]] == [False, True]
    assert read["failures"][0]["kind"] == "not finite"
    assert read["failures"][0]["got"] == "nan"
    assert set(read) == {"title", "ok", "leaves", "failures", "notes", "oracles", "repeat"}


def test_markdown_has_a_row_a_leaf():
    text = a_report(notes=("a | b",)).to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert "- WRONG" in text


def test_what_is_wrong_beside_the_leaves_is_in_the_summary():
    failure = fn.Failure("", "laws", "apply", "apply differs from fwd")
    assert a_report(leaves=(), failures=(failure,)).summary == "wrong: apply"
    assert "apply differs from fwd (laws, apply)" in str(a_report(failures=(failure,)))
    assert a_report(failures=()).ok


@pytest.mark.parametrize(
    ("leaves", "oracles", "words"),
    [
        ((), (), "nothing was compared: there is no gradient"),
        ((), ("autodiff", "laws"), "there is no gradient; the rest holds, judged by laws"),
        ([{}], (), "the one leaf holds"),
        ([{}, {}], (), "all 2 leaves hold"),
        ([{"autodiff": "ok"}], ("autodiff", "residuals"), "the one leaf holds, judged by autodiff, residuals"),
        (
            [{"autodiff": "-", "algebra": "ok"}, {"autodiff": "-", "algebra": "-"}],
            ("autodiff", "algebra"),
            "all 2 leaves hold, judged by algebra",
        ),
        ([{"autodiff": "-"}], ("autodiff",), "nothing was compared: no oracle could tell"),
    ],
)
def test_what_holds_is_counted_before_the_oracles_that_could_tell(leaves, oracles, words):
    leaves = tuple(Leaf(f"[{i}]", verdicts=verdicts) for i, verdicts in enumerate(leaves))
    assert fn.Report("", leaves, oracles=oracles).summary == words


def test_a_picture_of_the_worst_leaf_or_of_the_one_named(tmp_path):
    report = fn.compare_grads(GOT, WANTED)
    report.plot(tmp_path / "worst.png")
    report.plot(tmp_path / "kernel.png", "['kernel']")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("worst.png", "kernel.png"))
    with pytest.raises(fn.InputError, match="one of the leaves"):
        report.plot(tmp_path / "none.png", "['other']")
    with pytest.raises(fn.InputError, match="one of the leaves"):
        fn.Report("empty").plot(tmp_path / "none.png")


def test_leaves_sort_wrong_before_right_and_by_error_over_what_is_allowed():
    right, wrong = {"autodiff": "ok"}, {"autodiff": "ok", "numerical": "WRONG"}
    leaves = [
        Leaf("a", relative=1e-3, allowed=1e-2, verdicts=right),
        Leaf("b", relative=1e-3, allowed=1e-5, verdicts=right),
        Leaf("c", relative=1e-9, allowed=1e-5, verdicts=wrong),
    ]
    assert [leaf.leaf for leaf in sorted(leaves, key=Leaf.badness)] == ["c", "b", "a"]
