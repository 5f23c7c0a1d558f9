"""The trials on a real card. Skipped where there is none; tests/pretended runs them everywhere."""

import pytest

from tests.gpu.trials import TRIALS


@pytest.mark.gpu
@pytest.mark.parametrize("trial", TRIALS)
def test_it_holds_on_the_card(card, trial, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    TRIALS[trial](card, tmp_path)
