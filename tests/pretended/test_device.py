"""Each rule of CUDA's is broken once, and the pretended device must see it."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.common.errors import UserError
from kdfast.common.precision import resolve
from tests.gpu.trials import draws_dropout_once
from tests.pretended.device import pretended

pytestmark = pytest.mark.pretended


def test_a_tensor_is_on_the_device_and_computes_as_the_cpu():
    x = torch.randn(3, 4)
    with pretended() as device:
        there = x.to("cuda")
        assert there.device == torch.device("cuda:0") and there.is_cuda
        out = (there @ there.T).softmax(-1)
        assert device.launches == {"mm": 1, "_softmax": 1}
        torch.testing.assert_close(out.cpu(), (x @ x.T).softmax(-1))
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            out.numpy()


def test_devices_do_not_mix():
    with pretended():
        here, there, other = torch.ones(2), torch.ones(2, device="cuda"), torch.ones(2).to("cuda:1")
        for left, right in ((there, here), (here, there), (there, other)):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                left + right
        with pytest.raises(RuntimeError, match="to be on the same device"):
            torch.cat([there, torch.ones(())[None]])
        with pytest.raises(RuntimeError, match="to be on the same device"):
            F.embedding(torch.zeros(1, dtype=torch.int64), torch.ones(3, 4, device="cuda"))
        assert (there * torch.tensor(2.0)).tolist() == [2, 2]  # as CUDA, a number of the CPU
        with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
            torch.ones(2, device="cuda:2")


def test_a_weight_left_on_the_cpu_is_seen_in_forward():
    with pretended():
        model = torch.nn.Linear(2, 2).to("cuda")
        model.bias = torch.nn.Parameter(torch.zeros(2))
        with pytest.raises(RuntimeError, match="to be on the same device"):
            model(torch.ones(1, 2, device="cuda"))


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a tensor of a number": lambda x: torch.tensor(1.0, device=x.device),
    "pageable memory": lambda x: x.copy_(torch.ones(3)),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", READS)
def test_a_host_read_is_counted_with_its_place_and_refused_by_sync_debug_mode(name):
    with pretended() as device:
        x = torch.ones(3, device="cuda")
        READS[name](x)
        (where,) = device.reads
        assert "tests/pretended/test_device.py:" in where and device.reads[where] == 1
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            READS[name](x)


def test_what_waits_for_nothing_is_no_read():
    with pretended() as device:
        torch.cuda.set_sync_debug_mode("error")
        x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        x[x > 0] = 0.0
        x.masked_fill_(x > 0, 1).to("cpu", non_blocking=True)
        assert not device.reads and device.copies == {"to the device, pinned": 1, "to the host": 1}


def _download(x, into_pinned):
    if into_pinned:
        return torch.empty(x.shape).pin_memory().copy_(x, non_blocking=True)
    return x.to("cpu", non_blocking=True)


@pytest.mark.parametrize("into_pinned", [False, True])
def test_a_download_is_nan_until_it_is_waited_for(into_pinned):
    with pretended():
        x = torch.ones(3, device="cuda")
        for wait in (
            lambda event: event.synchronize(),
            lambda event: torch.cuda.current_stream().synchronize(),
            lambda event: torch.cuda.synchronize(),
            lambda event: x.sum().item(),
        ):
            early = torch.cuda.Event()
            early.record()
            host = _download(x, into_pinned)
            event = torch.cuda.Event()
            event.record()
            early.synchronize()
            assert host.isnan().all()
            wait(event)
            assert host.tolist() == [1, 1, 1]
        assert x.to("cpu").tolist() == [1, 1, 1]


def test_an_event_on_the_wrong_stream_orders_nothing():
    with pretended():
        host = torch.ones(3, device="cuda:1").to("cpu", non_blocking=True)
        wrong, right = torch.cuda.Event(), torch.cuda.Event()
        wrong.record()  # on the current device's stream, which is that of cuda:0
        with torch.cuda.device(1):
            right.record()
        wrong.synchronize()
        torch.cuda.synchronize()
        assert host.isnan().all()
        right.synchronize()
        assert host.tolist() == [1, 1, 1]


def test_devices_and_streams_are_current_where_they_were_set():
    with pretended():
        torch.cuda.set_device(1)
        assert torch.ones(1, device="cuda").device.index == torch.cuda.current_device() == 1
        with torch.cuda.device("cuda:0"):
            assert torch.ones(1).cuda().device.index == 0
        assert torch.cuda.current_device() == 1
        side = torch.cuda.Stream()
        assert side.device.index == 1
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() == side
            host = torch.ones(3, device="cuda").to("cpu", non_blocking=True)
        assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
        torch.cuda.current_stream().synchronize()
        assert host.isnan().all()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.current_stream().synchronize()
        assert host.tolist() == [1, 1, 1]
    with pretended():
        assert torch.cuda.current_device() == 0


def test_memory_is_counted_and_runs_out():
    with pretended(free_bytes=4000) as device:
        x = torch.zeros(500, device="cuda")
        assert torch.cuda.memory_allocated() == 2000 and torch.cuda.mem_get_info() == (2000, 4000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(501, device="cuda")
        torch.zeros(500, device="cuda:1")
        view = x[:10]
        del x
        assert torch.cuda.memory_allocated() == 2000
        del view
        assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == 2000
        assert device.cards[1].peak == 2000


def test_memory_runs_out_where_it_was_told_to():
    with pretended() as device:
        table = torch.ones(5, 8, device="cuda")
        ids = torch.zeros(3, 4, dtype=torch.int64, device="cuda")
        device.run_out_at(2)
        F.embedding(ids, table)
        with pytest.raises(torch.OutOfMemoryError):
            F.embedding(ids, table)
        F.embedding(ids, table)
        device.run_out_above(11)
        F.embedding(ids[:2], table)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                F.embedding(ids, table)
        device.never_run_out()
        F.embedding(ids, table)


def test_bf16_begins_with_sm_80():
    for capability, has_it in (((7, 0), False), ((8, 0), True), ((9, 0), True)):
        with pretended(capability=capability) as device:
            gpu = torch.device("cuda")
            assert torch.cuda.get_device_capability() == capability
            q = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16, device=gpu)
            F.scaled_dot_product_attention(q, q, q)
            assert ("_scaled_dot_product_efficient_attention" in device.launches) == has_it
            if has_it:
                assert resolve("bf16", gpu, ["bert"]) == "bf16"
            else:
                with pytest.raises(UserError, match="no bf16"):
                    resolve("bf16", gpu, ["bert"])
                with pytest.raises(RuntimeError, match="no kernel"):
                    torch.ops.aten._efficient_attention_forward(
                        q, q, q, None, None, None, None, None, 0.0, 0, True
                    )


def test_each_device_has_a_generator_of_its_own():
    with pretended():
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = torch.rand(3, device="cuda").tolist()
        assert torch.rand(3).tolist() == expected.tolist()  # the CPU's generator was not used
        second = torch.rand(3, device="cuda").tolist()
        torch.cuda.default_generators[0].manual_seed(1)
        assert torch.rand(3, device="cuda").tolist() == first != second
        assert torch.rand(3, device="cuda:1").tolist() == first
        x = torch.ones(100, device="cuda")
        torch.cuda.manual_seed(3)
        dropped = F.dropout(x, 0.5)
        state = torch.cuda.get_rng_state()
        again = F.dropout(x, 0.5)
        assert not torch.equal(dropped, again)
        torch.cuda.set_rng_state(state)
        assert torch.equal(F.dropout(x, 0.5), again)


def test_packed_attention_draws_another_dropout_in_backward_as_torchs_does():
    with pretended():
        device = torch.device("cuda:0")
        assert draws_dropout_once(device, 0.0) and not draws_dropout_once(device, 0.1)


def test_autocast_scaler_and_fused_adamw_take_cudas_paths():
    with pretended() as device:
        torch.cuda.set_sync_debug_mode("warn")
        model = torch.nn.Linear(4, 4).to("cuda")
        adamw = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cuda")
        device.clear()
        with torch.autocast("cuda", torch.float16):
            out = model(torch.ones(2, 4, device="cuda"))
            assert out.dtype == torch.float16
        scaler.scale(out.float().sum()).backward()
        scaler.unscale_(adamw)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        assert not device.reads
        assert {"addmm", "_amp_foreach_non_finite_check_and_unscale_", "_foreach_norm"} <= set(
            device.launches
        )
        assert device.launches["_fused_adamw_"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_is_one_kernel_forward_and_two_backward(dtype):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8, 4, generator=draw).to(dtype).unbind()
    mask = (torch.arange(8) < torch.tensor([8, 5])[:, None])[:, None, None]
    out = {}
    for place in ("cpu", "cuda"):
        with pretended() as device:
            kept = torch.float32 if place == "cpu" else dtype  # the CPU sums in fp16
            leaves = [each.to(place, kept, copy=True).requires_grad_() for each in (q, k, v)]
            device.clear()
            result = F.scaled_dot_product_attention(*leaves, attn_mask=mask.to(place))
            result.float().square().sum().backward()
            out[place] = [result.detach().cpu(), *(each.grad.cpu() for each in leaves)]
    name = "_scaled_dot_product_efficient_attention"
    assert device.launches[name] == 1 and device.launches[f"{name}_backward"] == 2
    for ours, theirs in zip(out["cuda"], out["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=1e-3, atol=1e-3)


def _packed(q, k, v, lengths, p=0.0, most=None):
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to("cuda")
    most = max(lengths) if most is None else most
    return torch.ops.aten._efficient_attention_forward(
        q, k, v, None, cu, cu, most, most, p, 0, True
    )[0]


def test_packed_windows_attend_to_themselves_alone():
    lengths = (5, 3, 1)
    with pretended() as device:
        q, k, v = torch.randn(3, 1, 9, 2, 4).to("cuda").unbind()
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        out = _packed(*leaves, lengths)
        out.square().sum().backward()
        assert device.launches["_efficient_attention_backward"] == 2
        alone = [each.clone().requires_grad_() for each in (q, k, v)]
        parts = zip(*(each.transpose(1, 2).split(lengths, 2) for each in alone), strict=True)
        expected = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        expected.square().sum().backward()
        torch.testing.assert_close(out.cpu(), expected.transpose(1, 2).cpu())
        for ours, theirs in zip(leaves, alone, strict=True):
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad.cpu())
        with pytest.raises(RuntimeError, match="max_seqlen"):
            _packed(q, k, v, lengths, most=4)
        torch.manual_seed(4)
        dropped = _packed(q, k, v, lengths, p=0.5)
        assert not torch.equal(dropped, _packed(q, k, v, lengths, p=0.5))
        torch.manual_seed(4)
        assert torch.equal(dropped, _packed(q, k, v, lengths, p=0.5))


def test_a_network_in_inference_mode_is_counted_as_one_in_no_grad():
    network = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with pretended() as device:
        network.to("cuda")
        counted = []
        for off in (torch.no_grad, torch.inference_mode):
            device.clear()
            with off():
                out = network(x.to("cuda"))
            counted.append(dict(device.launches))
        assert counted[0] == counted[1] and out.is_inference()
