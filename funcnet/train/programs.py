"""Compiled programs, kept from one call of `fit` or `evaluate` to the next."""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from funcnet.train.objective import Objective

PROGRAMS = 8  # of one objective
_programs: weakref.WeakKeyDictionary[Objective, Callable] = weakref.WeakKeyDictionary()


def compiled(make: Callable[..., Any], objective: Objective, *options: Any) -> Any:
    """`make(objective, *options)`, cached for an objective's last `PROGRAMS` such calls, and freed with the objective.

    What is cached holds the objective by a weak reference: otherwise the cache would keep it alive. For an optimizer
    that cannot be hashed the program is made anew in each call.
    """
    try:
        hash(options)
    except TypeError:
        return make(objective, *options)
    if objective not in _programs:
        own = weakref.proxy(objective)
        _programs[objective] = lru_cache(PROGRAMS)(lambda make, *options: make(own, *options))
    return _programs[objective](make, *options)
