"""Shared by all tests: real clips and models where they are given, few threads.

Its being here also makes the folder importable, for the parts that several tests share.
"""

import os
from pathlib import Path

# Before any import of numpy, torch or OpenCV: tests run side by side on small machines.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))
# Threads that wait by spinning hold up the other processes of a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def _data_folder() -> Path:
    root = os.environ.get("ANIMATOR_TEST_DATA")
    return (Path(root) if root else ROOT.parent / "shared") / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs real data where there is none."""
    folder = _data_folder()
    if folder.is_dir():
        return
    skip = pytest.mark.skip(reason=f"real data is not at {folder}; set ANIMATOR_TEST_DATA")
    for item in items:
        if item.get_closest_marker("real_data"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import cv2
    import torch

    torch.set_num_threads(THREADS)
    cv2.setNumThreads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real clips, images and models; for tests marked `real_data`."""
    return _data_folder()


@pytest.fixture
def models_env(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ANIMATOR_MODELS points to the small real models."""
    folder = data_root / "models"
    monkeypatch.setenv("ANIMATOR_MODELS", str(folder))
    return folder


@pytest.fixture
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder and cache: what a fresh machine has."""
    folder = tmp_path / "no_models"
    folder.mkdir()
    monkeypatch.setenv("ANIMATOR_MODELS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder
