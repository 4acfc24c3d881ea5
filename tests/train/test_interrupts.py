"""Ctrl-C at any moment leaves a train state to go on with."""

import os
import signal
import threading
import time

import jax
import pytest

import funcnet as fn
from tests.train.small import OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, also where a shell has started the tests with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)  # the signal is looked for here, and Python drops what it raises


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_heard_after_the_step(interruptible):
    def interrupting():
        for i, batch in enumerate(batches()):
            if i == 3:
                Finalised()
            yield batch

    with pytest.raises(KeyboardInterrupt) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), interrupting(), 1000)
    assert int(caught.value.train_state.step) == 4


@pytest.mark.parametrize("delay", [0.0005 * i for i in range(12)])
def test_ctrl_c_at_any_moment_leaves_a_state_to_go_on_with(delay, interruptible):
    def interrupting():
        for i, batch in enumerate(batches()):
            if i == 3:
                threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            yield batch

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), interrupting(), 100_000)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(caught.value.train_state))
    _, (record,) = fn.fit(OBJECTIVE, OPTIMIZER, caught.value.train_state, batches(), 1)
    assert record["step"] >= 4
