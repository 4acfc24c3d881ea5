"""The lecture page's code runs, in order, and each block prints what the page says.

    python tests/test_lecture_page.py

runs the page and writes what its blocks print below them.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "lecture.md"
TEXT = PAGE.read_text()
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def run(blocks: list[str]) -> Iterator[str]:
    """What each block prints, all of them run in one namespace."""
    namespace: dict = {"__name__": "lecture"}
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, PAGE.name, "exec"), namespace)
        yield out.getvalue()


@pytest.fixture
def as_a_reader(standard_promotion, tmp_path, monkeypatch):
    """An empty folder to write into, and the page's setting of x64 undone at the end."""
    monkeypatch.chdir(tmp_path)
    before = jax.config.read("jax_enable_x64")
    with np.printoptions():
        yield
    jax.config.update("jax_enable_x64", before)


def test_every_block_prints_what_stands_below_it(as_a_reader, tmp_path):
    blocks = list(BLOCK.finditer(TEXT))
    assert len(blocks) > 15
    for block, printed in zip(blocks, run([block["code"] for block in blocks]), strict=True):
        assert printed.splitlines() == (block["output"] or "").splitlines(), block["code"]
    assert (tmp_path / "chain.png").read_bytes().startswith(b"\x89PNG")


def test_no_output_stands_alone_and_every_picture_is_there():
    assert TEXT.count("```text") == sum(block["output"] is not None for block in BLOCK.finditer(TEXT))
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert pictures
    for name in pictures:
        assert (PAGE.parent / name).read_bytes().startswith(b"\x89PNG")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the page draws a picture
        outputs = run([block["code"] for block in BLOCK.finditer(TEXT)])

        def written(block: re.Match) -> str:
            output = next(outputs)
            return f"```python\n{block['code']}```\n" + (f"```text\n{output}```\n" if output else "")

        PAGE.write_text(BLOCK.sub(written, TEXT))
