"""Fixtures of the tests that train: images of two shapes, and the digits."""

import pytest

from tests.helpers.training import write_images


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Returns DATASETS.COCO of 24 images of two shapes; tests only read them."""
    return write_images(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def datasets_root(digits_folder):
    """Keeps the digits of all these tests in one folder, so that they are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", digits_folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
