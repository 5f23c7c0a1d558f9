import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kdfast.common import ranks
from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.data.batches import MicroBatchPolicy, shard
from kdfast.data.read import read_examples
from kdfast.evaluation import scoring
from kdfast.teachers import cache, teacher_pass
from tests import corpora, forks

CPU = torch.device("cpu")


def vector(run):
    return torch.cat([each.grad.flatten() for each in run.model.parameters()])


def weights(run):
    return torch.cat([each.detach().flatten().clone() for each in run.model.parameters()])


def distance(values, gradient):
    """Of a list of numbers from a gradient, relative to that one's norm."""
    other = torch.tensor(values, dtype=gradient.dtype)
    return (other - gradient).norm() / gradient.norm()


def step_of(run, indices):
    """One step, its gradient before the update, and the report."""
    kept = []
    run.optimizer.unscale = lambda: kept.append(vector(run))  # in fp64 there is no scale
    report = run.step(3, indices)
    return kept[0], report


@pytest.mark.program
@pytest.mark.parametrize(("count", "windows"), [(2, 12), (3, 11), (4, 3), (4, 1)])
def test_ranks_have_the_gradient_of_one(setup, monkeypatch, count, windows):
    run = setup(dtype=torch.float64, max_tokens_per_micro_batch=150)
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 5000)
    indices = np.arange(windows)
    run.optimizer.updates = 2

    def rank_step(rank):
        with Ranks.join() as run.training.run.ranks:
            gradient, report = step_of(run, indices)
            return gradient.tolist(), report, weights(run).tolist()

    found = forks.run(count, rank_step)
    gradient, report = step_of(run, indices)
    for theirs, their_report, their_weights in found:
        assert (
            torch.tensor(theirs, dtype=torch.float64) - gradient
        ).norm() < 1e-10 * gradient.norm()
        assert their_weights == found[0][2] and theirs == found[0][0]
        assert their_report == found[0][1]
        assert their_report.loss == pytest.approx(report.loss, rel=1e-6)
        assert their_report.tokens == report.tokens and their_report.windows == windows
    assert found[0][1].micro_batches >= min(count, windows)


def test_the_rank_with_the_least_memory_decides_for_all(setup):
    run = setup(dtype=torch.float64, max_tokens_per_micro_batch=1000)
    indices = np.arange(12)

    def hook(gradient):
        if run.training.run.ranks.rank == 1 and run.training.cuts.policy.max_tokens > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.reader.base_model.encoder.layer[0].output.dense.weight.register_hook(hook)

    def rank_step(rank):
        with Ranks.join() as run.training.run.ranks:
            gradient, report = step_of(run, indices)
            return gradient.tolist(), report.max_tokens, run.training.cuts.policy.max_tokens

    found = forks.run(2, rank_step)
    gradient, _ = step_of(run, indices)
    assert (
        torch.tensor(found[0][0], dtype=torch.float64) - gradient
    ).norm() < 1e-10 * gradient.norm()
    assert found[0] == found[1] and found[0][1] == found[0][2] <= 200


def test_a_gradient_that_is_not_finite_at_one_rank_is_skipped_by_all(setup):
    run = setup()
    before = weights(run)
    run.optimizer.updates = 2

    def rank_step(rank):
        with Ranks.join() as run.training.run.ranks:
            if rank == 1:
                run.training.loader.teacher_logits = np.full_like(
                    run.training.loader.teacher_logits, np.nan
                )
            report = run.step(0, np.arange(8))
            return report.skipped, torch.equal(weights(run), before)

    assert forks.run(2, rank_step) == [(True, True)] * 2


def test_shares_balance_and_hold_every_window_once():
    draw = np.random.default_rng(0)
    rule = MicroBatchPolicy(768, 1e-3, 1e-4, 2e-7)
    lengths, windows = draw.integers(30, 385, 80), draw.permutation(1000)[:80]
    shares = shard(windows, lengths, 7, rule)
    assert sorted(np.concatenate(shares)) == sorted(windows)
    of = dict(zip(windows, lengths, strict=True))
    loads = [sum(of[w] * (1e-4 + 2e-7 * of[w]) for w in share) for share in shares]
    assert max(loads) < 1.05 * min(loads)
    assert [len(share) for share in shard(windows[:3], lengths[:3], 4, rule)] == [1, 1, 1, 0]
    again = shard(windows, lengths, 7, rule)
    assert all(map(np.array_equal, shares, again))


@pytest.mark.parametrize("count", [2, 3])
def test_one_cache_is_written_by_many(setup, tmp_path, count):
    run = setup()
    source = cache.Source("weights", "tokenizer", run.windows.key, "no")

    def fill(folder, ranks_=None, progress=lambda done: None):
        teacher = teacher_pass.TeacherPass(source, run.model, run.windows, CPU, 150)
        return np.array(teacher_pass.fill_cache(folder, teacher, progress, ranks_))

    def rank_fill(rank):
        with Ranks.join() as group:
            return fill(tmp_path / "many", group).tolist()

    found = forks.run(count, rank_fill)
    alone = fill(tmp_path / "one")
    assert all(np.array_equal(np.array(each, dtype=np.float16), alone) for each in found)
    assert sorted(path.name for path in (tmp_path / "many/teacher" / source.key).iterdir()) == [
        "SHA256SUMS",
        "header.json",
        "logits.npy",
    ]


def test_a_pass_that_many_began_is_ended_by_one(setup, tmp_path, monkeypatch):
    run = setup()
    source = cache.Source("weights", "tokenizer", run.windows.key, "no")
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    teacher = teacher_pass.TeacherPass(source, run.model, run.windows, CPU, 150)

    def rank_fill(rank):
        calls = []

        def progress(windows):
            calls.append(windows)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        with Ranks.join() as group:
            teacher_pass.fill_cache(tmp_path, teacher, progress, group)

    processes, _, keeper = forks.start(2, rank_fill)
    for process in processes:
        process.join(60)
    keeper.kill()
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    counted = []
    ended = np.array(teacher_pass.fill_cache(tmp_path, teacher, counted.append))
    assert counted[0] > 0 and sum(counted) == len(run.windows)
    whole = teacher_pass.fill_cache(tmp_path / "whole", teacher)
    assert np.array_equal(ended, whole)


def test_evaluation_is_shared_and_counts_no_window_twice(setup, tmp_path):
    run = setup()
    file = corpora.write(tmp_path / "train.json")
    validation = scoring.Validation(run.windows, read_examples(file), 30, 20)

    def rank_score(rank):
        with Ranks.join() as group:
            result = validation.score(run.model, Run(ranks=group))
            return result.metrics, result.answers.never_null

    alone = validation.score(run.model, Run())
    for found in forks.run(3, rank_score):
        assert found == (alone.metrics, alone.answers.never_null)


def outcome(work):
    """What a program prints at a rank: nothing, or the error's sentence."""
    try:
        with Ranks.join() as group:
            work(group)
    except UserError as error:
        return "" if error.is_repeated else str(error)
    return "done"


def test_ranks_that_disagree_are_named_with_what_differs():
    def rank_agree(rank):
        facts = {"settings": 1, "training data": "b" if rank == 2 else "a"}
        return outcome(lambda group: group.assert_same_on_all_ranks(facts))

    found = forks.run(3, rank_agree)
    sentence = "Rank 2 differs from rank 0 in its training data"
    assert sum(each.startswith(sentence) for each in found) == 1 and found.count("") == 2


def test_a_rank_that_fails_is_named_to_the_others():
    def rank_fail(rank):
        def work(group):
            if rank == 1:
                raise UserError("The disk is full.")
            group.barrier()

        return outcome(work)

    found = forks.run(3, rank_fail)
    assert found[1] == "The disk is full."
    for rank in (0, 2):
        wanted = f"Rank {rank} stops, because rank 1 failed: The disk is full."
        assert found[rank] == wanted


def test_a_rank_that_is_killed_does_not_leave_the_others_hanging():
    def rank_die(rank):
        def work(group):
            group.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            group.sum_array(torch.ones(10))

        return outcome(work)

    processes, queue, keeper = forks.start(2, rank_die)
    processes[1].join(60)
    said = queue.get()[1]
    keeper.kill()
    assert said.startswith("Rank 0 stops, because another rank died without a word")


def test_a_text_is_shared_whole():
    def rank_share(rank):
        with Ranks.join() as group:
            return group.share("größer" if rank == 0 else "other"), group.share("")

    assert forks.run(2, rank_share) == [("größer", "")] * 2


def test_buckets_keep_the_order_and_the_size(monkeypatch):
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 400)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (50, 40, 30, 500, 1)]
    buckets = ranks._buckets(parameters)
    assert [[each.numel() for each in bucket] for bucket in buckets] == [[50, 40], [30], [500], [1]]


def test_alone_nothing_is_communicated(setup):
    group = Ranks()
    assert group.share("x") == "x" and group.is_first and not dist.is_initialized()
    extras = torch.ones(3)
    assert group.sum_gradients([], extras) is extras
    group.barrier()
    group.assert_same_on_all_ranks({"a": 1})
    assert (
        replace(MicroBatchPolicy(1, 1, 1, 1), parts=2).cut(np.empty(0, int), np.empty(0, int)) == []
    )
