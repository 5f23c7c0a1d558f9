"""Numbers that go bad in a step: what is a fault, what it is put down to, what is kept of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdfast import replay
from kdfast.distill import faults, watch
from kdfast.distill.watch import FOLDERS_AT_MOST, Watch
from kdfast.errors import UserError
from tests import forks


def weights(run):
    return torch.cat([each.detach().flatten().clone() for each in run.model.parameters()])


def watched(setup, tmp_path, **changes):
    run = setup(max_tokens_per_micro_batch=150, **changes)
    run.updater.updates = 2  # the first rates are 0
    run.teacher = run.stepper.feed.teacher_logits
    run.watch = Watch(tmp_path / "out", run.stepper, run.windows, run.loaded.tokenizer)
    run.out = tmp_path / "out"
    return run


def set_scale(run, scale):
    run.updater.scaler.load_state_dict({**run.updater.scaler.state_dict(), "scale": scale})


def step(run, number=0, windows=12):
    report = run.stepper.run(number, np.arange(windows))
    return report, run.watch.see(report)


def halted(run, number=0):
    """The sentence that ends the run, whose weights have not changed."""
    before = weights(run)
    with pytest.raises(UserError) as caught:
        step(run, number)
    assert torch.equal(weights(run).nan_to_num(7.0), before.nan_to_num(7.0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def facts(run, number=0):
    return json.loads((run.out / f"fault-{number}" / "fault.json").read_text())


def spoil_teacher(run, window):
    start, end = run.windows.window_start[window : window + 2]
    run.teacher[start + 3 : end, 1] = np.nan


def test_a_good_step_is_none_and_costs_nothing(setup, tmp_path, monkeypatch):
    run = watched(setup, tmp_path)
    monkeypatch.setattr(watch, "examine", None)
    monkeypatch.setattr(watch, "broken_weight", None)
    report, said = step(run)
    assert said is None and not report.skipped and not run.out.exists()


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_teacher_with_nan_for_one_window(setup, tmp_path, capsys, precision):
    run = watched(setup, tmp_path, precision=precision, dropout=0.1)
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

    told = facts(run, 7)
    assert [each["windows"] for each in told["findings"]] == [[window]]
    assert sorted(w for cut in told["windows"] for w in cut) == list(range(12))
    assert told["settings"]["seed"] == 42 and told["precision"] == precision
    folder = run.out / "fault-7"
    kept = load_file(folder / "batch.safetensors")
    for number, indices in enumerate(told["windows"]):
        assert kept[f"{number}.student_logits"].shape == kept[f"{number}.teacher_logits"].shape
        batch = run.stepper.feed.micro_batch(np.array(indices))
        assert torch.equal(batch.inputs["input_ids"], kept[f"{number}.input_ids"])

    assert replay.main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert f"window {window}, question {question}" in said and "fault is here too" in said


def test_a_replay_has_the_bits_of_the_step(setup, tmp_path, monkeypatch):
    run = watched(setup, tmp_path, dropout=0.3)
    spoil_teacher(run, 5)
    ran = []
    rows = run.stepper.rows
    monkeypatch.setattr(
        run.stepper, "rows", lambda *key: (ran.append(rows(*key)[0].detach()), rows(*key))[1]
    )
    halted(run)
    kept = load_file(run.out / "fault-0" / "batch.safetensors")
    count = len(facts(run)["windows"])
    assert count > 2 and torch.isfinite(ran[0]).all()
    for number in range(count):
        assert torch.equal(kept[f"{number}.student_logits"], ran[number])
    told = replay.faults.examine
    again = []

    def examined(*given):
        again.append(told(*given))
        return again[0]

    monkeypatch.setattr(replay.faults, "examine", examined)
    replay.replay(run.out / "fault-0")
    for number, each in enumerate(again[0][1]):
        assert torch.equal(each.output, ran[number])


def test_skip_counts_and_goes_on(setup, tmp_path, monkeypatch):
    run = watched(setup, tmp_path, on_nonfinite="skip")
    spoil_teacher(run, 5)
    before = weights(run)
    for number in range(5):
        report, said = step(run, number)
        assert report.skipped and f"Step {number}" in said
        assert ("(window 5)" in said) == (number < FOLDERS_AT_MOST)
    assert torch.equal(weights(run), before) and run.updater.updates == 2
    assert len(list(run.out.glob("fault-*"))) == FOLDERS_AT_MOST
    report, said = step(run, 5, windows=5)
    assert said is None and run.updater.updates == 3 and not torch.equal(weights(run), before)


@pytest.mark.parametrize("action", ["halt", "skip"])
def test_nan_in_the_students_weights_ends_the_run(setup, tmp_path, capsys, action):
    run = watched(setup, tmp_path, on_nonfinite=action)
    with torch.no_grad():
        run.model.reader.base_model.encoder.layer[1].output.dense.weight[3, 4] = np.nan
    sentence = halted(run)
    assert (
        "the student's weights are not finite (reader.bert.encoder.layer.1.output.dense.weight)"
        in sentence
    )
    assert "go on from a sound checkpoint" in sentence
    assert replay.main([str(run.out / "fault-0")]) == 1
    with pytest.raises(UserError, match=r"not finite any more .*layer\.1\.output"):
        faults.check_weights(run.model)


def test_a_huge_learning_rate_is_not_learned_from(setup, tmp_path):
    run = watched(setup, tmp_path, learning_rate=1e30)
    step(run)
    with pytest.raises(UserError) as caught:
        for number in range(1, 9):
            step(run, number)
    assert "lower --learning_rate" in str(caught.value)


def test_a_window_without_a_token(setup, tmp_path):
    run = watched(setup, tmp_path)
    micro_batch = run.stepper.feed.micro_batch

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

    run.stepper.feed.micro_batch = emptied
    findings, _ = faults.examine(run.stepper, 0, None, run.stepper.cut(np.arange(12)), 12)
    assert [(each.term, each.windows) for each in findings] == [(faults.EMPTY, [4])]


def test_a_loss_alone_keeps_the_weights(setup, tmp_path):
    run = watched(setup, tmp_path)
    rows = run.stepper.rows

    def spoilt(*key):
        logits, row_loss, parts = rows(*key)
        return logits, row_loss + np.inf, parts  # of the same gradient

    run.stepper.rows = spoilt
    assert "as the loss is inf" in halted(run)
    assert run.updater.updates == 2


def overflowing(run, is_bad=lambda: True):
    """The gradient of window 5 overflows at any scale, and its loss is finite."""
    rows = run.stepper.rows

    def spoilt(step, number, batch):
        logits, row_loss, parts = rows(step, number, batch)
        cut = run.stepper.cut(np.arange(12))[number]
        if is_bad() and 5 in cut:
            factor = torch.ones(len(cut), 1)
            factor[cut.tolist().index(5)] = np.inf
            row_loss.register_hook(lambda slope: torch.where(slope == 0, slope, slope * factor))
        return logits, row_loss, parts

    run.stepper.rows = spoilt


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_gradient_alone_is_a_fault_without_a_scaler(setup, tmp_path, precision):
    run = watched(setup, tmp_path, precision=precision)
    overflowing(run)
    sentence = halted(run)
    assert "the gradient's norm is" in sentence
    assert f"not finite is {faults.GRADIENT} of question n2 (window 5);" in sentence


def test_the_scalers_overflow_is_a_fault_at_the_floor_only(setup, tmp_path):
    run = watched(setup, tmp_path, precision="fp16")
    overflowing(run)
    for number in range(10):  # from 1024 down to 2
        report, said = step(run, number)
        assert report.skipped and said is None
        assert report.loss_scale == 2.0 ** (10 - number)
    sentence = halted(run, 10)
    assert "overflows at the lowest loss scale, 1: " in sentence
    assert f"not finite is {faults.OVERFLOW} of question" in sentence and "(window 5)" in sentence
    assert "8 from step 7, 4 from step 8, 2 from step 9, 1 from step 10" in sentence
    assert "with 11 overflows lately" in sentence and "give --mixed_precision no" in sentence
    assert run.updater.scaler.get_scale() == 1.0  # and not below
    assert facts(run, 10)["scales"][0] == [0, 1024.0]


def test_twenty_overflows_in_a_row_are_a_fault(setup, tmp_path):
    run = watched(setup, tmp_path, precision="fp16")
    set_scale(run, 2.0**60)
    overflowing(run)
    for number in range(19):
        assert step(run, number)[1] is None
    assert "the gradient has overflowed in 20 steps in a row" in halted(run, 19)


def test_a_good_step_between_overflows_starts_the_count_anew(setup, tmp_path):
    run = watched(setup, tmp_path, precision="fp16")
    set_scale(run, 2.0**40)
    bad = True
    overflowing(run, lambda: bad)
    for number in range(19):
        step(run, number)
    bad = False
    set_scale(run, 1.0)
    assert not step(run, 19)[0].skipped and run.updater.overflows == 0
    bad = True
    set_scale(run, 2.0**40)
    assert step(run, 20)[1] is None and run.updater.overflows == 1


def test_the_rank_that_has_the_window_tells(setup, tmp_path):
    run = watched(setup, tmp_path)

    def rank_step(rank):
        from kdfast.distill.ranks import Ranks

        try:
            with Ranks.join() as run.stepper.ranks:
                if rank == 1:  # as where a file of that node is damaged
                    window = run.stepper.cut(np.arange(12))[0][0]
                    spoil_teacher(run, window)
                step(run, 3)
        except UserError as error:
            return str(error), error.is_repeated, int(facts(run, 3)["rank"])

    found = forks.run(2, rank_step)
    assert found[0][0] == found[1][0] and "at rank 1" in found[0][0]
    assert sorted(repeated for _, repeated, _ in found) == [False, True]
    assert found[0][2] == 1 and len(list(run.out.glob("fault-*"))) == 1


def test_a_fault_is_said_though_it_cannot_be_kept(setup, tmp_path):
    run = watched(setup, tmp_path)
    spoil_teacher(run, 5)
    run.out.write_text("a file in the way")
    sentence = halted(run)
    assert "(window 5)" in sentence and "could not be kept" in sentence


def test_what_a_replay_no_longer_finds_is_said(setup, tmp_path):
    run = watched(setup, tmp_path)
    report = run.stepper.run(0, np.arange(12))
    with pytest.raises(UserError, match="run again it was finite"):
        run.watch.see(replace(report, loss=float("inf")))
    assert replay.main([str(run.out / "fault-0")]) == 0


DAMAGE = {
    "no file": lambda folder: (folder / "fault.json").unlink(),
    "format": lambda folder: change(folder, format=9),
    "settings": lambda folder: change(folder, settings={"seed": 1}),
    "step": lambda folder: change(folder, step="x"),
    "precision": lambda folder: change(folder, precision="fp8"),
    "windows": lambda folder: change(folder, windows=[list(range(9))]),
    "tokens": lambda folder: tensors(folder, "0.input_ids", lambda t: t + 10**6),
    "shape": lambda folder: tensors(folder, "0.start_positions", lambda t: t[:, None]),
    "torn": lambda folder: (folder / "batch.safetensors").write_bytes(b"x" * 90),
}


def change(folder, **changes):
    path = folder / "fault.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder, name, new):
    path = folder / "batch.safetensors"
    found = load_file(path)
    save_file({**found, name: new(found[name]).contiguous()}, path)


@pytest.fixture
def left(setup, tmp_path):
    run = watched(setup, tmp_path)
    spoil_teacher(run, 5)
    halted(run)
    return run.out / "fault-0"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(left, capsys, damage):
    DAMAGE[damage](left)
    assert replay.main([str(left)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and str(left) in said
