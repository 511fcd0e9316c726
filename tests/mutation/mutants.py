"""Mutants of a source tree: one small change each, made on the syntax tree.

What is changed: comparisons (boundary and negation), conditions, operands of ``and`` and ``or``, arithmetic, numbers, bools,
strings and bytes that are data, slice bounds, keyword arguments, min and max, any and all, sorted, types in ``isinstance`` and
``except``, ``with`` blocks, returned values; and statements are removed.

What is not, because it is not behaviour: docstrings, type annotations and aliases, ``__all__``, and ``strict=`` of zip, which
asserts that two sequences have one length. Nor the words of messages, which tests quote; the expressions in a message are changed
as any other.
"""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_COMPARE: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.Pow: ast.Mult,
}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
_MESSAGE_CALLS = {"require", "_require"}  # their second argument is the message
_CONTEXT = 60  # characters before and after the change that name a mutant
_TOKENS = re.compile(r"\w+|\s+|[<>=!&|^]+|\W")


@dataclass(eq=False)
class Mutant:
    """``key`` names it without line numbers: the place in brackets, in as much of its statement as helps."""

    module: str
    scope: str  # qualified name of the outermost function; empty: runs when the module is imported
    tree: ast.Module
    place: tuple[ast.AST, str, int | None]
    new: ast.AST
    lines: range  # a test that runs one of these may see it
    key: str = ""

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.scope}" if self.scope else self.module.rpartition(".")[2]

    def unchanged(self) -> Mutant:
        """A mutant without a change: it has to survive, or the machinery kills and not the tests."""
        return replace(self, new=_at(self.place), key="")

    def apply(self) -> ast.Module:
        """The changed tree. There is no way back: call it in a process of its own."""
        _put(self.place, self.new)
        return ast.fix_missing_locations(self.tree)


def mutants_of(module: str, path: Path) -> list[Mutant]:
    tree = ast.parse(path.read_text())
    found = list(_Walk(module, tree).visit(tree, (tree, "", None), "", tree, False))
    seen: Counter[str] = Counter()
    for mutant, statement in found:
        key = f"{mutant.name}: {_words(mutant, statement)}"
        seen[key] += 1
        mutant.key = key if seen[key] == 1 else f"{key} #{seen[key]}"
    return [mutant for mutant, _ in found]


def _at(place: tuple[ast.AST, str, int | None]) -> ast.AST:
    parent, field, index = place
    return getattr(parent, field) if index is None else getattr(parent, field)[index]


def _put(place: tuple[ast.AST, str, int | None], node: ast.AST) -> None:
    parent, field, index = place
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _words(mutant: Mutant, statement: ast.AST) -> str:
    """``offset = (end + step - [1 -> 2]) & -step``: the statement with the change marked, and cut where it is long."""
    old = _TOKENS.findall(_head(statement))
    if statement is _at(mutant.place):
        new = _TOKENS.findall(_head(mutant.new))
    else:
        with_old = _at(mutant.place)
        _put(mutant.place, mutant.new)
        new = _TOKENS.findall(_head(statement))
        _put(mutant.place, with_old)
    start = _shared(old, new)
    end = _shared(old[start:][::-1], new[start:][::-1])
    before, after = "".join(old[:start]), "".join(old[len(old) - end :])
    before = before if len(before) <= _CONTEXT else f"...{before[-_CONTEXT:]}"
    after = after if len(after) <= _CONTEXT else f"{after[:_CONTEXT]}..."
    return f"{before}[{''.join(old[start : len(old) - end])} -> {''.join(new[start : len(new) - end])}]{after}"


def _shared(one: list[str], other: list[str]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _head(node: ast.AST) -> str:
    """The code of a node, without the body of a compound statement and the words of messages."""
    if isinstance(getattr(node, "body", None), list):
        node = copy.copy(node)
        for field in ("body", "orelse", "finalbody", "handlers"):
            if hasattr(node, field):
                setattr(node, field, [])
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            part.values = [value for value in part.values if not isinstance(value, ast.Constant)]
    return " ".join(ast.unparse(node).split())


class _Walk:
    def __init__(self, module: str, tree: ast.Module) -> None:
        self._module, self._tree = module, tree

    def visit(
        self, node: ast.AST, place: tuple[ast.AST, str, int | None], scope: str, statement: ast.AST, message: bool
    ) -> Iterator[tuple[Mutant, ast.AST]]:
        """All mutants of this node and those below. ``message``: whether strings here are words for people."""
        if _is_no_behaviour(node):
            return
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            statement = node
        if isinstance(statement, ast.Raise):
            message = True
        inside = scope and not scope.endswith(".")  # within a function; a class alone gives a prefix
        for new in _changes(node, message):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):  # a default: whatever runs the body sees it
                first, last = statement.body[0].lineno, statement.end_lineno
            else:
                first, last = statement.lineno, getattr(node, "end_lineno", statement.lineno)
            yield Mutant(self._module, scope if inside else "", self._tree, place, new, range(first, last + 1)), statement
        below = scope
        if isinstance(node, ast.ClassDef) and not inside:
            below = f"{scope}{node.name}."
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside:
            below = f"{scope}{node.name}"
        for field, value in ast.iter_fields(node):
            here = scope if field in ("decorator_list", "keywords", "bases") and isinstance(node, ast.stmt) else below
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not _is_annotation(node, field):
                    words = message or isinstance(node, ast.JoinedStr)
                    words |= isinstance(node, ast.Call) and _called(node) in _MESSAGE_CALLS and field == "args" and index == 1
                    yield from self.visit(child, (node, field, index), here, statement, words)


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def _is_annotation(node: ast.AST, field: str) -> bool:
    return field in ("annotation", "returns", "format_spec")


def _is_no_behaviour(node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.expr_context():
            return True
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.Call(func=ast.Name(id="TypeVar")):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.keyword(arg="strict"):
            return True
    return False


def _with(node: ast.AST, **changes: object) -> ast.AST:
    new = copy.copy(node)
    for field, value in changes.items():
        setattr(new, field, value)
    return new


def _without(values: list, index: int) -> list:
    return values[:index] + values[index + 1 :]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _negated(test: ast.expr) -> ast.expr | None:
    """The opposite of a condition, unless its own operators have mutants that say the same."""
    simple = not isinstance(test, ast.Compare | ast.BoolOp | ast.Constant) and not (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )
    return ast.UnaryOp(ast.Not(), test) if simple else None


def _changes(node: ast.AST, message: bool) -> Iterator[ast.AST]:
    """What may stand in the place of this node."""
    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                for other in _COMPARE[type(op)]:
                    yield _with(node, ops=[*ops[:index], other(), *ops[index + 1 :]])
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for index in range(len(values)):
                rest = _without(values, index)
                yield _with(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.BinOp(op=op, left=left, right=right):
            if type(op) in _ARITHMETIC and not _is_text(left) and not _is_text(right):
                yield _with(node, op=_ARITHMETIC[type(op)]())
        case ast.AugAssign(op=op, value=value):
            if not _is_text(value):
                yield _with(node, op=_ARITHMETIC[type(op)]())
            yield ast.Pass()
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Constant(value=str() as value) if not message:
            yield ast.Constant(f"{value}XX")
        case ast.Constant(value=bytes() as value):
            yield ast.Constant(value + b"XX")
        case ast.Slice(lower=lower, upper=upper):
            if lower is not None:
                yield _with(node, lower=None)
            if upper is not None:
                yield _with(node, upper=None)
        case ast.Call(args=[tested, ast.BinOp(op=ast.BitOr(), left=left, right=right)]) if _called(node) == "isinstance":
            yield _with(node, args=[tested, left])
            yield _with(node, args=[tested, right])
        case ast.Call(func=ast.Name(id="sorted" | "reversed"), args=[first, *_]):
            yield ast.Call(ast.Name("list", ast.Load()), [first], [])
        case ast.Call(keywords=keywords):
            for index, keyword in enumerate(keywords):
                if keyword.arg not in (None, "strict"):
                    yield _with(node, keywords=_without(keywords, index))
        case ast.Name(id=name) if name in _NAMES:
            yield _with(node, id=_NAMES[name])
        case ast.Attribute(attr=name) if name in _NAMES:
            yield _with(node, attr=_NAMES[name])
        case ast.ExceptHandler(type=ast.Tuple(elts=types) as kinds):
            for index in range(len(types)):
                yield _with(node, type=_with(kinds, elts=_without(types, index)))
        case ast.With(body=body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.Return(value=None) | ast.Continue() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Return(value=value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Expr():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
    if isinstance(node, ast.If | ast.While | ast.IfExp) and (opposite := _negated(node.test)):
        yield _with(node, test=opposite)
    if isinstance(node, ast.comprehension):
        for index, test in enumerate(node.ifs):
            if opposite := _negated(test):
                yield _with(node, ifs=[*node.ifs[:index], opposite, *node.ifs[index + 1 :]])
