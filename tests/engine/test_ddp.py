"""Tests DDP on CPU: the patch of Detectron2 that it needs."""

import pytest

from tests.helpers.models import tiny_config


def test_the_ddp_patch_lasts_as_long_as_the_constructor():
    import detectron2.engine.defaults as defaults

    from megdet_d2.engine.ddp import ddp_without_device_ids

    stock = defaults.create_ddp_model
    with pytest.raises(RuntimeError), ddp_without_device_ids(tiny_config()):
        assert defaults.create_ddp_model.keywords == {"device_ids": None}
        raise RuntimeError
    assert defaults.create_ddp_model is stock
    gpu = tiny_config("MODEL.DEVICE", "cuda")
    with ddp_without_device_ids(gpu):
        assert defaults.create_ddp_model is stock
