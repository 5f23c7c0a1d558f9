import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.common.errors import UserError
from kdfast.fused_kd_loss import fused_kd_loss
from kdfast.models.window_loader import StreamedLoader
from kdfast.training.optimizer import ScaledAdamW, learning_rate
from kdfast.training.step import StepSums, seed_generators
from tests.steppers import gradient

SPLITS = {
    "accumulate 1": {"gradient_accumulation_steps": 1},
    "accumulate 2": {"gradient_accumulation_steps": 2},
    "accumulate 5": {"gradient_accumulation_steps": 5},
    "more than windows": {"gradient_accumulation_steps": 99},
    "by tokens": {"max_tokens_per_micro_batch": 150},
    "alone": {"max_tokens_per_micro_batch": 1},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["kl_div", "mse"])
def test_every_split_has_the_gradient_of_the_padded_batch(setup, split, kind):
    run = setup(dtype=torch.float64, distillation_loss=kind, **SPLITS[split])
    indices = np.arange(len(run.windows))
    batches = run.training.cuts.cut(indices)
    ours, report = gradient(run, batches)
    # The padded batch, through the public function alone.
    run.model.zero_grad()
    batch = run.training.loader.micro_batch(indices)
    config = run.config
    loss = fused_kd_loss(
        run.model(**batch.inputs),
        batch.teacher_logits,
        batch.start_positions,
        batch.end_positions,
        temperature=config.loss.temperature,
        distillation_loss_weight=config.loss.distillation_loss_weight,
        distillation_loss=kind,
        mask=batch.mask,
    )
    loss.backward()
    whole = torch.cat([each.grad.flatten() for each in run.model.parameters()])
    assert len(batches) > 1 or split == "accumulate 1"
    assert (ours - whole).norm() < 1e-10 * whole.norm()
    torch.testing.assert_close(torch.tensor(report.loss).double(), loss.detach(), rtol=1e-6, atol=0)


def test_the_gradient_check_sees_a_mean_of_means(setup):
    run = setup(dtype=torch.float64, gradient_accumulation_steps=5)
    batches = run.training.cuts.cut(np.arange(len(run.windows)))
    assert len({len(batch) for batch in batches}) > 1
    whole, _ = gradient(run, batches)
    parts = [gradient(run, [batch])[0] for batch in batches]
    wrong = torch.stack(parts).mean(0)
    assert (wrong - whole).norm() > 1e-4 * whole.norm()


def test_loss_is_the_weighted_sum_of_its_parts(setup):
    run = setup(distillation_loss_weight=0.3)
    report = run.step(0, np.arange(8))
    assert report.loss == pytest.approx(
        0.3 * report.parts["soft"] + 0.7 * report.parts["hard"], rel=1e-5
    )
    assert min(report.parts.values()) > 0 and report.windows == 8
    assert report.tokens == run.windows.lengths[:8].sum() <= report.padded_tokens


def test_a_step_replays_whatever_ran_before(setup):
    run = setup(dropout=0.3, max_tokens_per_micro_batch=150)
    batches = run.training.cuts.cut(np.arange(12))
    first, _ = gradient(run, batches, step=3)
    other, _ = gradient(run, batches, step=4)
    torch.rand(17)
    again, _ = gradient(run, batches, step=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generators_are_seeded_as_torch_seeds_them_on_the_given_device_alone(monkeypatch):
    cards = tuple(torch.Generator() for _ in range(3))
    monkeypatch.setattr(torch.cuda, "default_generators", cards)
    others = [card.initial_seed() for card in cards]
    seed_generators(torch.device("cuda", 1), 42, 3, 0, 1)
    seed = int(np.random.SeedSequence((42, 3, 0, 1)).generate_state(1, np.uint64)[0] >> 1)
    drawn = torch.rand(9)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(9))
    assert [card.initial_seed() for card in cards] == [others[0], seed, others[2]]


@pytest.fixture
def streamed(setup):
    """A training whose loader gathers a step ahead, and what it was told to expect, and when."""
    run = setup(max_tokens_per_micro_batch=300)
    run.training.loader = loader = StreamedLoader(run.training.loader, run.training.run.device)
    run.expected, run.loss, expect = [], run.training.objective.loss, loader.expect

    def noted(cuts):
        run.expected.append(("cut", [len(cut) for cut in cuts]))
        expect(cuts)

    def loss(output, batch):
        run.expected.append(("loss", len(output)))
        return run.loss(output, batch)

    loader.expect = noted
    run.training.objective = replace(run.training.objective, loss=loss)
    return run


def test_the_next_step_is_cut_once_this_one_is_on_its_way(streamed):
    run = streamed
    indices = np.arange(12)
    sizes = [len(cut) for cut in run.training.cuts.cut(indices)]
    losses = [("loss", size) for size in sizes]
    run.step(0, indices)
    assert len(sizes) > 2
    assert run.expected == [("cut", sizes), *losses, ("cut", sizes)]  # the first was not foretold
    ready = [future for _, future in run.training.loader._expected]
    run.step(1, indices)
    assert run.expected[len(losses) + 2 :] == [*losses, ("cut", sizes)]
    assert all(future.done() and not future.cancelled() for future in ready)


def test_the_next_step_is_cut_by_what_fits(streamed):
    run = streamed
    refuse_above(run, 150, torch.OutOfMemoryError("CUDA out of memory."))
    run.step(0, np.arange(12))
    cuts = run.training.cuts.cut(np.arange(12))
    assert [what for what, _ in run.expected].count("cut") == 3  # the first, the smaller, the next
    assert run.expected[-1] == ("cut", [len(cut) for cut in cuts])


def test_a_step_that_is_dropped_makes_nothing_ready(streamed, monkeypatch):
    run = streamed
    monkeypatch.setattr(
        StepSums,
        "must_drop",
        lambda sums, done, of: setattr(sums, "dropped", done == 2) or done == 2,
    )
    assert run.step(0, np.arange(12)) is None
    assert [what for what, _ in run.expected] == ["cut", "loss", "loss"]
    assert run.training.loader._expected == []


def test_micro_batches_of_a_step_draw_different_dropout(setup):
    run = setup(dropout=0.5)
    twice = [np.array([1]), np.array([1])]
    whole, _ = gradient(run, twice)
    one, _ = gradient(run, [np.array([1])])
    assert not torch.allclose(whole, one)


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, `.item()` and `if tensor` among them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_no_host_read_in_the_micro_batches_and_the_update(setup, precision, monkeypatch):
    run = setup(precision=precision, max_tokens_per_micro_batch=150)
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)

        def counted(*given):
            found = original(*given)
            seen.append((name, reads.count))
            return found

        monkeypatch.setattr(owner, name, counted)

    watched(StepSums, "add")
    if (
        precision == "no"
    ):  # a CPU's GradScaler and, under it, fused AdamW read on the host themselves
        watched(ScaledAdamW, "step")
    with HostReads() as reads:
        run.step(0, np.arange(12))
    assert len(seen) > 2 and {count for _, count in seen} == {0}
    with HostReads() as reads:
        assert torch.ones(1).sum() == 1
    assert reads.count == 1


def weights(run):
    return torch.cat([each.detach().flatten().clone() for each in run.model.parameters()])


def adam_steps(run):
    return {float(state["step"]) for state in run.optimizer.adamw.state.values()}


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_bad_gradient_never_reaches_the_weights(setup, precision):
    run = setup(precision=precision)
    for step in range(3):
        run.step(step, np.arange(8))
    before, updates = weights(run), run.optimizer.updates
    scale = run.optimizer.scaler.get_scale() if precision == "fp16" else None
    steps = adam_steps(run)
    good = run.training.loader.teacher_logits
    run.training.loader.teacher_logits = np.full_like(good, np.nan)
    report = run.step(3, np.arange(8))
    assert report.skipped
    assert torch.equal(weights(run), before)
    assert run.optimizer.updates == updates and adam_steps(run) == steps
    if precision == "fp16":  # which is not to blame
        assert run.optimizer.scaler.get_scale() == scale and run.optimizer.overflows == 0
    run.training.loader.teacher_logits = good
    report = run.step(4, np.arange(8))
    assert not report.skipped
    assert report.lr == learning_rate(1e-3, updates, 10, 0.2)
    assert not torch.equal(weights(run), before)
    assert run.optimizer.updates == updates + 1


def test_an_overflow_of_the_scale_is_skipped_and_the_scale_falls(setup):
    run = setup(precision="fp16")
    run.optimizer.scaler.load_state_dict({**run.optimizer.scaler.state_dict(), "scale": 2.0**30})
    before = weights(run)
    skipped = 0
    while run.optimizer.updates < 2:
        skipped += run.step(skipped, np.arange(8)).skipped
        assert skipped < 40
    assert skipped > 3
    assert run.optimizer.scaler.get_scale() == 2.0 ** (30 - skipped)
    assert not torch.equal(weights(run), before)


def test_half_precision_learns_what_full_precision_learns(setup):
    losses = {}
    for precision in ("no", "fp16", "bf16"):
        run = setup(precision=precision)
        losses[precision] = [run.step(step, np.arange(16)).loss for step in range(6)]
    assert losses["no"][-1] < losses["no"][0]
    np.testing.assert_allclose(losses["fp16"], losses["no"], rtol=5e-3)
    np.testing.assert_allclose(losses["bf16"], losses["no"], rtol=3e-2)


def test_gradients_are_clipped_after_unscaling(setup):
    norms = {}
    for precision in ("no", "fp16"):
        run = setup(precision=precision, max_grad_norm=1e-3)
        gradient_, _ = gradient(run, run.training.cuts.cut(np.arange(8)), step=0)
        report = run.step(0, np.arange(8))
        assert report.grad_norm == pytest.approx(gradient_.norm().item(), rel=1e-4)
        # Adam's first mean is a tenth of the gradient that it was given.
        moments = [state["exp_avg"] for state in run.optimizer.adamw.state.values()]
        given = torch.cat([each.flatten() for each in moments]).norm().item() / 0.1
        assert given == pytest.approx(1e-3, rel=1e-3)
        norms[precision] = report.grad_norm
    assert norms["fp16"] == pytest.approx(norms["no"], rel=1e-2)


def test_schedule():
    rates = [learning_rate(1.0, updates, 10, 0.2) for updates in range(11)]
    assert rates == [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
    assert learning_rate(1.0, 0, 10, 0.0) == 1.0
    assert learning_rate(1.0, 0, 4, 0.2) == 1.0  # int(0.8) warm-up steps are none


def test_one_update_is_adamw_with_decay_everywhere(setup):
    run = setup(dtype=torch.float64, max_grad_norm=1e9)
    run.optimizer.updates = 2
    start = weights(run)
    grad, _ = gradient(run, run.training.cuts.cut(np.arange(8)), step=0)
    report = run.step(0, np.arange(8))
    assert report.lr == 1e-3
    # The first step of Adam moves by the gradient over its own size.
    expected = start * (1 - 1e-3 * 0.01) - 1e-3 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(weights(run), expected, rtol=1e-9, atol=1e-12)


def test_without_a_teacher_the_gold_spans_are_all(setup):
    report = setup(teacher=False).step(0, np.arange(8))
    assert report.parts["soft"] == 0.0 and report.loss == pytest.approx(report.parts["hard"])


def refuse_above(run, max_tokens, error):
    """Raises `error` in the backward pass of the first layer, however often, above a budget."""

    def hook(gradient):
        policy = run.training.cuts.policy
        if policy.parts is None and policy.max_tokens > max_tokens:
            raise error

    run.model.reader.base_model.encoder.layer[0].output.dense.weight.register_hook(hook)


OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."),
    "host": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_step_that_runs_out_of_memory_is_run_again_in_smaller_parts(setup, error):
    run = setup(dropout=0.3, max_tokens_per_micro_batch=1000)
    refuse_above(run, 300, OUT_OF_MEMORY[error])
    run.step(0, np.arange(12))
    report = run.step(1, np.arange(12))
    assert run.training.cuts.policy.max_tokens <= 300 and report.micro_batches > 2
    other = setup(dropout=0.3, max_tokens_per_micro_batch=run.training.cuts.policy.max_tokens)
    other.step(0, np.arange(12))
    assert other.step(1, np.arange(12)) == report
    assert torch.equal(weights(run), weights(other))


def test_what_did_not_fit_is_freed_before_the_next_try(setup, monkeypatch):
    run = setup(max_tokens_per_micro_batch=1000)
    refuse_above(run, 300, torch.OutOfMemoryError("CUDA out of memory."))
    losses, alive = [], []
    scale, forget = ScaledAdamW.scale, ScaledAdamW.zero_grad

    def kept(self, loss):
        losses.append(weakref.ref(loss))
        return scale(self, loss)

    def looked(self):
        alive.append(losses[-1]() is not None)
        forget(self)

    monkeypatch.setattr(ScaledAdamW, "scale", kept)
    monkeypatch.setattr(ScaledAdamW, "zero_grad", looked)
    run.step(0, np.arange(12))
    assert alive and not any(alive)


def test_memory_for_less_than_a_window_is_said(setup):
    run = setup(max_tokens_per_micro_batch=1000)
    refuse_above(run, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(UserError, match="not enough memory for a single window"):
        run.step(0, np.arange(12))


def test_other_errors_are_not_taken_for_missing_memory(setup):
    run = setup()
    refuse_above(run, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.step(0, np.arange(12))


def test_equal_parts_are_doubled_where_memory_does_not_suffice(setup):
    run = setup(gradient_accumulation_steps=2)
    tried = []

    def hook(gradient):
        tried.append(run.training.cuts.policy.parts)
        if run.training.cuts.policy.parts < 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.reader.base_model.encoder.layer[0].output.dense.weight.register_hook(hook)
    report = run.step(0, np.arange(12))
    assert sorted(set(tried)) == [2, 4, 8] and report.micro_batches == 8


def test_gradient_checkpointing_changes_no_gradient(setup):
    gradients = []
    for flag in (False, True):
        run = setup(dropout=0.3, gradient_checkpointing=flag, dtype=torch.float64)
        calls = []
        inner = run.model.reader.base_model.encoder.layer[0].intermediate
        inner.register_forward_hook(lambda *arguments, calls=calls: calls.append(1))
        batches = run.training.cuts.cut(np.arange(12))
        gradients.append(gradient(run, batches)[0])
        assert len(calls) == (2 if flag else 1) * len(batches)
    assert torch.equal(*gradients)


@pytest.mark.program
def test_compiled_for_any_shape_in_a_handful_of_compilations(setup):
    run = setup(dtype=torch.float64, torch_compile=True)
    compiled = CompileCounter()
    run.training.forward = run.model.compiled(compiled)
    everything = np.arange(len(run.windows))
    eager = run.training.loader
    shapes = set()
    for max_tokens in (1, 100, 200, 300, 400, 700, 2000):
        run.training.cuts.policy = replace(run.training.cuts.policy, max_tokens=max_tokens)
        cuts = run.training.cuts.cut(everything)
        shapes |= {batch.inputs["input_ids"].shape for batch in eager.micro_batches(cuts)}
        ours, _ = gradient(run, cuts)
        forward, run.training.forward = run.training.forward, run.model
        whole, _ = gradient(run, cuts)
        run.training.forward = forward
        assert (ours - whole).norm() < 1e-10 * whole.norm()
    assert len(shapes) > 12 and all(width % 8 == 0 for _, width in shapes)
    assert compiled.frame_count <= 6
