"""The table's checks: which are chosen, in what order they come back, and what is said of them."""

import json
import os
from types import SimpleNamespace

import pytest

from funcnet._internal.errors import InputError
from funcnet.check import table
from funcnet.check.judge import Leaf
from funcnet.check.report import Failure, Report
from funcnet.check.spec import parse
from funcnet.check.table import Check, Outcome, run, selected

RIGHT = Leaf("x", (2,), "float32", 1.0, 1e-8, 1e-8, 1e-6, verdicts={"autodiff": "ok"})
NEAR = Leaf("params['w']", (2,), "float32", 1.0, 9e-7, 9e-7, 1e-6, verdicts={"autodiff": "ok"})
BAD = Leaf("x", (2,), "float32", 1.0, 0.5, 0.5, 1e-6, verdicts={"autodiff": "WRONG"})
HOLDS = Report("", (NEAR, RIGHT))
FAILS = Report("", (BAD, RIGHT), (Failure("x", "autodiff", "value", "is wrong"),), smallest={"x": parse("f32[1]")})


class Case(SimpleNamespace):
    """What the table needs of a case; it answers with a report of its own."""

    def check(self, dtype, **options):
        self.asked.append((dtype, options))
        if isinstance(self.report, Exception):
            raise self.report
        return self.report


def case(name, report=HOLDS, dtypes=("float32", "float64")):
    return Case(name=name, constructor=name.split("/")[0], report=report, dtypes=dtypes, x=parse("f32[8]"), asked=[])


@pytest.fixture
def cases(monkeypatch):
    """Puts other cases in the place of the table's."""

    def put(*cases):
        monkeypatch.setattr(table, "CASES", cases)
        return cases

    return put


def test_cases_are_chosen_by_how_their_names_begin(cases):
    cases(case("dense"), case("dense/no bias"), case("conv"))
    assert selected([]) == [0, 1, 2]
    assert selected(["dense"]) == [0, 1]
    assert selected(["conv", "dense/"]) == [1, 2]
    with pytest.raises(InputError, match="a case of the table") as error:
        selected(["conv", "dens/e"])
    assert (error.value.received, error.value.remedy.split("'")[1]) == ("'dens/e'", "dense")


def test_every_dtype_is_checked_in_order_and_options_are_handed_on(cases, capsys):
    dense, _ = cases(case("dense"), case("conv", FAILS, ("float16",)))
    outcome = run([1, 0], "", 1, {"seed": 3})
    done = [(check.name, check.dtype) for check in outcome.checks]
    assert done == [("conv", "float16"), ("dense", "float32"), ("dense", "float64")]
    assert dense.asked == [("float32", {"seed": 3}), ("float64", {"seed": 3})]
    assert (outcome.ok, outcome.wrong) == (False, [outcome.checks[0]])
    failed = outcome.checks[0].report
    assert failed.title == "conv, float16, seed 3"
    assert failed.repeat == "python -m funcnet check conv --arg 'f32[1]' --dtype float16 --seed 3"
    assert outcome.checks[1].report.repeat == ""
    assert capsys.readouterr().err.splitlines()[-1] == "check 3/3  wrong 1"


def test_checks_come_back_in_the_table_s_order_however_they_are_done(cases, monkeypatch):
    cases(case("dense"), case("conv"))
    made = [Check(i, dtype, HOLDS, 0.0) for i in (0, 1) for dtype in ("float32", "float64")]
    monkeypatch.setattr(table, "_results", lambda futures: iter(made[::-1]))
    pool = SimpleNamespace(submit=lambda *_: None, shutdown=lambda **_: None)
    monkeypatch.setattr(table, "ProcessPoolExecutor", lambda *_: pool)
    assert list(run([0, 1], "", 2, {}).checks) == made


def test_one_dtype_alone_can_be_asked_for(cases):
    dense, _ = cases(case("dense"), case("conv", dtypes=("float16",)))
    assert [check.name for check in run([0, 1], "float64", 1, {}).checks] == ["dense"]
    assert dense.asked == [("float64", {})]
    with pytest.raises(InputError, match="cases that are checked in bfloat16"):
        run([0, 1], "bfloat16", 1, {})


def test_a_check_that_raises_is_a_failure_like_another(cases):
    cases(case("dense", ZeroDivisionError("by zero"), ("float32",)))
    (check,) = run([0], "", 1, {"oracles": ("algebra", "laws")}).checks
    (failure,) = check.report.failures
    assert (failure.kind, failure.message) == ("error", "the check itself raises ZeroDivisionError: by zero")
    assert check.report.repeat.endswith("check dense --arg 'f32[8]' --dtype float32 --oracle algebra --oracle laws")


def test_jax_s_caches_are_cleared_now_and_then(cases, monkeypatch):
    cleared = []
    monkeypatch.setattr(table.jax, "clear_caches", lambda: cleared.append(1))
    cases(case("dense", dtypes=("float32",) * (2 * table.CLEARED)))
    run([0], "", 1, {})
    assert len(cleared) == 2


OUTCOME = Outcome((Check(0, "float32", HOLDS, 1.0), Check(1, "float16", FAILS, 2.0)), 4.4)


def test_the_summary_counts_rules_cases_checks_and_leaves(cases):
    cases(case("dense"), case("dense/no bias"))
    assert OUTCOME.summary == "1 rule, 2 cases, 2 checks in 4 s: 3 of 4 leaves hold; wrong: dense/no bias (float16)"
    good = Outcome((OUTCOME.checks[0],), 0.4)
    assert good.summary == "1 rule, 1 case, 1 check in 0 s: all 2 leaves hold"


def test_the_leaves_nearest_to_what_is_allowed_come_first(cases):
    cases(case("dense"), case("conv"))
    assert str(OUTCOME).splitlines()[-6:] == [
        "nearest to what is allowed:",
        "  conv (float16)   x            5.0e-01 of 1.0e-06",
        "  dense (float32)  params['w']  9.0e-07 of 1.0e-06",
        "  dense (float32)  x            1.0e-08 of 1.0e-06",
        "  conv (float16)   x            1.0e-08 of 1.0e-06",
        OUTCOME.summary,
    ]
    many = Outcome((Check(0, "float32", Report("", (RIGHT,) * 9), 0.0),), 0.0)
    assert len(many.worst()) == table.WORST
    assert Outcome((Check(0, "float32", Report("", (Leaf("not compared"),)), 0.0),), 0.0).worst() == []


def test_markdown_and_json_have_every_wrong_report_and_every_check(cases):
    cases(case("dense"), case("conv"))
    text = OUTCOME.to_markdown()
    assert "- WRONG  x: is wrong (autodiff, value)" in text
    assert "| dense | float32 | params['w'] | 9.0e-07 | 1.0e-06 |" in text
    read = json.loads(OUTCOME.to_json())
    assert (read["ok"], read["seconds"], read["summary"]) == (False, 4.4, OUTCOME.summary)
    checks = [(each["case"], each["dtype"], each["seconds"], each["ok"]) for each in read["checks"]]
    assert checks == [("dense", "float32", 1.0, True), ("conv", "float16", 2.0, False)]


def test_there_are_as_many_processes_as_cores_and_one_with_an_accelerator(monkeypatch):
    monkeypatch.setattr(table.jax, "default_backend", lambda: "cpu")
    for cores, wanted in ((3, 3), (100, table.MOST_JOBS), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert table._cores() == wanted
    monkeypatch.setattr(table.jax, "default_backend", lambda: "gpu")
    assert table._cores() == 1
