"""What a command line names, and the line that says it again."""

import shlex
import sys
from types import ModuleType

import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.errors import InputError
from funcnet.check.named import again, arguments, function_or_layer, named, nearest

LAYER = fn.dense(2)


class Callables:
    """Names of every kind."""

    layer = LAYER
    make = staticmethod(lambda: LAYER)
    make_with_defaults = staticmethod(lambda features=2: LAYER)
    takes_any = staticmethod(lambda *features: LAYER)
    needs = staticmethod(lambda features: LAYER)
    function = staticmethod(lambda x=3.0: 2 * x)
    args = staticmethod(lambda: (np.ones(2), 3))
    a_list = staticmethod(lambda: [np.ones(2)])
    number = 3
    builtin = dict

    @staticmethod
    def breaks():
        raise RuntimeError("broken")

    @staticmethod
    def breaks_with_defaults(x=1):
        raise RuntimeError("broken")


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """A module with those names, and more below one of them."""
    made = ModuleType("of_names")
    made.inner = Callables
    for name in vars(Callables):
        if not name.startswith("__"):
            setattr(made, name, getattr(Callables, name))
    monkeypatch.setitem(sys.modules, "of_names", made)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_name_is_looked_up_in_its_module_and_below():
    assert named("of_names:layer") is LAYER
    assert named("of_names:inner.layer") is LAYER
    assert named("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize("text", ["of_names", "of_names:", ":layer", "", "of_names.layer"])
def test_half_a_name_is_refused(text):
    with pytest.raises(InputError, match=r"package\.module:name"):
        named(text)


def test_a_module_or_name_that_is_none_is_refused_with_what_is_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match="No module named 'of_no_names'"):
        named("of_no_names:f")
    with pytest.raises(InputError, match="SystemExit: 3") as error:
        named("leaves_at_once:f")
    assert 'run "import leaves_at_once" in Python' in error.value.remedy
    with pytest.raises(InputError, match="a name in of_names") as error:
        named("of_names:layr")
    assert error.value.remedy.startswith("did you mean 'layer'")
    with pytest.raises(InputError):
        named("of_names:inner.none")


@pytest.mark.parametrize("name", ["layer", "make", "make_with_defaults"])
def test_a_layer_is_itself_or_what_is_made_without_arguments(name):
    assert function_or_layer(f"of_names:{name}") is LAYER


@pytest.mark.parametrize("name", ["needs", "takes_any", "function", "builtin", "breaks_with_defaults"])
def test_what_makes_no_layer_is_a_function(name):
    assert function_or_layer(f"of_names:{name}") is getattr(Callables, name)


def test_what_is_neither_is_refused_and_an_error_of_its_own_is_raised():
    with pytest.raises(InputError, match="a function or a layer"):
        function_or_layer("of_names:number")
    with pytest.raises(RuntimeError, match="broken"):
        function_or_layer("of_names:breaks")


def test_arguments_are_the_texts_or_what_is_made():
    assert arguments(["f32[2]", "key"], None) == ("f32[2]", "key")
    assert arguments([], None) == ()
    assert arguments([], "of_names:args")[1] == 3
    with pytest.raises(InputError, match="leave one of them out"):
        arguments(["f32[2]"], "of_names:args")
    with pytest.raises(InputError, match="a tuple of arguments") as error:
        arguments([], "of_names:a_list")
    assert error.value.remedy == "return (x,) for one argument"


def test_the_line_again_has_the_flags_that_are_not_empty():
    line = again("m:f", arg=["f32[2]<5", "key"], x64=True, dtype=None, json=False, seed=0, oracle=("algebra",))
    assert line == "python -m funcnet check m:f --arg 'f32[2]<5' --arg key --x64 --seed 0 --oracle algebra"
    assert shlex.split(again("a case/with blanks"))[-1] == "a case/with blanks"
    assert again("m:f", arg=[], dtype="") == "python -m funcnet check m:f --dtype ''"


def test_a_remedy_names_what_is_near_or_all_there_is():
    known = ["dense", "dense", "dropout", "conv"]
    assert nearest("dens", known) == "did you mean 'dense'?"
    assert nearest("drop", known) == "did you mean 'dropout'?"
    assert nearest("zzz", known) == "name one of conv, dense, dropout"
