"""Every wrong rule is refused, blamed on its leaves and no others, and named; every right one passes."""

import pytest

from tests.check.wrong_rules import RIGHT, WRONG

by_name = pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)


def assert_blamed_and_named(wrong, report):
    assert not report.ok
    assert {failure.leaf for failure in report.failures} == wrong.blamed
    assert {leaf.leaf for leaf in report.leaves if not leaf.ok} <= wrong.blamed
    diagnoses = {leaf.leaf: leaf.diagnosis for leaf in report.leaves if leaf.diagnosis}
    assert diagnoses.keys() <= wrong.blamed
    if wrong.says:
        assert wrong.says in "\n".join([*diagnoses.values(), *(failure.message for failure in report.failures)])
    else:
        assert not diagnoses


@by_name
def test_the_oracle_finds_it_and_the_diagnosis_names_it(wrong):
    assert_blamed_and_named(wrong, wrong.check(oracles=(wrong.oracle,)))


@pytest.mark.slow
@by_name
def test_no_other_oracle_blames_another_leaf(wrong):
    assert_blamed_and_named(wrong, wrong.check())


@pytest.mark.slow
@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_the_right_rule_beside_it_passes(right):
    right.check(right.rule).raise_for_failure()


def test_there_are_many_of_them_and_most_are_named():
    assert len({wrong.name for wrong in WRONG}) == len(WRONG) >= 80
    assert sum(bool(wrong.says) for wrong in WRONG) >= len(WRONG) * 2 / 3
