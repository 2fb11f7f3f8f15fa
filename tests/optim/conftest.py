"""Fixtures of the tests that train."""

import pytest

from tests.helpers.training import write_images


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Returns DATASETS.COCO of 24 images of two shapes; tests only read them."""
    return write_images(tmp_path_factory.mktemp("mixed"))
