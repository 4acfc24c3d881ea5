"""The lecture page's code runs, in order, and each block prints what the page says."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "lecture.md"
TEXT = PAGE.read_text()
CODE = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)  # a block and, if any, its output


def run(blocks):
    """What each block prints, all of them run in one namespace."""
    namespace: dict = {"__name__": "lecture"}
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, PAGE.name, "exec"), namespace)
        yield out.getvalue()


@pytest.fixture
def as_a_reader(standard_promotion, tmp_path, monkeypatch):
    """An empty folder to write into, and the page's own setting of x64 undone at the end."""
    monkeypatch.chdir(tmp_path)
    before = jax.config.read("jax_enable_x64")
    with np.printoptions():
        yield
    jax.config.update("jax_enable_x64", before)


def test_every_block_prints_what_stands_below_it(as_a_reader, tmp_path):
    pairs = CODE.findall(TEXT)
    assert len(pairs) > 15
    for (code, output), printed in zip(pairs, run(code for code, _ in pairs), strict=True):
        assert printed.splitlines() == output.splitlines(), code
    assert (tmp_path / "chain.png").stat().st_size > 10_000


def test_no_output_stands_alone_and_the_pictures_are_there():
    assert TEXT.count("```text") == sum(bool(output) for _, output in CODE.findall(TEXT))
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert len(pictures) == 3
    for name in pictures:
        assert (PAGE.parent / name).read_bytes().startswith(b"\x89PNG")
