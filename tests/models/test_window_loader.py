from itertools import product

import numpy as np
import pytest
import torch

from kdfast.models import inference, window_loader

CPU = torch.device("cpu")


@pytest.fixture
def data(setup):
    run = setup()
    return run.windows, run.training.loader.teacher_logits


def values_of(batch):
    names = ("mask", "start_positions", "end_positions", "teacher_logits")
    values = {name: getattr(batch, name) for name in names} | batch.inputs
    return values | (vars(values["packed"]) if "packed" in values else {})


def assert_equal(one, other):
    one, other = values_of(one), values_of(other)
    assert one.keys() == other.keys()
    for name, theirs in other.items():
        ours = one[name]
        if not isinstance(theirs, torch.Tensor | None):
            assert name == "packed" or ours == theirs
            continue
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


CUTS = {
    "ragged": [np.array([3, 0, 7]), np.array([5]), np.array([2, 9, 11, 4])],
    "one": [np.array([8])],
    "equal": [np.array([1, 1])],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_every_loader_gives_the_same_batches(data, kind, cuts, has_teacher):
    windows, logits = data
    logits = logits if has_teacher else None
    for multiple, packs in product((1, 8), (False, True)):
        layout = window_loader.Layout(multiple, packs)
        host = window_loader.HostLoader(windows, logits, layout)
        if kind == "resident":
            other = window_loader.ResidentLoader(windows, logits, CPU, layout)
        else:
            other = window_loader.StreamedLoader(host, CPU)
        wanted = list(map(host.micro_batch, CUTS[cuts]))
        for _ in range(2):
            for ours, theirs in zip(other.micro_batches(CUTS[cuts]), wanted, strict=True):
                assert_equal(ours, theirs)
        shapes = [batch.inputs["input_ids"].shape for batch in wanted]
        lengths = [windows.lengths[cut] for cut in CUTS[cuts]]
        assert [rows * width for rows, width in shapes] == list(map(layout.tokens, lengths))
        assert all(width % multiple == 0 for _, width in shapes)
        if packs:
            assert all(rows == 1 for rows, _ in shapes)
            continue
        padded = [(each < width).any() for each, (_, width) in zip(lengths, shapes, strict=True)]
        assert [batch.mask is not None for batch in wanted] == padded


@pytest.mark.parametrize(("reserved", "kind"), [(0, "ResidentLoader"), (100, "StreamedLoader")])
def test_the_data_go_to_the_device_where_the_run_leaves_room(data, monkeypatch, reserved, kind):
    windows, logits = data
    needed = window_loader.ResidentLoader.bytes_needed(windows, logits)
    free = int(needed / window_loader.RESIDENT_SHARE) + 50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(window_loader.ResidentLoader, "__init__", lambda *given: None)
    cuda = torch.device("cuda", 0)
    loader = window_loader.make_loader(windows, logits, cuda, window_loader.PADDED, reserved)
    assert type(loader).__name__ == kind


def test_every_tensor_of_a_packed_batch_is_sent(data):
    host = window_loader.HostLoader(*data, window_loader.Layout(packs=True))
    batch = host.micro_batch(np.array([3, 0, 7]))
    sent = values_of(window_loader.map_tensors(batch, torch.clone))
    for name, tensor in values_of(batch).items():
        if isinstance(tensor, torch.Tensor):
            assert sent[name] is not tensor and torch.equal(sent[name], tensor)


def test_teacher_logits_stay_with_their_tokens(data):
    windows, logits = data
    batch = window_loader.HostLoader(windows, logits).micro_batch(np.array([3, 0]))
    for row, window in enumerate((3, 0)):
        begin, length = windows.window_start[window], windows.lengths[window]
        real = batch.teacher_logits[row, :length].numpy()
        np.testing.assert_array_equal(real, logits[begin : begin + length])
        assert not batch.teacher_logits[row, length:].any()


def test_expected_batches_are_gathered_ahead_and_others_on_demand(data):
    windows, logits = data
    host = window_loader.HostLoader(windows, logits)
    gathered = []

    class Watched:
        def micro_batch(self, indices):
            gathered.append(list(indices))
            return host.micro_batch(indices)

    streamed = window_loader.StreamedLoader(Watched(), CPU)
    first, second, third = [np.array([1]), np.array([2])], [np.array([3])], [np.array([4, 5])]
    ready = streamed.micro_batches(first)
    streamed.expect(second)
    assert [len(batch.start_positions) for batch in ready] == [1, 1]
    list(streamed.micro_batches(second))
    assert gathered == [[1], [2], [3]]
    streamed.expect(second)
    (batch,) = streamed.micro_batches(third)
    assert_equal(batch, host.micro_batch(third[0]))
    assert gathered.count([4, 5]) == 1


def test_a_pass_over_all_windows_puts_every_row_in_its_place(setup):
    run = setup()
    rows = np.full((len(run.windows.input_ids), 2), np.nan, np.float32)
    batches = [np.array([4, 2, 9]), np.array([0]), np.array([1, 3])]
    order = []
    for indices, logits in inference.forward_windows(run.model, run.windows, batches, CPU, None):
        order.append(indices)
        rows[window_loader.flat_positions(run.windows, indices)] = logits
    assert all(map(np.array_equal, order, batches))
    for window in (4, 2, 9, 0, 1, 3):
        begin, length = run.windows.window_start[window], run.windows.lengths[window]
        alone = window_loader.HostLoader(run.windows, None).micro_batch(np.array([window]))
        with torch.no_grad():
            wanted = run.model(**alone.inputs)[0].numpy()
        np.testing.assert_allclose(rows[begin : begin + length], wanted, rtol=1e-4, atol=1e-5)
