"""Right rules at many points are not refused."""

from tests.check.false_alarms import tally


def test_a_right_rule_is_told_from_one_that_is_off():
    found = tally("rms_norm", "float64", 3)
    assert not found.alarms
    assert all(len(ratios) == 3 and max(ratios) < 1 for ratios in found.ratios.values())
    assert all(largest < 1e-11 for largest, _ in found.caught.values())
