"""Tests the simulation on MLPerf's systems of several machines, rank by rank."""

import statistics

import numpy as np

from .back_test import BackTest, Row
from .mlperf import basis, compute_seconds, systems, variation, work_of
from .simulation import simulate_steps
from .stragglers import ImageCost

STEPS = 100


def back_test(seed: int = 0) -> BackTest:
    """Returns images/s of the systems that no fit has used, simulated, from c and v of the fit."""
    v, _, _ = variation()
    fitted = [system for system in systems() if system.is_fitted]
    rng = np.random.default_rng(seed)
    rows = []
    for system in systems():
        if system.is_fitted:
            continue
        source, chosen = basis(system, fitted)
        c = statistics.median(compute_seconds(other, v) for other in chosen)
        steps = simulate_steps(work_of(system, c, v), system.topology, ImageCost(v), STEPS, rng)
        rate = system.batch / float(steps.seconds.mean())
        rows.append(Row(system.name, system.images_per_s, rate, False, source))
    return BackTest("The same systems, simulated rank by rank", "images/s", tuple(rows), {})
