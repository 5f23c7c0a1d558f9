"""The trials of tests/gpu on the pretended device: on a card they run for the first time otherwise.

What makes no sense here stands in tests/gpu/test_only_on_a_card.py.
"""

import os
from unittest import mock

import pytest

from tests.gpu.card import PretendedCard
from tests.gpu.trials import TRIALS
from tests.pretended.device import pretended

CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
ALWAYS = ("step roberta", "step deberta-v2", "reads mpnet", "resume fp16", "memory", "launches")
CASES = [
    pytest.param(name, marks=() if name.startswith(ALWAYS) else pytest.mark.slow) for name in TRIALS
]


@pytest.mark.pretended
@pytest.mark.program
@pytest.mark.parametrize("trial", CASES)
def test_it_holds_on_the_pretended_device(trial, tmp_path):
    with mock.patch.dict(os.environ, CUBLAS), pretended() as device:
        TRIALS[trial](PretendedCard(device), tmp_path)
