"""Fixtures of the tests that train on the digits."""

import pytest


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
