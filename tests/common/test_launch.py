from kdfast.common import launch
from tests import forks


def test_the_first_value_stays_as_long_as_torchrun_runs(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def starts(rank):
        found = [launch.recall("a")]
        for value in ("0", "3"):
            launch.remember("a", value)
        return [*found, launch.recall("a"), launch.recall("b")]

    assert forks.run(1, starts) == [[None, "0", None]]
    assert forks.run(1, starts) == [[None, "0", None]]


def test_without_torchrun_nothing_is_kept():
    launch.remember("a", "0")
    assert launch.recall("a") is None
