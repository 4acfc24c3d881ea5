"""The pytest plugin, in suites of its own."""

import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = str(Path(__file__).parents[2])
TESTS = """
    import jax.numpy as jnp
    import funcnet as fn
    from dataclasses import replace

    dense = fn.dense(2)

    def bwd(params, x, dy, contract=fn.total):
        return dense.bwd(params, x, 2 * dy, contract)

    def test_function(check_grads):
        assert check_grads(jnp.sin, "f32[3]").leaves[0].leaf == "[0]"

    def test_loss(check_grads):
        assert check_grads(fn.mse(), "f32[3]", "f32[3]", oracles=("autodiff",)).ok

    def test_wrong(check_grads):
        check_grads(replace(dense, bwd=bwd), "f32[4,5]", oracles=("autodiff",))

    def test_wrong_with_a_seed(check_grads):
        check_grads(replace(dense, bwd=bwd), "f32[4,5]", seed=5, oracles=("autodiff",), shrink=False)

    def test_bad_input(check_grads):
        check_grads(jnp.sin, "f32(3)")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest with this plugin alone, in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return lambda *words: pytester.runpytest_subprocess("-p", "funcnet_pytest", *words)


def test_a_suite_that_does_not_use_it_never_imports_jax(pytester, run):
    pytester.makepyfile("""
        import sys

        def test_modules():
            assert not {"jax", "numpy", "funcnet"} & set(sys.modules)
    """)
    run().assert_outcomes(passed=1)


def test_right_rules_pass_and_wrong_ones_fail_with_the_report(pytester, run):
    pytester.makepyfile(TESTS)
    result = run("--grad-seed", "3")
    result.assert_outcomes(passed=2, failed=3)
    text = result.stdout.str()
    assert "dense: its bwd against its fwd, float64, seed 3" in text
    assert "LIKELY params['bias']: twice the gradient" in text
    assert "--grad-seed 3" in text.split("::test_wrong", 1)[1].splitlines()[0]
    assert "float64, seed 5" in text
    assert 'expected  an array like "f32[8,16]"' in text
    assert "checker.py" not in text  # no traceback through funcnet


def test_the_option_is_explained(run):
    assert "--grad-seed" in run("--help").stdout.str()


def test_the_plugin_is_the_entry_point():
    project = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"funcnet_pytest": "funcnet_pytest"}
    assert "funcnet_pytest.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
