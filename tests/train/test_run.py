"""The run folder: what is written, and what is not overwritten."""

import json

import pytest

from funcnet._internal.errors import InputError
from funcnet.train.run import append_metrics, read_metrics, start_run


def test_a_run_folder_holds_config_environment_and_metrics(tmp_path):
    folder = start_run(tmp_path / "a" / "b", {"seed": 1})
    append_metrics(folder, {"step": 1, "loss": 0.5})
    append_metrics(folder, {"step": 2, "loss": 0.25})
    assert read_metrics(folder) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert json.loads((folder / "config.json").read_text()) == {"seed": 1}
    assert {"python", "platform", "devices", "jax", "jaxlib", "optax", "funcnet"} <= set(
        json.loads((folder / "environment.json").read_text())
    )


def test_a_folder_that_holds_anything_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        start_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    start_run(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_config_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="a config that JSON can hold"):
        start_run(tmp_path / "run", {"x": object()})
    assert not (tmp_path / "run").exists()
