"""Steps that are not finite: which end a run, and which term and windows are named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdfast.common.errors import UserError
from kdfast.training import nonfinite
from kdfast.training.nonfinite import EXAMINED_AT_MOST, NonfiniteSteps
from kdfast.training.step import StepReport
from tests import forks


def weights(run):
    return torch.cat([each.detach().flatten().clone() for each in run.model.parameters()])


def trained(setup, **changes):
    run = setup(max_tokens_per_micro_batch=150, **changes)
    run.optimizer.updates = 2  # the first rates are 0
    run.teacher = run.training.loader.teacher_logits
    run.nonfinite = NonfiniteSteps(run.training, run.windows)
    return run


def set_scale(run, scale):
    run.optimizer.scaler.load_state_dict({**run.optimizer.scaler.state_dict(), "scale": scale})


def step(run, number=0, windows=12):
    report = run.step(number, np.arange(windows))
    return report, run.nonfinite.check(report, run.step.micro_batches)


def halted(run, number=0):
    """The sentence that ends the run, whose weights have not changed."""
    before = weights(run)
    with pytest.raises(UserError) as caught:
        step(run, number)
    assert torch.equal(weights(run).nan_to_num(7.0), before.nan_to_num(7.0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoil_teacher(run, window):
    start, end = run.windows.window_start[window : window + 2]
    run.teacher[start + 3 : end, 1] = np.nan


def test_a_good_step_is_none_and_costs_nothing(setup, monkeypatch):
    run = trained(setup)
    monkeypatch.setattr(nonfinite, "examine", None)
    monkeypatch.setattr(nonfinite, "nonfinite_weight", None)
    report, said = step(run)
    assert said is None and not report.skipped


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_teacher_with_nan_for_one_window(setup, capsys, precision):
    run = trained(setup, precision=precision, dropout=0.1)
    window = 5
    spoil_teacher(run, window)
    question = run.windows.question_ids[int(run.windows.question[window])]
    sentence = halted(run, 7)
    assert sentence.startswith("Step 7 did not reach the weights, as the loss is nan: ")
    assert (
        f"not finite is the teacher's logits of question {question} (window {window})" in sentence
    )
    assert sentence.count("(window") == 1 and "delete the teacher's logits" in sentence
    assert ("the loss scale was 1024 from step 7" in sentence) == (precision == "fp16")


def test_skip_counts_and_goes_on(setup, monkeypatch):
    run = trained(setup, on_nonfinite="skip")
    spoil_teacher(run, 5)
    before = weights(run)
    for number in range(5):
        report, said = step(run, number)
        assert report.skipped and f"Step {number}" in said
        assert ("(window 5)" in said) == (number < EXAMINED_AT_MOST)
    assert torch.equal(weights(run), before) and run.optimizer.updates == 2
    report, said = step(run, 5, windows=5)
    assert said is None and run.optimizer.updates == 3 and not torch.equal(weights(run), before)


@pytest.mark.parametrize("action", ["halt", "skip"])
def test_nan_in_the_students_weights_ends_the_run(setup, action):
    run = trained(setup, on_nonfinite=action)
    with torch.no_grad():
        run.model.reader.base_model.encoder.layer[1].output.dense.weight[3, 4] = np.nan
    sentence = halted(run)
    assert (
        "the student's weights are not finite (reader.bert.encoder.layer.1.output.dense.weight)"
        in sentence
    )
    assert "give a sound --student" in sentence


def test_a_huge_learning_rate_is_not_learned_from(setup):
    run = trained(setup, learning_rate=1e30)
    step(run)
    with pytest.raises(UserError) as caught:
        for number in range(1, 9):
            step(run, number)
    assert "lower --learning_rate" in str(caught.value)


def test_a_window_without_a_token(setup):
    run = trained(setup)
    micro_batch = run.training.loader.micro_batch

    def emptied(indices):
        batch = micro_batch(indices)
        mask = torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
        mask[torch.from_numpy(indices == 4)] = False
        # What the attention of such a window gives depends on the kernel: NaN, or a plain mean.
        teacher = batch.teacher_logits.masked_fill(~mask[..., None], np.nan)
        return replace(
            batch,
            mask=mask,
            teacher_logits=teacher,
            inputs={**batch.inputs, "attention_mask": mask},
        )

    run.training.loader.micro_batch = emptied
    report = StepReport(0, np.nan, {}, np.nan, 0.0, 12, 0, 0, 0, 0, True)
    findings = nonfinite.examine(run.training, report, run.training.cuts.cut(np.arange(12)))
    assert [(each.term, each.windows) for each in findings] == [(nonfinite.EMPTY, [4])]


def test_a_loss_alone_keeps_the_weights(setup):
    run = trained(setup)
    loss = run.training.objective.loss

    def spoilt(logits, batch):
        row_loss, parts = loss(logits, batch)
        return row_loss + np.inf, parts  # of the same gradient

    run.training.objective = replace(run.training.objective, loss=spoilt)
    assert "as the loss is inf" in halted(run)
    assert run.optimizer.updates == 2


def overflowing(run, is_bad=lambda: True):
    """The gradient of window 5 overflows at any scale, and its loss is finite."""
    loss = run.training.objective.loss
    own = torch.from_numpy(run.windows.padded([5])["input_ids"])[0]

    def spoilt(logits, batch):
        row_loss, parts = loss(logits, batch)
        ids = batch.inputs["input_ids"]
        is_window = [torch.equal(row[: len(own)], own) for row in ids]
        if is_bad() and any(is_window):
            factor = torch.where(torch.tensor(is_window), np.inf, 1.0)[:, None]
            row_loss.register_hook(lambda slope: torch.where(slope == 0, slope, slope * factor))
        return row_loss, parts

    run.training.objective = replace(run.training.objective, loss=spoilt)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_gradient_alone_is_a_fault_without_a_scaler(setup, precision):
    run = trained(setup, precision=precision)
    overflowing(run)
    sentence = halted(run)
    assert "the gradient's norm is" in sentence
    assert f"not finite is {nonfinite.GRADIENT} of question n2 (window 5);" in sentence


def test_the_scalers_overflow_is_a_fault_at_the_floor_only(setup):
    run = trained(setup, precision="fp16")
    overflowing(run)
    for number in range(10):  # from 1024 down to 2
        report, said = step(run, number)
        assert report.skipped and said is None
        assert report.loss_scale == 2.0 ** (10 - number)
    sentence = halted(run, 10)
    assert "overflows at the lowest loss scale, 1: " in sentence
    assert (
        f"not finite is {nonfinite.OVERFLOW} of question" in sentence and "(window 5)" in sentence
    )
    assert "8 from step 7, 4 from step 8, 2 from step 9, 1 from step 10" in sentence
    assert "with 11 overflows lately" in sentence and "give --mixed_precision no" in sentence
    assert run.optimizer.scaler.get_scale() == 1.0  # and not below


def test_twenty_overflows_in_a_row_are_a_fault(setup):
    run = trained(setup, precision="fp16")
    set_scale(run, 2.0**60)
    overflowing(run)
    for number in range(19):
        assert step(run, number)[1] is None
    assert "the gradient has overflowed in 20 steps in a row" in halted(run, 19)


def test_a_good_step_between_overflows_starts_the_count_again(setup):
    run = trained(setup, precision="fp16")
    set_scale(run, 2.0**40)
    bad = True
    overflowing(run, lambda: bad)
    for number in range(19):
        step(run, number)
    bad = False
    set_scale(run, 1.0)
    assert not step(run, 19)[0].skipped and run.optimizer.overflows == 0
    bad = True
    set_scale(run, 2.0**40)
    assert step(run, 20)[1] is None and run.optimizer.overflows == 1


def test_the_rank_that_has_the_window_tells(setup):
    run = trained(setup)

    def rank_step(rank):
        from kdfast.common.ranks import Ranks

        try:
            with Ranks.join() as run.training.run.ranks:
                if rank == 1:  # as where a file of that node is damaged
                    window = run.training.cuts.cut(np.arange(12))[0][0]
                    spoil_teacher(run, window)
                step(run, 3)
        except UserError as error:
            return str(error), error.is_repeated

    found = forks.run(2, rank_step)
    assert found[0][0] == found[1][0] and "at rank 1" in found[0][0]
    assert sorted(repeated for _, repeated in found) == [False, True]


def test_what_is_no_longer_found_is_said(setup):
    run = trained(setup)
    report = run.step(0, np.arange(12))
    with pytest.raises(UserError, match="run again it was finite"):
        run.nonfinite.check(replace(report, loss=float("inf")), run.step.micro_batches)
