"""A run's folder: what was asked for, on what it ran, and what came out, as plain JSON."""

import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from funcnet._internal.errors import InputError, describe

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"


def start_run(run_dir: str | Path, config: Mapping[str, Any] | None = None, *, overwrite: bool = False) -> Path:
    """Make the folder of a run and write config.json and environment.json; metrics.jsonl is begun empty.

    Args:
        run_dir: made with its parents.
        config: what JSON can hold.
        overwrite: whether the files of an earlier run there may be replaced.

    Raises:
        FileExistsError: if run_dir is a file, or holds anything and overwrite is False. Nothing is written then.
        InputError: for a run_dir that is no path and a config that JSON cannot hold. Nothing is written then either.
    """
    if not isinstance(run_dir, (str, PathLike)):
        raise InputError("run_dir as a path", describe(run_dir), "name a folder, such as run_dir='runs/1'")
    folder = Path(run_dir)
    try:
        text = json.dumps(dict(config or {}), indent=2)
    except (TypeError, ValueError) as error:
        remedy = "turn arrays into lists, with array.tolist(), and other objects into text"
        raise InputError("a config that JSON can hold", f"{describe(config)}: {error}", remedy) from error
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the run")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name another run folder, or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text + "\n")
    (folder / ENVIRONMENT).write_text(json.dumps(environment(), indent=2) + "\n")
    (folder / METRICS).write_text("")
    return folder


def environment() -> dict[str, Any]:
    """The versions, the machine and the devices that results depend on."""
    packages = ("funcnet", "jax", "jaxlib", "optax", "chex", "numpy")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "x64": bool(jax.config.read("jax_enable_x64")),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def append_metrics(folder: Path, record: Mapping[str, float]) -> None:
    """Append one line to metrics.jsonl; once this returns, the line is on its way to disk whatever happens to the run.

    JSON has no numbers that are not finite: such a metric is written as null.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def read_metrics(run_dir: str | Path) -> list[dict[str, float | None]]:
    """The records of a run's metrics.jsonl, in order; None where a metric was not finite."""
    return [json.loads(line) for line in (Path(run_dir) / METRICS).read_text().splitlines()]
