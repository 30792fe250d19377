"""Wrong formulas made from right ones: every small change of a function's source that a person might have made.

An operator, a constant, an axis, a field or a pair of names is exchanged; a term, a factor, a minus or a call is
dropped. What only refuses bad arguments (`raise`, and the questions before it) is left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any

_BINARY: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.Gt, ast.LtE),
    ast.Gt: (ast.Lt, ast.GtE),
    ast.LtE: (ast.GtE, ast.Lt),
    ast.GtE: (ast.LtE, ast.Gt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
#: names that stand for the same thing in two streams, or for two things of one kind
_TWINS = (
    ("plasticity", "stability"),
    ("plasticity_sq", "stability_sq"),
    ("plasticity_var", "stability_var"),
    ("plasticity_nsr", "stability_nsr"),
    ("plasticity_sq", "plasticity_var"),
    ("stability_sq", "stability_var"),
    ("dot", "covariance"),
    ("group_ids", "stability_group_ids"),
    ("p", "s"),
    ("p2", "s2"),
    ("vp", "vs"),
    ("gp", "gs"),
    ("pc", "sc"),
    ("pt", "st"),
    ("up", "us"),
    ("a", "b"),
    ("p_weight", "s_weight"),
    ("p_total", "s_total"),
    ("low", "high"),
    ("lp", "old"),
    ("lp", "ref"),
    ("old", "ref"),
    ("tokens", "count"),
    ("drift", "gap"),
    ("drift", "divergence"),
    ("ratio", "log_ratio"),
    ("stopped", "keep"),
    ("n", "length"),
    ("excess", "sq"),
    ("alone", "used"),
)
_CALLS = {
    "sum": ("mean", "max"),
    "mean": ("sum",),
    "minimum": ("maximum",),
    "maximum": ("minimum",),
    "max": ("min", "sum"),
    "exp": ("expm1",),
    "expm1": ("exp",),
    "zeros_like": ("ones_like",),
    "ones_like": ("zeros_like",),
    "all": ("any",),
    "any": ("all",),
}
#: what looks at arguments and computes nothing
_CHECKS = frozenset(
    {
        "common_namespace",
        "is_traced",
        "isinstance",
        "check_statistics",
        "check_options",
        "require_finite",
        "require_shape",
    }
    | {"require_floating", "require_rule", "require_noise", "widest_float", "get_args", "_common_dtype"}
)
_THROUGH = frozenset({"sqrt", "abs", "clip", "exp", "expm1", "astype", "_root", "minimum", "maximum", "erfc"})


def mutations(function: ast.FunctionDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """What was changed, and the function with it; each once."""
    seen = {ast.dump(function)}
    known = {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}
    places = [path for path, _ in _expressions(function, ())]
    for path in places:
        original = _at(function, path)
        for changed in _changes(original):
            if isinstance(changed, ast.Name) and changed.id not in known:
                continue  # a crash, not a formula
            mutant = copy.deepcopy(function)
            _put(mutant, path, changed)
            ast.fix_missing_locations(mutant)
            shape = ast.dump(mutant)
            if shape not in seen:
                seen.add(shape)
                place = f"{original.lineno - function.lineno}.{original.col_offset}"
                yield f"{function.name}+{place}: {ast.unparse(original)} -> {ast.unparse(changed)}", mutant


Path = tuple[tuple[str, int | None], ...]


def _expressions(node: ast.AST, path: Path) -> Iterator[tuple[Path, ast.expr]]:
    """Every expression that computes; no docstring, annotation, default, or check of arguments."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
            continue
        children = enumerate(value) if isinstance(value, list) else ((None, value),)
        for index, child in children:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise) or _only_refuses(child):
                continue
            if isinstance(child, ast.Call) and _name(child) in _CHECKS:
                continue
            if isinstance(child, ast.expr) and any(
                isinstance(x, ast.Call) and _name(x) == "isinstance" for x in ast.walk(child)
            ):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            here = (*path, (name, index))
            if isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), ast.Store):
                yield here, child
            yield from _expressions(child, here)


def _only_refuses(node: ast.AST) -> bool:
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return all(isinstance(x, ast.Raise) or _only_refuses(x) for x in node.body)


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        for other in _BINARY.get(type(node.op), ()):
            yield ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, ast.Sub | ast.Div):
            yield ast.BinOp(node.right, node.op, node.left)
        yield node.left
        yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for another in _COMPARISONS.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [another()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield from node.values
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(x) for x in _constants(node.value))
    elif isinstance(node, ast.Name | ast.Attribute):
        yield from _twins(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _constants(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, 0 if value else 2)
    elif isinstance(value, float):
        yield from (value + 1.0, 0.0 if value else 0.5, 2 * value)


def _twins(node: ast.Name | ast.Attribute) -> Iterator[ast.expr]:
    name = node.id if isinstance(node, ast.Name) else node.attr
    for one, two in _TWINS:
        if name in (one, two):
            other = two if name == one else one
            if isinstance(node, ast.Name):
                yield ast.Name(other, ast.Load())
            else:
                yield ast.Attribute(node.value, other, ast.Load())


def _calls(node: ast.Call) -> Iterator[ast.expr]:
    name = _name(node)
    if isinstance(node.func, ast.Attribute):
        for other in _CALLS.get(name, ()):
            yield ast.Call(ast.Attribute(node.func.value, other, ast.Load()), node.args, node.keywords)
    if name in _THROUGH and node.args:  # the argument as it is, without the library's namespace
        inner = [x for x in node.args if not (isinstance(x, ast.Name) and x.id == "xp")]
        yield from inner[: 2 if name in ("minimum", "maximum") else 1]
    if name == "where":
        condition, yes, no = node.args
        yield ast.Call(node.func, [condition, no, yes], node.keywords)
        yield yes
        yield no
    for i, keyword in enumerate(node.keywords):  # left to its default
        yield ast.Call(node.func, node.args, [k for j, k in enumerate(node.keywords) if j != i])
        for other_keyword in node.keywords[i + 1 :]:
            exchanged = list(node.keywords)
            exchanged[i] = ast.keyword(keyword.arg, other_keyword.value)
            exchanged[node.keywords.index(other_keyword)] = ast.keyword(other_keyword.arg, keyword.value)
            if keyword.arg not in ("axis", "keepdims", "dtype", "device"):
                yield ast.Call(node.func, node.args, exchanged)


def _at(node: ast.AST, path: Path) -> ast.expr:
    for name, index in path:
        child = getattr(node, name)
        node = child if index is None else child[index]
    assert isinstance(node, ast.expr)
    return node


def _put(node: ast.AST, path: Path, changed: ast.expr) -> None:
    *way, (name, index) = path
    for step, number in way:
        child = getattr(node, step)
        node = child if number is None else child[number]
    if index is None:
        setattr(node, name, copy.deepcopy(changed))
    else:
        getattr(node, name)[index] = copy.deepcopy(changed)
