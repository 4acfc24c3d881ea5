"""Failures made small, and written as code."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest

from funcnet.check.shrink import TRIES, as_code, smallest
from funcnet.check.spec import Spec, parse


def sizes(tree):
    return [leaf.sizes if isinstance(leaf, Spec) else leaf.shape for leaf in tree]


def test_axes_of_one_size_shrink_together_to_the_smallest_that_fails():
    tree = [parse("f32[8,5]"), parse("f32[5,8]"), np.zeros((8,))]
    assert sizes(smallest(tree, lambda tree: True)) == [(1, 1), (1, 1), (1,)]
    assert sizes(smallest(tree, lambda tree: False)) == [(8, 5), (5, 8), (8,)]
    assert sizes(smallest(tree, lambda tree: tree[0].sizes[1] >= 2)) == [(1, 2), (2, 1), (1,)]
    assert sizes(smallest(tree, lambda tree: tree[0].sizes[0] >= 4)) == [(4, 1), (1, 4), (4,)]
    assert sizes(smallest(tree, lambda tree: tree[0].sizes[0] > 4)) == [(8, 1), (1, 8), (8,)]


def test_the_largest_axis_shrinks_first_and_the_next_is_tried_on_what_is_left():
    seen = []
    smallest([parse("f32[3,6]")], lambda tree: seen.append(tree[0].sizes) or tree[0].sizes == (3, 2))
    assert seen == [(3, 1), (3, 2), (1, 2), (2, 2)]


def test_sizes_that_the_function_does_not_take_are_passed_over():
    def fails(tree):
        if tree[0].sizes[0] % 2:
            raise ValueError("an even size")
        return True

    assert sizes(smallest([parse("f32[6]")], fails)) == [(2,)]


def test_it_gives_up_after_some_tries():
    count = []
    tree = [parse(f"f32[{size}]") for size in range(11, 31)]
    smallest(tree, lambda tree: bool(count.append(1)))
    assert len(count) == TRIES


class Pair(NamedTuple):
    first: object
    rest: object


@dataclass
class Record:
    x: object
    made: object = field(default=None, init=False)


def test_the_line_that_shows_a_failure_again_makes_the_tree_that_was_given():
    tree = {"a": Pair(parse("f32[2]"), [Record(parse("i32[3]<4"))]), "b": (np.zeros((2, 3)),)}
    text = as_code(tree, "x")
    assert text == """{'a': Pair(first="f32[2]", rest=[Record(x="i32[3]<4")]), 'b': (x['b'][0][:2, :3],)}"""
    again = eval(text, {"Pair": Pair, "Record": Record, "x": tree})
    assert again["a"] == Pair("f32[2]", [Record("i32[3]<4")])
    assert again["b"][0].shape == (2, 3)


A = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (parse("bf16[2,3]"), '"bf16[2,3]"'),
        (A, "x[:2, :3]"),
        (np.float32(3), "x"),
        (2.0, "x"),
        (None, "x"),
        ((), "()"),
        ([], "[]"),
        ((A,), "(x[0][:2, :3],)"),
        ((A, None), "(x[0][:2, :3], x[1])"),
        ([A], "[x[0][:2, :3]]"),
        ({}, "{}"),
        ({"a": A, 3: A}, "{'a': x['a'][:2, :3], 3: x[3][:2, :3]}"),
        (OrderedDict(a=parse("f32[1]")), """{'a': "f32[1]"}"""),
        (Pair(A, None), "Pair(first=x.first[:2, :3], rest=x.rest)"),
        (Record(A), "Record(x=x.x[:2, :3])"),
    ],
)
def test_every_kind_of_tree_is_code_that_makes_it(tree, text):
    assert as_code(tree, "x") == text
    eval(text, {"Pair": Pair, "Record": Record, "x": tree})
