"""Mutants of backward code: one small mistake each, made in the syntax tree of a source file.

Backward code is every `bwd` and `undo`, every derivative that `elementwise` and its like are given, contractions, what
applies them, what a factor answers, what pulls a gradient back, and the functions that nothing else calls.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOTS = {"bwd", "undo", "df", "pullback", "__call__", "total", "per_example", "squared_norm"}
TAKES_A_DERIVATIVE = {"elementwise", "of_entries", "_regression"}  # as their third argument
CHECKS = (
    "expect.",
    "check",
    "isinstance",
    "hasattr",
    "getattr",
    "_unknown",
    "InputError",
)  # these calls compute nothing

NUMBERS = {0: [1, -1], 1: [0, 2], 2: [1], 3: [1], 0.5: [1.0]}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr}
COMPARISONS = {
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Eq: [ast.NotEq],
    ast.Is: [ast.IsNot],
}
FUNCTIONS = {"sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "minimum": "maximum", "abs": "sign"}
DROPPED = ("jnp.", "lax.", "nn.", "_", "reversed", "placed", "cast", "after")  # calls that may be forgotten
EVEN = {"square", "abs", "where", "ones_like", "isinf", "isfinite", "issubdtype"}  # of these -x is no other argument


@dataclass(frozen=True)
class Mutant:
    """One mistake in one file.

    Attributes:
        file: relative to the package.
        line: where.
        where: the outermost function or class that it is in.
        lines: those of the statement or lambda around it, or of the first statement of a case.
        before, after: the statement or lambda around it, without and with the mistake.
        source: the whole file with it.
    """

    file: str
    line: int
    where: str
    lines: range
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """What an explanation names it by."""
        return f"{self.where}: {self.after}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.where}\n    is      {self.before}\n    mutant  {self.after}"


def mutants(package: Path, files: list[str]) -> list[Mutant]:
    """Every mutant of the backward code in these files of a package."""
    sources = {file: (package / file).read_text() for file in files}
    trees = {file: ast.parse(source) for file, source in sources.items()}
    found: dict[tuple[str, str], Mutant] = {}
    for file, regions in backward(trees).items():
        parents = {child: node for node in ast.walk(trees[file]) for child in ast.iter_child_nodes(node)}
        for node in (node for region in regions for node in _computing(region)):
            for new in {ast.unparse(new): None for new in alternatives(node)}:
                mutant = _mutant(file, sources[file], list(_ancestors(node, parents)), node, new)
                if mutant and new != ast.unparse(node):
                    found.setdefault((file, mutant.key), mutant)
    return list(found.values())


def _mutant(file: str, source: str, ancestors: list[ast.AST], node: ast.AST, new: str) -> Mutant | None:
    """None where it is no Python."""
    shown = _around(node, ancestors)
    outermost = [a for a in ancestors if isinstance(a, (ast.FunctionDef, ast.ClassDef))][-1]
    mutated = _spliced(source, node, new)
    before, after = (_text(source, shown, text) for text in (source, mutated))
    try:
        ast.parse(_text(source, outermost, mutated))
    except SyntaxError:
        return None
    run = shown if not isinstance(shown, ast.pattern) else _body_of(shown, ancestors)
    lines = range(run.lineno, run.end_lineno + 1)
    return Mutant(file, node.lineno, outermost.name, lines, _one_line(before), _one_line(after), mutated)


def _body_of(pattern: ast.pattern, ancestors: list[ast.AST]) -> ast.stmt:
    """What runs where a pattern matches: the line of the pattern runs for whatever comes by."""
    return next(a for a in ancestors if isinstance(a, ast.match_case)).body[0]


def _text(source: str, node: ast.AST, mutated: str) -> str:
    """What of a mutated source stands where a node of the source was, its decorators included."""
    first = [*getattr(node, "decorator_list", []), node][0]
    start, stop = _span(source, first)[0], _span(source, node)[1]
    return mutated[start : stop + len(mutated) - len(source)]


def _around(node: ast.AST, ancestors: list[ast.AST]) -> ast.AST:
    """The statement or lambda that a node is in; of a compound statement only the part of its head."""
    shown = node
    for other in ancestors:
        if isinstance(other, (ast.FunctionDef, ast.match_case)) or (
            hasattr(other, "body") and isinstance(other, ast.stmt)
        ):
            return shown
        shown = other
        if isinstance(other, (ast.stmt, ast.Lambda)):
            return shown
    return shown


def backward(trees: dict[str, ast.Module]) -> dict[str, list[ast.AST]]:
    """The functions of each file that only backward code calls."""
    defined = [(file, node) for file, tree in trees.items() for node in _all(tree, ast.FunctionDef)]
    found = {
        node: file for file, node in defined if node.name in ROOTS or node.name.startswith("pull_") or _contracts(node)
    }
    found |= {df: file for file, tree in trees.items() for df in _derivatives(tree)}
    inside: set[ast.AST] = set()
    while more := {node: file for node, file in found.items() if node not in inside}:
        inside |= {child for node in more for child in ast.walk(node)}
        found |= {
            node: file
            for file, node in defined
            if node not in inside and (calls := _calls(node, file, trees)) and inside.issuperset(calls)
        }
    return {file: [node for node, where in found.items() if where == file] for file in trees}


def _derivatives(tree: ast.Module) -> Iterator[ast.AST]:
    """The third argument of every `elementwise(name, f, df)` and its like: a lambda, or a function named."""
    known = {node.name: node for node in _all(tree, ast.FunctionDef)}
    for call in _all(tree, ast.Call):
        if ast.unparse(call.func) in TAKES_A_DERIVATIVE and not isinstance(call.args[2], ast.Attribute):
            given = ast.unparse(call.args[2])
            named = [node.value for node in _all(tree, ast.Assign) if ast.unparse(node.targets[0]) == given]
            yield from named or [known.get(given, call.args[2])]


def _contracts(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("contraction") for decorator in node.decorator_list)


def _calls(function: ast.FunctionDef, file: str, trees: dict[str, ast.Module]) -> list[ast.AST]:
    """Where else a function is named: in its own file, and where it is imported, or the class that it belongs to."""
    own, module = set(ast.walk(function)), "funcnet." + file.removesuffix(".py").replace("/", ".")
    names = {function.name, *(c.name for c in _all(trees[file], ast.ClassDef) if function in c.body)}
    imported = lambda tree: [
        alias for node in _all(tree, ast.ImportFrom) if node.module == module for alias in node.names
    ]
    imports = [tree for tree in trees.values() if names & {alias.name for alias in imported(tree)}]
    files = (trees[file], *imports)
    named = [node for tree in files for node in _all(tree, ast.Name) if node.id == function.name]
    named += [node for tree in files for node in _all(tree, ast.Attribute) if _is_method(node, function.name)]
    return [node for node in named if node not in own]


def _is_method(node: ast.Attribute, name: str) -> bool:
    """Whether this is a method of that name, not a library's function."""
    return node.attr == name and ast.unparse(node.value) not in (
        "jax",
        "jnp",
        "lax",
        "nn",
        "np",
        "math",
        "fn",
        "expect",
    )


@cache
def _all(tree: ast.AST, kind: type) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function that compute: no annotations, defaults, context managers or checks of the input."""
    if isinstance(node, (ast.Raise, ast.arguments, ast.withitem)) or getattr(node, "arg", "") == "strict":
        return
    if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith(CHECKS):
        yield from _computing(node.args[0]) if name == "expect.cotangent" else ()
        return
    yield node
    left_out = {"returns", "annotation"}
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        left_out.add("test")
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in left_out:
                yield from _computing(child)


def alternatives(node: ast.AST) -> list[ast.AST]:
    """What else might have been written in a node's place."""
    by_kind = {
        ast.BinOp: _of_operation,
        ast.UnaryOp: lambda node: [node.operand],
        ast.Compare: _of_comparison,
        ast.Constant: _of_constant,
        ast.Call: _of_call,
        ast.Attribute: lambda node: [node.value] if node.attr == "T" else [],
        ast.IfExp: lambda node: [node.body, node.orelse],
        ast.Tuple: _of_sequence,
        ast.List: _of_sequence,
        ast.Dict: _of_dict,
        ast.MatchClass: _of_pattern,
        ast.Subscript: lambda node: [node.value],
    }
    return by_kind.get(type(node), lambda node: [])(node)


def _of_operation(node: ast.BinOp) -> list[ast.AST]:
    other = OPERATORS.get(type(node.op))
    found: list[ast.AST] = [_changed(node, op=other())] if other else []
    if isinstance(node.op, (ast.Mult, ast.Div)):
        found.append(ast.UnaryOp(ast.USub(), node))
    if isinstance(node.op, ast.MatMult):
        found.append(_changed(node, left=node.right, right=node.left))
    right = ast.UnaryOp(ast.USub(), node.right) if isinstance(node.op, ast.Sub) else node.right
    return [*found, node.left, right]


def _of_comparison(node: ast.Compare) -> list[ast.AST]:
    return [_changed(node, ops=[op()]) for op in COMPARISONS.get(type(node.ops[0]), [])]


def _of_constant(node: ast.Constant) -> list[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        return [ast.Constant(not value)]
    if isinstance(value, str):
        return _of_subscripts(value)
    if not isinstance(value, (int, float)):
        return []
    return [ast.Constant(new) for new in NUMBERS.get(value, [2 * value, 1.0] if value else [1.0])]


def _of_subscripts(text: str) -> list[ast.AST]:
    """Of an einsum: its first two operands exchanged, its last two output axes exchanged."""
    inputs, arrow, output = text.partition("->")
    first, *rest = inputs.split(",")
    if not arrow:
        return []
    others = [",".join([*rest[:1], first, *rest[1:]]) + arrow + output, inputs + arrow + output[:-2] + output[:-3:-1]]
    return [ast.Constant(other) for other in others]


def _of_call(node: ast.Call) -> list[ast.AST]:
    """Without the call, or a keyword; with another function, two arguments exchanged, or the first one negated."""
    name = ast.unparse(node.func)
    found: list[ast.AST] = [
        _changed(node, keywords=[other for other in node.keywords if other is not keyword])
        for keyword in node.keywords
        if keyword.arg != "strict"
    ]
    found += [_changed(node, args=args) for args in _exchanged(node.args)]
    last = name.split(".")[-1]
    if isinstance(node.func, ast.Attribute):
        if last in FUNCTIONS:
            found.append(_changed(node, func=_changed(node.func, attr=FUNCTIONS[last])))
        if last in ("astype", "reshape", "at"):
            found.append(node.func.value)
    if node.args and name.startswith(DROPPED) and name != "jnp.asarray":
        found.append(node.args[0])
    if node.args and name.startswith(("jnp.", "lax.", "nn.", "df")) and last not in EVEN:
        found.append(_changed(node, args=[ast.UnaryOp(ast.USub(), node.args[0]), *node.args[1:]]))
    return found


def _of_sequence(node: ast.Tuple | ast.List) -> list[ast.AST]:
    return [_changed(node, elts=elements) for elements in _exchanged(node.elts)]


def _of_dict(node: ast.Dict) -> list[ast.AST]:
    return [_changed(node, values=values) for values in _exchanged(node.values)]


def _of_pattern(node: ast.MatchClass) -> list[ast.AST]:
    return [_changed(node, patterns=patterns) for patterns in _exchanged(node.patterns)]


def _exchanged(items: list) -> list[list]:
    """A list with two neighbours exchanged, in every way; a text stays where it is."""
    text = lambda item: isinstance(item, ast.Constant) and isinstance(item.value, str)
    pairs = [i for i in range(len(items) - 1) if not text(items[i]) and not text(items[i + 1])]
    return [[*items[:i], items[i + 1], items[i], *items[i + 2 :]] for i in pairs]


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _ancestors(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def _span(source: str, node: ast.AST) -> tuple[int, int]:
    """Where a node begins and ends in a source."""
    lines = source.splitlines(keepends=True)
    place = lambda line, column: sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())
    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)


def _spliced(source: str, node: ast.AST, new: str) -> str:
    start, stop = _span(source, node)
    bare = isinstance(node, (ast.pattern, ast.Constant)) or isinstance(getattr(node, "ctx", None), ast.Store)
    if isinstance(node, ast.Tuple) and any(isinstance(element, ast.Slice) for element in node.elts):
        bare, new = True, new.strip("()")
    return source[:start] + (new if bare else f"({new})") + source[stop:]


def _one_line(text: str) -> str:
    return " ".join(text.split())
