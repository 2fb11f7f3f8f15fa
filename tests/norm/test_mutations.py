"""Checks that wrong layers turn the suite red; a mutant is the real source with one place changed.

A place is found by the syntax tree: a function of ``functional`` and a node in it. So a change of
layout, of comments or of the code around it does not break a mutant.
"""

import ast
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megdet_d2.norm import batch_norm, functional
from tests.helpers.pooled import (
    PARTS,
    TOLERANCES,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)

SOURCE = Path(functional.__file__).read_text()


class Mutant(NamedTuple):
    """A change: in ``function``, every node that ``at`` accepts becomes ``change(node)``."""

    function: str
    at: Callable[[ast.AST], bool]
    change: Callable[[ast.AST], ast.AST | list]
    places: int = 1


def call_of(name, *, having=None):
    """Accepts calls of ``name``, with the constant ``having`` among their arguments."""

    def accepts(node):
        return (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == name
            and (having is None or having in [getattr(arg, "value", None) for arg in node.args])
        )

    return accepts


def operation(operator, left):
    """Accepts ``left <operator> anything``."""

    def accepts(node):
        return (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, operator)
            and ast.unparse(node.left) == left
        )

    return accepts


def expression(code):
    return ast.parse(code, mode="eval").body


def parts_of(call):
    """Returns the vectors that an all_reduce adds up: all after group, layer and direction."""
    return call.args[3:]


def divide_by_count(call):
    n = ast.unparse(parts_of(call)[-1])
    call.args[3:] = [expression(f"{ast.unparse(part)} / {n}") for part in parts_of(call)]
    return call


def without_reduction(call):
    return ast.Tuple(parts_of(call), ast.Load())


def divide_by_local_count(division):
    division.right = expression("x.numel() // x.shape[1]")
    return division


def return_total_first(statement):
    statement.value.elts[0] = expression("totals.to(stats.dtype).view(2, -1)")
    return statement


def drop_last_argument(call):
    call.args[-1] = expression(f"0 * {ast.unparse(call.args[-1])}")
    return call


def reduce_over_world(call):
    call.args[0] = expression("torch.distributed.group.WORLD.group_name")
    return call


def statement_of(accepts):
    return lambda node: isinstance(node, ast.Expr) and accepts(node.value)


def returned(value):
    return lambda node: isinstance(node, ast.Return) and ast.unparse(node.value) == f"({value})"


FORWARD = call_of("all_reduce", having="forward")
BACKWARD = call_of("all_reduce", having="backward")
UNBIASED = operation(ast.Mult, "var")
MUTANTS = {
    "none": None,
    "ranks weighted equally": Mutant("_statistics_by_aten", FORWARD, divide_by_count),
    "statistics of this process alone": Mutant("_statistics_by_aten", FORWARD, without_reduction),
    "biased running variance": Mutant("unbiased", UNBIASED, lambda node: node.left),
    "running statistics updated twice": Mutant(
        "move_running_statistics",
        statement_of(call_of("running_var.lerp_")),
        lambda statement: [statement, statement],
    ),
    "backward reduction left out": Mutant("gradient_sums", BACKWARD, without_reduction),
    "local count in the backward": Mutant(
        "input_gradient", operation(ast.Div, "totals"), divide_by_local_count
    ),
    "gradient of γ summed over ranks": Mutant(
        "gradient_sums", returned("sums, totals"), return_total_first
    ),
    "x̂ left out of dx": Mutant(
        "input_gradient", call_of("aten.input_gradient"), drop_last_argument
    ),
    "the world instead of the group": Mutant("_statistics_by_aten", FORWARD, reduce_over_world),
}


class Mutator(ast.NodeTransformer):
    def __init__(self, mutant: Mutant):
        self.mutant, self.places = mutant, 0

    def generic_visit(self, node):
        super().generic_visit(node)
        if not self.mutant.at(node):
            return node
        self.places += 1
        return self.mutant.change(node)


def mutate(name) -> str:
    """Returns the source of the mutant; fails if it does not have the places to change."""
    tree, mutant = ast.parse(SOURCE), MUTANTS[name]
    if mutant is not None:
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == mutant.function
        ]
        assert len(functions) == 1, f"{mutant.function} is not one function of functional.py"
        mutator = Mutator(mutant)
        mutator.visit(functions[0])
        assert mutator.places == mutant.places, (
            f"{name!r} has {mutator.places} places in {mutant.function}, not {mutant.places}: "
            "describe the one that is there now"
        )
    return ast.unparse(ast.fix_missing_locations(tree))


def run_mutant(rank, name, xs, dys, group_size):
    # It has its own operators, or they would replace the real ones.
    mutant = types.ModuleType("megdet_d2.norm.mutant")
    mutant.__package__ = "megdet_d2.norm"
    space = f"mutant{list(MUTANTS).index(name)}_{group_size or 0}"
    source = mutate(name).replace("megdet_d2::", f"{space}::")
    source = source.replace("ops.megdet_d2", f"ops.{space}")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        for part in ("statistics", "Normalization"):
            patch.setattr(batch_norm, part, getattr(mutant, part))
        return run_layer(rank, xs, dys, "one_reduce", group_size, torch.contiguous_format)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_another_program(name):
    same = mutate(name) == ast.unparse(ast.parse(SOURCE))
    assert same == (MUTANTS[name] is None)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_layer_turns_the_suite_red(pool4, name):
    xs, dys = make_inputs(PARTS["unequal N"])
    results = pool4.run(run_mutant, name, xs, dys, 2)

    def compare():
        for pair in (slice(0, 2), slice(2, 4)):
            reference = pooled_reference(xs[pair], dys[pair])
            assert_equals_pooled(results[pair], reference, *TOLERANCES[torch.float64])

    if name == "none":
        compare()
        return
    with pytest.raises(AssertionError):
        compare()
