"""`python -m funcnet check`: what it checks, shows and refuses, and its exit status."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import funcnet as fn
from funcnet.check import command, table
from funcnet.check.cases import CASES, Case
from funcnet.check.command import EXAMPLES, main

ROOT = Path(__file__).parents[2]
QUICK = ["--oracle", "autodiff"]
MINE = """
from dataclasses import replace
import jax
import jax.numpy as jnp
import funcnet as fn

print("a module that prints")

@jax.custom_vjp
def bad(x, y):
    return jnp.sin(x) * y

bad.defvjp(lambda x, y: (bad(x, y), (x, y)), lambda xy, dy: (dy * jnp.cos(xy[0]), dy * jnp.sin(xy[0])))

def good(x, y):
    return jnp.sin(x) * y

def args():
    return jnp.ones((3, 2)), jnp.ones((3, 2)) / 2

def scale(x, by=2.0):
    return by * x

layer = fn.dense(2)

def wrong():
    return replace(layer, bwd=lambda params, x, dy, contract=fn.total: layer.bwd(params, x, 2 * dy, contract))

def stop():
    raise RuntimeError("no layer today")

def integers(x):
    return (x > 0).astype(int)

def prints(x):
    jax.debug.print("{}", x, ordered=True)
    return x

def loops(x):
    return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: x + 1, x)

one, a_list, broken = 1, lambda: [1.0], replace(layer, init=lambda key, x: 1 / 0)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A directory with a user's module, to run in."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "unfinished.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs a command line here: exit status, standard output, standard error."""

    def call(*words):
        status = main(["check", *words])
        return status, *capsys.readouterr()

    return call


def again(text):
    """The words after `python -m funcnet check` of the line that shows a failure again."""
    line = next(line for line in text.splitlines() if line.strip().startswith("again"))
    words = shlex.split(line)
    assert words[1:5] == ["python", "-m", "funcnet", "check"]
    return words[5:]


# A function, a layer

TWO = ["--arg", "f32[4,3]", "--arg", "f32[4,3]"]


@pytest.mark.parametrize(
    "words",
    [
        ["mine:good", *TWO, *QUICK],
        ["mine:good", *TWO, "--x64"],
        ["mine:scale", "--arg", "f32[n]", *QUICK],
        ["mine:layer", "--arg", "f32[4,5]", "--dtype", "bfloat16", *QUICK],
        ["funcnet:layer_norm", "--arg", "f32[4,5]", *QUICK],
        ["funcnet:mse", *TWO, *QUICK],
        ["dense/no bias", "--arg", "f32[2,7]", *QUICK],
    ],
)
def test_what_is_right_holds(run, mine, words):
    status, out, _ = run(*words)
    assert status == 0
    assert out.splitlines()[-1].startswith(("all ", "the one leaf holds"))
    assert "prints" not in out


@pytest.mark.parametrize(
    ("words", "smallest"),
    [
        (["mine:bad", *TWO, "--seed", "3"], ["--arg", "f32[1,1]", "--arg", "f32[1,1]"]),
        (["mine:bad", *TWO, "--x64", "--reference", "mine:good", *QUICK], ["--arg", "f32[1,1]"]),
        (["mine:bad", *TWO, "--no-shrink", *QUICK], TWO),
        (["mine:bad", "--args", "mine:args", *QUICK], ["--args", "mine:args"]),
        (["mine:wrong", "--arg", "f32[4,5]", "--dtype", "float32", *QUICK], ["--arg", "f32[1,1]"]),
    ],
)
def test_what_is_wrong_is_shown_again_by_the_line_given(run, mine, words, smallest):
    status, out, _ = run(*words)
    assert status == 1
    assert "WRONG" in out
    once_more = again(out)
    assert shlex.join(smallest) in shlex.join(once_more)
    status, out, _ = run(*once_more)
    assert status == 1
    assert again(out) == once_more


def test_json_is_all_that_is_on_standard_output(run, mine):
    status, out, err = run("mine:bad", *TWO, "--json", "--no-shrink", *QUICK)
    report = json.loads(out)
    assert (status, report["ok"], len(report["leaves"])) == (1, False, 2)
    assert err == "a module that prints\n"


def test_markdown_and_a_picture(run, mine):
    status, out, _ = run("mine:good", *TWO, "--markdown", "--plot", "worst.png", *QUICK)
    assert status == 0
    assert out.startswith("**good: its VJP, seed 0**")
    assert (mine / "worst.png").read_bytes().startswith(b"\x89PNG")


# Bad input

REFUSED = {
    "no floats": (["mine:integers", "--arg", "f32[3]"], "floating output"),
    "side effects": (["mine:prints", "--arg", "f32[3]"], "side effects"),
    "not differentiable": (["mine:loops", "--arg", "f32[3]"], "differentiate"),
    "arity": (["mine:good", "--arg", "f32[3]"], "missing a required argument"),
    "no arguments": (["mine:good"], "add --arg"),
    "a spec": (["mine:good", "--arg", "f32(3)"], "f32[8,16]"),
    "a module": (["mime:good", *TWO], "No module named 'mime'"),
    "a module with an error": (["unfinished:f", *TWO], "SyntaxError"),
    "a name": (["mine:god", *TWO], "did you mean 'good'"),
    "half a name": (["mine:", *TWO], "package.module:name"),
    "no function": (["mine:one", *TWO], "a function or a layer"),
    "two functions": (["mine:good", "mine:bad", *TWO], "one after the other"),
    "two kinds of arguments": (["mine:good", *TWO, "--args", "mine:args"], "--arg or --args"),
    "arguments in a list": (["mine:good", "--args", "mine:a_list"], "return (x,)"),
    "a layer's oracle": (["mine:good", *TWO, "--oracle", "laws"], "an oracle for a function"),
    "a layer's option": (["mine:good", *TWO, "--dtype", "float32"], "the dtypes in --arg"),
    "a function's option": (["mine:layer", "--arg", "f32[3]", "--x64"], "float64"),
    "an empty input": (["mine:layer", "--arg", "f32[0,3]"], "not empty"),
    "an error of one's own": (["mine:stop", "--arg", "f32[3]"], "no layer today"),
    "an error in a layer": (["mine:broken", "--arg", "f32[3]"], "ZeroDivisionError"),
    "a case": (["layer_nrm"], "did you mean 'layer_norm'"),
    "half a case with --arg": (["dense/no", "--arg", "f32[3]"], "'dense/no bias'"),
    "a picture in no folder": (["mine:good", *TWO, "--plot", "none/a.png"], "folder"),
    "a picture of another kind": (["mine:good", *TWO, "--plot", "a.xyz"], ".png"),
    "a list as JSON": (["--list", "--json"], "--json"),
    "a picture of the cases": (["dense", "--plot", "a.png"], "--plot"),
    "a dtype that no case has": (["mixed", "--dtype", "bfloat16"], "leave --dtype out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_a_remedy(run, mine, what):
    words, message = REFUSED[what]
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert "remedy" in err
    assert "Traceback" not in err


def test_the_error_itself_on_request(run, mine):
    with pytest.raises(RuntimeError, match="no layer today"):
        run("mine:stop", "--arg", "f32[3]", "--traceback")


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--jobs", "0"], ["--oracle", "delphi"], ["--json", "--markdown"]])
def test_an_option_that_cannot_be_read_ends_with_2(run, words):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(*words)


def test_the_examples_of_the_help_can_be_parsed():
    lines = re.findall(r"^  python -m funcnet (.*?)(?:   .*)?$", EXAMPLES, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        assert command._parser().parse_args(shlex.split(line)).names or line == "check"


# The table of cases

DENSE = fn.dense(2)
DOUBLED = replace(DENSE, bwd=lambda params, x, dy, contract=fn.total: DENSE.bwd(params, x, 2 * dy, contract))
CRASHES = replace(DENSE, fwd=lambda params, state, x, key: 1 / 0)


@pytest.fixture
def cases(monkeypatch):
    """Puts other cases in the place of the table's."""

    def put(*cases):
        for module in (table, command):
            monkeypatch.setattr(module, "CASES", cases)

    return put


def test_cases_that_hold(run):
    status, out, err = run("identity", "flatten/rank 1", "--jobs", "1", *QUICK)
    assert status == 0
    assert out.splitlines()[-1].startswith("2 rules, 2 cases, 8 checks in ")
    assert out.splitlines()[-1].endswith("all 8 leaves hold")
    assert err.splitlines()[-1] == "check 8/8  wrong 0"


def test_one_dtype(run):
    status, out, _ = run("tanh", "--dtype", "float16", "--jobs", "1", "--json")
    outcome = json.loads(out)
    assert (status, outcome["ok"], len(outcome["checks"])) == (0, True, 1)
    assert (outcome["checks"][0]["case"], outcome["checks"][0]["dtype"]) == ("tanh", "float16")


def test_a_case_that_is_wrong(run, cases):
    cases(Case("relu", fn.relu(), "f32[3]", ("float32",)), Case("dense/twice", DOUBLED, "f32[4,5]", ("float32",)))
    status, out, err = run("--jobs", "1", *QUICK)
    assert status == 1
    assert "dense/twice, float32, seed 0" in out
    assert out.splitlines()[-1].endswith("1 of 4 leaves hold; wrong: dense/twice (float32)")
    assert "wrong 1" in err
    once_more = again(out)
    assert once_more[:3] == ["dense/twice", "--arg", "f32[1,1]"]
    assert run(*once_more)[0] == 1


def test_a_check_that_raises_is_wrong_and_the_others_go_on(run, cases):
    cases(Case("dense", CRASHES, "f32[4,5]", ("float32",)), Case("relu", fn.relu(), "f32[3]", ("float32",)))
    status, out, _ = run("--jobs", "1", "--markdown", *QUICK)
    assert status == 1
    assert "the check itself raises ZeroDivisionError: division by zero" in out
    assert "| relu | float32 | x |" in out


def test_the_list_has_every_case(run):
    status, out, _ = run("--list")
    assert status == 0
    for line, case in zip(out.splitlines(), CASES, strict=True):
        assert line.startswith(f"{case.name}  ")


# In processes

COMMAND = [sys.executable, "-m", "funcnet", "check"]


def test_two_processes_and_a_module_in_the_current_directory(mine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    two = subprocess.run([*COMMAND, "identity", "--jobs", "2", "--json", *QUICK], capture_output=True, check=True)
    assert [check["dtype"] for check in json.loads(two.stdout)["checks"]] == list(CASES[0].dtypes)
    wrong = subprocess.run([*COMMAND, "mine:bad", *TWO, *QUICK], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "again  python -m funcnet check mine:bad" in wrong.stdout


def lives(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_ends_every_process_in_silence():
    words = [*COMMAND, "dense", "--jobs", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it would not hear what is ignored here
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes) as process:
        signal.signal(signal.SIGINT, before)
        process.stderr.readline()  # the first of them are done
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"stopped\n")
    deadline = time.monotonic() + 30  # multiprocessing's own helper ends a moment later
    while lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(process.pid)


@pytest.mark.slow
def test_every_case_holds_in_every_dtype():
    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
