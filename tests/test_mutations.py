"""Wrong layers have to turn the suite red: a mutant is the real source with one line changed."""

import types
from pathlib import Path

import pytest
import torch

from megdet_d2.norm import batch_norm, functional

from .test_norm import (
    PARTS,
    TOLERANCES,
    assert_equals_pooled,
    make_inputs,
    pooled_reference,
    run_layer,
)

SOURCE = Path(functional.__file__).read_text()
MUTANTS = {
    "none": ("", ""),
    "ranks weighted equally": (
        "local_count = local_mean.new_full((1,), n)",
        "n = 1; local_count = local_mean.new_full((1,), n)",
    ),
    "statistics of this process alone": (
        'group,\n            layer,\n            "forward"',
        '"", layer, "forward"',
    ),
    "biased running variance": ("var * (count / (count - 1).clamp(min=1))", "var"),
    "running statistics updated twice": ("for running, new in (", "for running, new in 2 * ("),
    "backward reduction left out": (
        'all_reduce(\n        group, layer, "backward", '
        "sum_dy.double(), sum_dy_xhat.double()\n    )",
        "sum_dy.double(), sum_dy_xhat.double()",
    ),
    "local count in the backward": (
        "    total = count.clamp(min=1)\n",
        "    total = x.numel() // x.shape[1]\n",
    ),
    "gradient of γ summed over ranks": (
        "return sum_dy, sum_dy_xhat,",
        "return sum_dy, total_dy_xhat.to(mean),",
    ),
    "x̂ left out of dx": ("-scale * mean_dy_xhat", "0 * scale"),
    "the world instead of the group": (
        "    n = x.numel() // x.shape[1]\n    local_mean",
        "    n = x.numel() // x.shape[1]\n"
        "    group = torch.distributed.group.WORLD.group_name\n    local_mean",
    ),
}


def run_mutant(rank, name, xs, dys, group_size):
    old, new = MUTANTS[name]
    source = SOURCE.replace(old, new, 1) if old else SOURCE
    # Operators of its own, or they would replace the real ones.
    mutant = types.ModuleType("megdet_d2.norm.mutant")
    mutant.__package__ = "megdet_d2.norm"
    space = f'"mutant{list(MUTANTS).index(name)}_{group_size or 0}::'
    exec(compile(source.replace('"megdet_d2::', space), "mutant", "exec"), mutant.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_norm, "cross_gpu_batch_norm", mutant.cross_gpu_batch_norm)
        return run_layer(rank, xs, dys, "one_reduce", group_size, torch.contiguous_format)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_layer_turns_the_suite_red(pool4, name):
    old, _ = MUTANTS[name]
    assert old in SOURCE, "the mutant's line is not in the source any more: mutate its successor"
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
