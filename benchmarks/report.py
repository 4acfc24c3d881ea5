"""A measurement as a record for JSON, and that record as a table to read."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Measurement
from benchmarks.peers import cores

Record = dict[str, Any]


def record(name: str, measured: Measurement) -> Record:
    """Everything that was measured, with medians, quartiles, ratios and verdicts; times in the unit of their names."""
    sides: Record = {side: _side(side, measured) for side in measured.seconds}
    sides |= {side: {"status": "not installed"} for side in measured.missing}
    return {
        "name": name,
        "title": measured.workload.title,
        "agreement": measured.errors,
        "cores_busy_elsewhere": measured.others,
        "sides": sides,
        "targets": _targets(measured, sides),
    }


def _side(side: str, measured: Measurement) -> Record:
    seconds, compilations = measured.seconds, measured.compilations[side]
    found: Record = {
        "status": "measured",
        "step_ms": _quartiles(1e3 * s for s in seconds[side]),
        "steps_in_a_sample": measured.calls[side],
        "samples_ms": [1e3 * s for s in seconds[side]],
        "compile_s": None,
        "memory_bytes": None,
    }
    for other in ("plain", "funcnet"):
        found[f"step_over_{other}"] = _ratios(seconds[side], seconds[other]) if other in seconds else None
    if compilations:
        found["compile_s"] = _quartiles(c.trace + c.xla for c in compilations)
        found["trace_s"] = _quartiles(c.trace for c in compilations)
        found["xla_s"] = _quartiles(c.xla for c in compilations)
        found["memory_bytes"] = compilations[-1].memory
    return found


def _targets(measured: Measurement, sides: Record) -> list[Record]:
    """What funcnet is to reach against each side: ratios funcnet / side, and whether they are reached."""
    if "funcnet" not in measured.seconds:
        return []
    seconds, compilations = measured.seconds, measured.compilations
    found = []
    for side in (s for s in sides if s != "funcnet"):
        if side in measured.missing:
            found.append({"what": "step time", "against": side, "verdict": "not installed"})
            continue
        step = _ratios(seconds["funcnet"], seconds[side])
        if side != "plain":
            found.append(_target("step time", side, "<", 1.0, step))
            continue
        temp = [1.0 * c[-1].memory["temp"] for c in (compilations["funcnet"], compilations[side])]
        totals = [[c.trace + c.xla for c in compilations[s]] for s in ("funcnet", side)]
        found.append(_target("step time", side, "<=", measured.workload.step_target, step))
        found.append(_target("temp bytes", side, "<=", measured.workload.temp_target, _ratios(temp[:1], temp[1:])))
        found.append(_target("compile time", side, "<=", 1.0, _ratios(*totals)))
    return found


def _target(what: str, side: str, sign: str, limit: float, ratio: Record) -> Record:
    met = ratio["median"] < limit if sign == "<" else ratio["median"] <= limit
    verdict = "met" if met else "missed"
    return {"what": what, "against": side, "sign": sign, "limit": limit, "ratio": ratio, "verdict": verdict}


def _ratios(above: Sequence[float], below: Sequence[float]) -> Record:
    """Quartiles of the ratios within each round."""
    return _quartiles(1.0 if a == b else a / b if b else float("inf") for a, b in zip(above, below, strict=True))


def _quartiles(values: Iterable[float]) -> Record:
    q1, median, q3 = (float(q) for q in np.quantile(list(values), [0.25, 0.5, 0.75]))
    return {"q1": q1, "median": median, "q3": q3}


def environment(arguments: list[str]) -> Record:
    """The machine, the versions and the flags that a figure depends on."""
    packages = ("funcnet", "jax", "jaxlib", "optax", "numpy", "equinox", "flax", "torch")
    prefixes = ("XLA_", "JAX_", "OMP_", "GOMP_", "KMP_", "MKL_", "TORCH_")
    return {
        "machine": {
            "processor": _processor(),
            "cores": cores(),
            "memory_gib": _memory_gib(),
            "system": platform.platform(),
            "jax_device": f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "commit": _commit(),
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "flags": {
            "arguments": arguments,
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
            "torch_threads": cores(),
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this checkout, with a + if files differ from it."""
    try:
        here = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):
        return None


LEGEND = """\
step       one whole training step (loss, gradients, Adam), called from Python and waited for; median [quartiles]
/ plain    within each round, this side's step time divided by plain JAX's; below 1 it is faster than plain JAX
compile    from empty caches: Python tracing and lowering + XLA's compiler; medians
temp       memory that the compiled step needs beside its arguments and results; 1 MB = 1e6 bytes
funcnet /  pair by pair, funcnet's value divided by that side's; below 1 is better for funcnet; median [quartiles]
"""


def heading(environment: Record) -> str:
    """Machine, versions, flags and what the columns mean."""
    machine, versions, flags = (environment[part] for part in ("machine", "versions", "flags"))
    load = machine["load_average"]
    lines = [
        f"machine    {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        + (f", load average at the start {load[0]:.1f}" if load else ""),
        f"           {machine['system']}; JAX on {machine['jax_device']}, PyTorch on {flags['torch_threads']} threads",
        "versions   " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "flags      " + (" ".join(f"{k}={v}" for k, v in flags["environment"].items()) or "none in the environment"),
    ]
    return "\n".join(lines) + "\n\n" + LEGEND


def text(workload: Record) -> str:
    """One workload as tables: its sides, then its targets."""
    agreement = [_agreement(dtype, found) for dtype, found in workload["agreement"].items()]
    sides = _table(
        ("side", "step, ms", "[quartiles]", "/ plain", "[quartiles]", "compile, s", "trace + XLA, s", "temp, MB"),
        [_side_row(name, side) for name, side in workload["sides"].items()],
    )
    targets = _table(
        ("funcnet / side", "side", "wanted", "measured", "[quartiles]", "verdict"),
        [_target_row(t) for t in workload["targets"]],
    )
    return "\n".join(
        [f"{workload['name']}: {workload['title']}", *agreement, _company(workload), "", sides, "", targets, ""]
    )


def _company(workload: Record) -> str:
    """Whether the machine was quiet: PyTorch's threads in particular suffer from the loss of a core."""
    busy = workload["cores_busy_elsewhere"]
    if busy is None:
        return "what else the machine did during the timing is not known"
    doubt = ": DO NOT TRUST these times, repeat them on a quiet machine" if busy > 0.05 * cores() else ""
    return f"during the timing other processes kept {busy:.2f} cores busy{doubt}"


def _agreement(dtype: str, found: Record) -> str:
    side, worst = max(found["sides"].items(), key=lambda item: item[1]["leaf_error"])
    limit = f"same loss and gradients in {dtype}: within {found['leaf_tolerance']:.0e} of {found['against']}'s"
    return f"{limit} for every leaf; farthest {worst['leaf_error']:.0e} ({side}, {worst['leaf']})"


def _side_row(name: str, side: Record) -> tuple[str, ...]:
    if side["status"] != "measured":
        return (name, *[side["status"]] * 7)
    over, compiled = side["step_over_plain"], side["compile_s"]
    return (
        name,
        *_cells(side["step_ms"]),
        *(_cells(over) if over else ("-", "")),
        *(
            (_figure(compiled["median"]), f"{_figure(side['trace_s']['median'])} + {_figure(side['xla_s']['median'])}")
            if compiled
            else ("-", "-")
        ),
        f"{side['memory_bytes']['temp'] / 1e6:.3f}" if compiled else "-",
    )


def _target_row(target: Record) -> tuple[str, ...]:
    if "ratio" not in target:
        return (target["what"], target["against"], "-", "-", "", target["verdict"])
    wanted = f"{target['sign']} {target['limit']:g}"
    return (target["what"], target["against"], wanted, *_cells(target["ratio"]), target["verdict"])


def _cells(quartiles: Record) -> tuple[str, str]:
    q1, median, q3 = (_figure(quartiles[q]) for q in ("q1", "median", "q3"))
    return median, f"[{q1}, {q3}]"


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3f}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
