"""The pages' code runs, in order, and each block prints what the page says.

    python tests/test_pages.py

runs the pages and writes what their blocks print below them.
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

DOCS = Path(__file__).parents[1] / "docs"
PEERS = {"equinox", "flax", "torch"}  # which not every environment has
WITHOUT_CODE = {"api.md", "benchmarks.md"}
PAGES = sorted({page.name for page in DOCS.glob("*.md")} - WITHOUT_CODE)
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:```text\n(?P<output>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?|\s+|-{3,}")  # rounding, and so the width of a column, is the version's


def run(name: str, blocks: list[str]) -> Iterator[str]:
    """What each block prints, all of them run in one namespace."""
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, name, "exec"), namespace)
        yield out.getvalue()


@pytest.fixture
def as_a_reader(standard_promotion, tmp_path, monkeypatch):
    """An empty folder to write into, and a page's setting of x64 undone at the end."""
    monkeypatch.chdir(tmp_path)
    before = jax.config.read("jax_enable_x64")
    with np.printoptions():
        yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_prints_what_stands_below_it(name, as_a_reader):
    text = (DOCS / name).read_text()
    for package in sorted(PEERS & set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))):
        pytest.importorskip(package)
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 3
    for block, printed in zip(blocks, run(name, [block["code"] for block in blocks]), strict=True):
        shown = block["output"] or ""
        if name in ("checker.md", "options.md"):
            printed, shown = (NUMBER.sub(" ", text).split() for text in (printed, shown))
        else:
            printed, shown = printed.splitlines(), shown.splitlines()
        assert printed == shown, block["code"]


@pytest.mark.parametrize("name", PAGES)
def test_no_output_stands_alone_and_every_picture_is_there(name):
    text = (DOCS / name).read_text()
    assert text.count("```text") == sum(block["output"] is not None for block in BLOCK.finditer(text))
    for picture in re.findall(r"!\[.+?\]\((.+?)\)", text):
        assert (DOCS / picture).read_bytes().startswith(b"\x89PNG")


if __name__ == "__main__":
    for name in PAGES:
        text = (DOCS / name).read_text()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # a page may draw a picture
            outputs = run(name, [block["code"] for block in BLOCK.finditer(text)])

            def written(block: re.Match) -> str:
                output = next(outputs)  # noqa: B023
                return f"```python\n{block['code']}```\n" + (f"```text\n{output}```\n" if output else "")

            text = BLOCK.sub(written, text)
        (DOCS / name).write_text(text)
