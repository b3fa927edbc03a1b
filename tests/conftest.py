"""What every test shares: no GPU test runs without a GPU, and none fails for being slow."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The first torch call of a process is far over hypothesis' default deadline of 200 ms.
settings.register_profile("breakgraph", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "breakgraph"))

# Tests are small, and OpenMP threads that spin for a busy core make them ten times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def times_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test measures is not kept for those who use this machine, nor theirs read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"torch {torch.__version__} sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
