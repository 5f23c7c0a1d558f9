import pytest


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Folders and files of a small run, and `run(**flags)`, which calls the program."""
    from tests.programs import World  # loads transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return World(tmp_path)
