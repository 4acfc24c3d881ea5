"""A pytest plugin: the fixture `check_grads` and the option `--grad-seed`.

It is a module beside the package, not inside it: importing anything of funcnet imports JAX, and pytest imports its
plugins in every test suite. So funcnet is imported only by the first test that checks something.
"""

import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from funcnet import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "seed of everything that check_grads draws, where a test gives none (0)"
    parser.getgroup("funcnet").addoption("--grad-seed", type=int, default=0, metavar="N", help=text)


@pytest.fixture(scope="session")
def check_grads(pytestconfig: pytest.Config) -> Callable[..., "Report"]:
    """check_grads(f, *args, **options) fails the test, with the report, unless the gradients of f hold.

    A function is passed to `fn.check_vjp`; a layer to `fn.check_layer`, several arguments as one tuple. The options are
    those of the function called. Returns the report.
    """
    seed: Any = pytestconfig.getoption("grad_seed")

    def check(f: Any, *args: Any, **options: Any) -> "Report":
        __tracebackhide__ = True
        report, complaint = _report(f, args, {"seed": seed, **options})
        if report is None:
            pytest.fail(f"check_grads cannot tell: {complaint}")
        if not report.ok:
            pytest.fail(f"{report}\n\nthis test again: {_again(None if 'seed' in options else seed)}")
        return report

    return check


def _report(f: Any, args: tuple, options: dict[str, Any]) -> tuple["Report | None", str]:
    from funcnet import InputError, Layer, check_layer, check_vjp

    try:
        if isinstance(f, Layer):
            return check_layer(f, args[0] if len(args) == 1 else args, **options), ""
        return check_vjp(f, *args, **options), ""
    except InputError as error:  # no traceback through the checker: the error says what is wrong with the call
        return None, str(error)


def _again(seed: int | None) -> str:
    """The command that runs the current test again, with a seed where the test gives none itself."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return shlex.join(["pytest", test, *([] if seed is None else ["--grad-seed", str(seed)])])
