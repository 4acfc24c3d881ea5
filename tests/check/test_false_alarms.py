"""Right rules at many points are not refused."""

import pytest

from funcnet.check.cases import DTYPES
from tests.check.false_alarms import OURS, summary, tallies, tally


def test_a_right_rule_is_told_from_one_that_is_off():
    found = tally("rms_norm", "float64", 3)
    assert not found.alarms
    assert all(len(ratios) == 3 and max(ratios) < 1 for ratios in found.ratios.values())
    assert all(largest < 1e-11 for largest, _ in found.caught.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_rules_are_not_refused(dtype):
    found = tallies(list(OURS), [dtype], seeds=20, processes=2)
    alarms = [f"{each.case}, seed {seed}: {failure}" for each in found for seed, failure in each.alarms]
    assert not alarms, "\n".join(alarms)
    print(summary(found))
