"""Wrong layers have to turn the suite red: a mutant is the real source with one line changed."""

import types
from pathlib import Path

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
FORWARD = 'all_reduce(group, layer, "forward", n, sums, squares)'
BACKWARD = 'all_reduce(group, layer, "backward", sums.double().flatten())'
LOCAL_SUMS = "    n, sums, squares = _local_sums(x, valid)\n"
MUTANTS = {
    "none": ("", ""),
    "ranks weighted equally": (
        FORWARD,
        'all_reduce(group, layer, "forward", n / n, sums / n, squares / n)',
    ),
    "statistics of this process alone": (FORWARD, "n, sums, squares"),
    "biased running variance": ("var * (n / max(n - 1, 1))", "var"),
    "running statistics updated twice": (
        "        running_mean.lerp_(",
        "        running_var.lerp_(new[1], factor)\n        running_mean.lerp_(",
    ),
    "backward reduction left out": (BACKWARD, "(sums.double().flatten(),)"),
    "local count in the backward": (
        "(total / count.clamp(min=1))",
        "(total / (x.numel() // x.shape[1]))",
    ),
    "gradient of γ summed over ranks": (
        "return sums, (total",
        "return total.to(mean.dtype).view(2, -1), (total",
    ),
    "x̂ left out of dx": (
        "scale, mean_dy, mean_dy_xhat), nothing",
        "scale, mean_dy, 0 * mean_dy_xhat), nothing",
    ),
    "the world instead of the group": (
        LOCAL_SUMS,
        "    group = torch.distributed.group.WORLD.group_name\n" + LOCAL_SUMS,
    ),
}


def run_mutant(rank, name, xs, dys, group_size):
    old, new = MUTANTS[name]
    source = SOURCE.replace(old, new, 1) if old else SOURCE
    # Operators of its own, or they would replace the real ones.
    mutant = types.ModuleType("megdet_d2.norm.mutant")
    mutant.__package__ = "megdet_d2.norm"
    space = f"mutant{list(MUTANTS).index(name)}_{group_size or 0}"
    source = source.replace("megdet_d2::", f"{space}::").replace("ops.megdet_d2", f"ops.{space}")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
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
