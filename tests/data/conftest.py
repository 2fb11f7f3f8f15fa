"""Fixtures of the tests of COCO data sets."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from megdet_d2.data import coco
from tests.helpers.coco_data import Data


@pytest.fixture
def clean_catalogs(monkeypatch):
    monkeypatch.setattr(coco, "_registered", dict(coco._registered))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def train(tmp_path):
    return Data(tmp_path, "my_train")


@pytest.fixture
def val(tmp_path):
    return Data(tmp_path, "my_val")
