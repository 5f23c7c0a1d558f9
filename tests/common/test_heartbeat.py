"""Which rank hangs, and how all ranks end then."""

import contextlib
import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from kdfast.common import heartbeat, locks, program, ranks
from kdfast.common.errors import UserError
from kdfast.common.heartbeat import LIMIT, POLL, State
from kdfast.common.ranks import Ranks
from tests import forks

LOOKS = int(LIMIT / POLL)
PATIENT = int(heartbeat.LONG / POLL)


class Observed:
    """A watch of rank 0 that looks when it is told to, and the states of ranks 1 and 2."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(heartbeat, "_own", heartbeat.Progress())
        with monkeypatch.context() as patch:
            patch.setattr(heartbeat.threading.Thread, "start", lambda self: None)
            self.store = dist.PrefixStore("test", dist.HashStore())
            self.watch = heartbeat.Watch(self.store, 0, 3)
        self.states = [State(0, 0, "step 7", LIMIT, True)] * 3

    def look(self, times, **changes):
        """Look so often; changes: rank -> what of beats and done grows, and other fields."""
        for _ in range(times):
            for rank in (1, 2):
                grows = changes.get(f"rank{rank}", ("beats",))
                state = self.states[rank]
                more = {name: getattr(state, name) + 1 for name in grows}
                self.states[rank] = state = state._replace(**more)
                self.store.set(f"progress of {rank}", json.dumps(state))
            self.watch._exchange()
        return self.watch.verdict


@pytest.fixture
def observed(monkeypatch):
    return Observed(monkeypatch)


BOTH = ("beats", "done")


def test_a_stopped_process_is_named(observed):
    with heartbeat.waiting():
        assert not observed.look(LOOKS, rank1=BOTH, rank2=())
        verdict = observed.look(1, rank1=BOTH, rank2=())
    assert verdict.startswith("2 rank 2 hangs, or its machine is out of reach: nothing has been")
    assert "for 10 minutes (the last: step 7)" in verdict


@pytest.mark.parametrize(("patience", "looks"), [(LIMIT, LOOKS), (heartbeat.LONG, PATIENT)])
def test_a_process_that_gets_nothing_done_is_named_after_its_patience(observed, patience, looks):
    observed.states[1] = State(0, 0, "step 7", patience, False)
    with heartbeat.waiting():
        assert not observed.look(looks, rank2=BOTH)
        verdict = observed.look(1, rank2=BOTH)
    assert verdict.startswith("1 rank 1 hangs: its process is there, but has got nothing done for")
    assert f"{patience / 60:.0f} minutes" in verdict


def test_who_waits_does_not_hang_while_another_gets_on(observed):
    observed.states[2] = State(0, 0, "a teacher's pass", LIMIT, False)
    with heartbeat.waiting():
        assert not observed.look(3 * LOOKS, rank2=BOTH)


def test_only_a_rank_that_waits_looks_and_each_wait_begins_at_nothing(observed):
    assert not observed.look(2 * LOOKS, rank1=(), rank2=())
    with heartbeat.waiting():
        assert not observed.look(LOOKS - 1, rank2=())
    assert not observed.look(1, rank2=())
    with heartbeat.waiting():
        assert not observed.look(LOOKS - 1, rank2=())


def test_ranks_that_wait_for_one_another_for_ever_end(observed):
    with heartbeat.waiting():
        assert not observed.look(LOOKS)
        assert observed.look(1).startswith("-1 all ranks have waited for one another")


def test_a_device_that_has_not_done_its_part_is_no_wait(observed):
    is_done = False
    heartbeat.begin_to_wait(lambda: is_done)
    observed.look(1)
    assert not json.loads(observed.store.get("progress of 0"))[-1]
    is_done = True
    observed.look(1)
    assert json.loads(observed.store.get("progress of 0"))[-1]
    heartbeat.report("the end of step 8")
    observed.look(1)
    assert not json.loads(observed.store.get("progress of 0"))[-1]


def test_the_lock_of_another_run_is_waited_for_as_long_as_it_takes(observed, tmp_path, monkeypatch):
    with contextlib.ExitStack() as held:
        held.enter_context(locks.lock(tmp_path / "lock"))
        looks = []

        def look(seconds):
            looks.append(observed.look(1))  # the other ranks wait for this one
            if len(looks) > 2 * LOOKS:
                held.close()

        monkeypatch.setattr(locks.time, "sleep", look)
        with locks.lock(tmp_path / "lock"):
            pass
    assert len(looks) > 2 * LOOKS and not any(looks)
    assert json.loads(observed.store.get("progress of 0"))[-1]  # it looked, as one that waits


def test_a_rank_whose_collective_fails_before_it_has_printed_why_says_so(observed, capsys):
    group = Ranks(0, 3)
    group.store, group.watch = observed.store, observed.watch
    observed.watch.verdict = "2 rank 2 hangs."

    def end():
        with pytest.raises(UserError) as ended, group:
            raise dist.DistBackendError("Connection closed by peer")
        return ended.value

    assert not end().is_repeated
    assert str(end()) == "Rank 0 stops, because rank 2 hangs."
    observed.watch._judge()  # does not end the process, whose main thread does
    assert capsys.readouterr().err == "error: Rank 0 stops, because rank 2 hangs.\n"
    assert end().is_repeated


def ends(path, count, work, after=None):
    """Exit codes of `count` ranks that do work(ranks), and what each printed to stderr."""

    def rank(number):
        def join(_):
            with Ranks.join() as group:
                work(group)

        with (path / str(number)).open("w") as file, contextlib.redirect_stderr(file):
            status = program.run(lambda _: None, join, [])
        forks.leave(status)

    processes, _, keeper = forks.start(count, rank)
    if after:
        after(keeper)
    codes = []
    for number, process in enumerate(processes):
        process.join(5 if number == count - 1 and codes == [2] * (count - 1) else 60)
        codes.append(process.exitcode)
        process.kill()
    keeper.kill()
    return codes, [(path / str(number)).read_text() for number in range(count)]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(heartbeat, "LIMIT", 4.0)
    monkeypatch.setattr(heartbeat, "POLL", 0.1)


def test_all_end_with_a_sentence_where_one_sleeps(short, tmp_path):
    def work(group):
        heartbeat.report("step 3")
        if group.rank == 2:
            time.sleep(60)
        group.barrier()

    codes, said = ends(tmp_path, 4, work)
    assert codes == [2] * 4  # the thread of the one that sleeps reads it, too
    for rank, text in enumerate(said):
        sentence = f"error: Rank {rank} stops, because rank 2 hangs: its process is there, but has "
        assert text.count(sentence) == 1 and "(the last: step 3)" in text
        assert ("Rank 2 is at" in text and __file__ in text) == (rank == 2)


def test_a_long_phase_is_waited_for_while_it_reports(short, tmp_path):
    def work(group):
        heartbeat.report("the start of it")
        if group.rank == 1:
            for number in range(120):
                time.sleep(0.05)
                heartbeat.report(f"window {number}")
        group.barrier()

    assert ends(tmp_path, 2, work) == ([0, 0], ["", ""])


def test_a_failure_is_told_to_ranks_that_wait_outside_of_gloo(short, tmp_path):
    def work(group):
        if group.rank == 1:
            raise UserError("The disk is full.")
        heartbeat.begin_to_wait(lambda: True)  # as in a sum by NCCL
        time.sleep(60)

    codes, said = ends(tmp_path, 2, work)
    assert codes == [2, 2]
    assert "Rank 0 stops, because rank 1 failed: The disk is full." in said[0]


def test_a_store_that_does_not_answer_ends_who_waits(short, tmp_path):
    def work(group):
        group.barrier()
        (tmp_path / f"joined{group.rank}").touch()
        heartbeat.begin_to_wait(lambda: True)
        time.sleep(60)

    def stop(keeper):
        while not all((tmp_path / f"joined{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(keeper.pid, signal.SIGSTOP)

    codes, said = ends(tmp_path, 2, work, stop)
    assert codes == [2, 2]
    assert all("keeps the ranks' store" in text and "4 seconds" in text for text in said)


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "TOGETHER", ranks.timedelta(seconds=1))

    def rank(number):
        if number == 1:
            return ""
        with pytest.raises(UserError) as error:
            Ranks.join()
        return str(error.value)

    assert forks.run(2, rank)[0].startswith("Rank 1 of 2 has not come within")


def test_with_gpus_only_the_gradients_leave_the_host(monkeypatch):
    """NCCL itself cannot run here: how it is asked for, and that no control tensor goes to it."""
    joined = []
    init = dist.init_process_group

    def init_gloo(backend, device_id, **more):
        joined.append((backend, str(device_id)))
        init("gloo", **more)

    def rank(number):
        group = Ranks.join()
        group.assert_same_on_all_ranks({"a": 1})
        group.barrier()
        total = group.sum_array(torch.tensor([1, 2]))
        return joined, group.gather(f"r{number}"), group.any(number == 1), total.tolist()

    monkeypatch.setattr(dist, "init_process_group", init_gloo)
    monkeypatch.setattr(dist, "barrier", None)  # it would take NCCL
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.append(str(device)))
    for number, found in enumerate(forks.run(2, rank)):
        gpu = f"cuda:{number}"
        asked = [gpu, ("cpu:gloo,cuda:nccl", gpu)]
        assert found == (asked, ["r0", "r1"], True, [2, 4])
