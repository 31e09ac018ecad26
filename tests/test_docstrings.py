"""Public docstrings state what signatures cannot: the shapes of arrays, and errors."""

import ast
import re

import pytest

from tests.test_layout import REPOSITORY, paths

ARRAY = re.compile(r"\b(ndarray|NDArray|Tensor|Arrays)\b")
# [N, K], [], "scalar", "shape", or a name with its dimensions as suffix: logits_NK.
SHAPE = re.compile(r"\[[A-Z0-9_.…][^\]]*\]|\[\]|\bshapes?\b|\bscalars?\b|\w_[A-Z]{1,5}\b")
# Not for callers: invariants, and what ends a process or an iteration.
INTERNAL = {"AssertionError", "NotImplementedError", "StopIteration", "SystemExit"}


def public_functions(body):
    """The public functions of a module, and the public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        # The implementation of an overloaded function documents it.
        if is_function and not node.name.startswith("_") and not is_overload(node):
            yield node


def is_overload(function):
    return any(ast.unparse(each) == "overload" for each in function.decorator_list)


def annotations(function):
    """All annotations of a signature, as text."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    given = [each.annotation for each in arguments] + [function.returns]
    return " ".join(ast.unparse(each) for each in given if each is not None)


def raised(function):
    """Names of the error classes that a function itself raises."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(error).split(".")[-1]
            if name[:1].isupper() and name not in INTERNAL:
                yield name


@pytest.mark.parametrize("path", paths(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docstrings_give_shapes_and_errors(path):
    for function in public_functions(ast.parse(path.read_text()).body):
        words = ast.get_docstring(function) or ""
        where = f"{path.name}:{function.lineno} {function.name}"
        if ARRAY.search(annotations(function)):
            assert SHAPE.search(words), f"{where} gives no shape"
        for name in raised(function):
            assert name in words, f"{where} does not name {name}"
