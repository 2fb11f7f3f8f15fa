"""Names of earlier versions: they work, and the warning says the new name."""

import importlib
import subprocess
import sys

import pytest

from megdet_d2 import _moved
from megdet_d2.engine import ddp, rollback
from megdet_d2.norm import batch_norm, configure, registry, retinanet


@pytest.mark.parametrize("old", _moved.MODULES)
def test_an_old_module_is_the_new_one(old, monkeypatch):
    new = f"megdet_d2.{_moved.MODULES[old]}"
    monkeypatch.delitem(sys.modules, f"megdet_d2.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"megdet_d2.{old} is now {new}"):
        module = importlib.import_module(f"megdet_d2.{old}")
    target = importlib.import_module(new)
    public = [name for name in vars(target) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(target, name) for name in public)


def test_a_renamed_function_is_the_new_one():
    with pytest.warns(DeprecationWarning, match="settle_buckets is now .*finalize_ddp_buckets"):
        assert ddp.settle_buckets is ddp.finalize_ddp_buckets
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = ddp.nothing_of_this_name


@pytest.mark.parametrize(
    "name, home",
    [
        ("set_bn_size", configure),
        ("describe_norms", configure),
        ("group_ranks", configure),
        ("images_per_group", configure),
        ("separate_retinanet_levels", retinanet),
        ("cgbn_layers", batch_norm),
    ],
)
def test_a_function_that_moved_to_another_module_is_the_new_one(name, home):
    match = f"megdet_d2.norm.registry.{name} is now {home.__name__}.{name}$"
    with pytest.warns(DeprecationWarning, match=match):
        assert getattr(registry, name) is getattr(home, name)


def test_old_module_and_old_name_together():
    with pytest.warns(DeprecationWarning):
        from megdet_d2.engine.guard import Relief
    assert Relief is rollback.ScheduleBackoff


def test_the_warning_points_to_the_user():
    code = "import megdet_d2\nfrom megdet_d2.analysis.noise import GradientNoise\n"
    result = subprocess.run(
        [sys.executable, "-W", "default::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "<string>:2: DeprecationWarning: megdet_d2.analysis.noise is now" in result.stderr
