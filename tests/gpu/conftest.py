"""The card of the tests marked `gpu`, or the reason why they skip."""

import os

import pytest
import torch

from tests.gpu.card import Card

# Before cuBLAS is first called: then alone it gives the same bits every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def card() -> Card:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return Card()
