"""Tests of this folder make their tensors on the device that `helpers.DEVICE` names."""

from collections.abc import Iterator

import pytest
import torch
from helpers import DEVICE

# These are about torch's own CPU kernels and pure functions.
ON_CPUS_ONLY = ("test_launch.py", "test_moe.py")

# These say of each tensor where it is, as users do.
OWN_DEVICES = ("test_models.py", "test_on_device.py")


def pytest_ignore_collect(collection_path) -> bool | None:
    return True if DEVICE.type != "cpu" and collection_path.name in ON_CPUS_ONLY else None


@pytest.fixture(autouse=True)
def _on_the_device(request) -> Iterator[None]:
    if request.path.name not in OWN_DEVICES:
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
