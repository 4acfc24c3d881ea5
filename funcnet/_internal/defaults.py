"""Functions as default arguments, which `help` shows by name where Python would print an address."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array
from jax.nn import initializers

Initializer = Callable[..., Array]


@dataclass(frozen=True)
class Default:
    """A function whose `repr` is `text`."""

    function: Callable
    text: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return self.text


ZEROS = Default(initializers.zeros, "zeros")
LECUN_NORMAL = Default(initializers.lecun_normal(), "lecun_normal()")
HE_NORMAL = Default(initializers.he_normal(), "he_normal()")
ORTHOGONAL = Default(initializers.orthogonal(), "orthogonal()")
