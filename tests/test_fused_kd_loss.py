"""The public face: forms, types and reductions of the loss, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdfast
from kdfast import FusedKDLoss, fused_kd_loss, kd_loss_rows

KINDS = [("kl_div", "haystack"), ("kl_div", "hf"), ("mse", "haystack")]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SETTINGS = {
    "temperature": 1.5,
    "distillation_loss_weight": 0.75,
    "distillation_loss": "kl_div",
    "convention": "haystack",
}


def batch(size=4, length=9, dtype=torch.float64):
    """Arguments of fused_kd_loss: every window has an answer but the last, whose end is ignored."""
    generator = torch.Generator().manual_seed(size + length)
    student, teacher = torch.randn(2, size, length, 2, generator=generator, dtype=torch.float64)
    positions = torch.randint(length, (2, size), generator=generator)
    positions[1, -1:] = -100
    return {
        "student_logits": (3 * student).to(dtype).requires_grad_(),
        "teacher_logits": (3 * teacher).to(dtype),
        "start_positions": positions[0],
        "end_positions": positions[1],
    } | SETTINGS


def gradient(arguments, scale=1.0):
    """The student's gradient of scale * mean loss, and the loss."""
    student = arguments["student_logits"]
    loss = fused_kd_loss(**arguments)
    return torch.autograd.grad(loss * scale, student)[0], loss.detach()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_mean_divides_by_b_whatever_is_ignored():
    arguments = batch()
    arguments["mask"] = torch.ones(4, 9, dtype=torch.bool)
    arguments["mask"][2] = False
    each = fused_kd_loss(**arguments, reduction="none")
    assert each.shape == (4,)
    assert each[2] == 0
    assert (each[[0, 1, 3]] > 0).all()
    torch.testing.assert_close(fused_kd_loss(**arguments), each.sum() / 4)
    torch.testing.assert_close(fused_kd_loss(**arguments, reduction="sum"), each.sum())
    slope, _ = gradient(arguments)
    assert (slope[2] == 0).all()
    assert (slope[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("kind, convention", KINDS)
def test_rows_add_up_to_the_loss(kind, convention):
    arguments = batch() | {"distillation_loss": kind, "convention": convention}
    each = fused_kd_loss(**arguments, reduction="none")
    student, teacher = arguments.pop("student_logits"), arguments.pop("teacher_logits")
    row_loss, row_parts = kd_loss_rows(student, teacher, **arguments, mask=None, backend=None)
    assert row_loss.shape == (4, 2)
    assert row_parts.shape == (4, 2, 2)
    assert row_loss.requires_grad
    assert not row_parts.requires_grad
    torch.testing.assert_close(row_loss.sum(1), each)
    torch.testing.assert_close(row_loss, 0.75 * row_parts[..., 0] + 0.25 * row_parts[..., 1])
    assert row_parts[3, 1, 1] == 0  # the ignored end


def test_pair_and_tensor_and_int32_positions_agree():
    arguments = batch()
    expected, loss = gradient(arguments)
    pair = tuple(head.detach().clone().requires_grad_() for head in unbound(arguments, "student"))
    for student in (arguments["student_logits"], pair):
        for teacher in (arguments["teacher_logits"], list(unbound(arguments, "teacher"))):
            for dtype in (torch.int64, torch.int32):
                positions = {
                    name: arguments[name].to(dtype) for name in ("start_positions", "end_positions")
                }
                logits = {"student_logits": student, "teacher_logits": teacher}
                # Rows that lie otherwise in memory are summed in another order.
                given = fused_kd_loss(**arguments | logits | positions).detach()
                torch.testing.assert_close(given, loss, rtol=1e-14, atol=0)
    heads = torch.autograd.grad(fused_kd_loss(**arguments | {"student_logits": pair}), pair)
    torch.testing.assert_close(torch.stack(heads, 2), expected, rtol=1e-13, atol=1e-16)


def unbound(arguments, whose):
    return arguments[f"{whose}_logits"].unbind(2)


@pytest.mark.parametrize(
    "view",
    [
        lambda logits: logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda logits: logits.repeat_interleave(2, 2)[..., ::2],
        lambda logits: logits.flip(1).repeat(1, 2, 1).flip(1)[:, 9:],
    ],
    ids=["heads apart", "every second column", "a slice of a longer row"],
)
def test_strided_views(view):
    arguments = batch()
    expected, loss = gradient(arguments)
    student = view(arguments["student_logits"].detach())
    teacher = view(arguments["teacher_logits"])
    assert not student.is_contiguous()
    before = student.clone(), teacher.clone()
    viewed = {"student_logits": student.requires_grad_(), "teacher_logits": teacher}
    slope, viewed_loss = gradient(arguments | viewed)
    torch.testing.assert_close(viewed_loss, loss)
    torch.testing.assert_close(slope, expected)
    for logits, copied in zip((student, teacher), before, strict=True):
        same(logits.detach(), copied)


def test_empty_batch():
    arguments = batch(size=0)
    arguments["mask"] = torch.ones(0, 9, dtype=torch.bool)
    assert fused_kd_loss(**arguments, reduction="sum") == 0
    assert fused_kd_loss(**arguments, reduction="none").shape == (0,)
    slope, mean = gradient(arguments)
    assert mean.isnan()
    assert slope.shape == (0, 9, 2)


@pytest.mark.parametrize("kind, convention", KINDS)
def test_padding_changes_nothing(kind, convention):
    arguments = batch() | {"distillation_loss": kind, "convention": convention}
    expected, loss = gradient(arguments)
    padded = {
        name: torch.nn.functional.pad(arguments[name].detach(), (0, 0, 0, 5), value=math.nan)
        for name in ("student_logits", "teacher_logits")
    }
    padded["student_logits"].requires_grad_()
    mask = torch.arange(14).expand(4, 14) < 9
    slope, padded_loss = gradient(arguments | padded | {"mask": mask})
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(slope[:, :9], expected)
    assert (slope[:, 9:] == 0).all()


def test_without_a_teacher_at_weight_zero():
    arguments = batch() | {"distillation_loss_weight": 0.0}
    expected, loss = gradient(arguments)
    slope, alone = gradient(arguments | {"teacher_logits": None})
    same(alone, loss)
    same(slope, expected)
    positions = arguments["start_positions"], arguments["end_positions"]
    settings = SETTINGS | {"distillation_loss_weight": 0.0, "mask": None, "backend": None}
    _, parts = kd_loss_rows(arguments["student_logits"], None, *positions, **settings)
    assert (parts[..., 0] == 0).all()


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("student_dtype", FLOATS)
def test_types_of_loss_and_gradient(student_dtype, teacher_dtype):
    arguments = batch(dtype=student_dtype)
    arguments["teacher_logits"] = arguments["teacher_logits"].to(teacher_dtype)
    slope, loss = gradient(arguments)
    assert loss.dtype == (torch.float64 if student_dtype == torch.float64 else torch.float32)
    assert slope.dtype == student_dtype
    in_double = {
        "student_logits": arguments["student_logits"].detach().double().requires_grad_(),
        "teacher_logits": arguments["teacher_logits"].double(),
    }
    exact_slope, exact_loss = gradient(arguments | in_double)
    # fp32 inside whatever comes in; then one rounding of the gradient to the student's type.
    inside = torch.finfo(loss.dtype).eps
    assert (loss - exact_loss).abs() <= 16 * inside * exact_loss
    limits = torch.finfo(student_dtype)
    rounding = limits.eps / 2 * exact_slope.abs() + limits.smallest_normal * limits.eps
    assert ((slope.double() - exact_slope).abs() <= rounding + 16 * inside).all()


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("length", [1, 7, 383, 385, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradient_is_rounded_once_after_the_loss_scale(dtype, length, scale):
    arguments = batch(size=8, length=length, dtype=dtype)
    slope, loss = gradient(arguments, scale)
    floats = {
        "student_logits": arguments["student_logits"].detach().float().requires_grad_(),
        "teacher_logits": arguments["teacher_logits"].float(),
    }
    # A scale of a power of two is exact in fp32, so both roads meet in the same bits.
    float_slope, float_loss = gradient(arguments | floats)
    same(loss, float_loss)
    same(slope, (float_slope * scale).to(dtype))


def test_autocast_changes_nothing():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = batch(dtype=dtype)
        expected, loss = gradient(arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            slope, inside = gradient(arguments)
        same(inside, loss)
        same(slope, expected)


def test_nothing_is_read_by_the_host():
    arguments = batch() | {"mask": torch.ones(4, 9, dtype=torch.bool)}
    # Fake tensors have no values: whatever reads one, or sizes a result by one, raises.
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        for kind, convention in KINDS:
            loss = fused_kd_loss(**fakes | {"distillation_loss": kind, "convention": convention})
            loss.backward()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            loss.item()


def test_module_is_the_function():
    arguments = batch()
    tensors = [arguments[name] for name in arguments if name not in SETTINGS]
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    for reduction in ("mean", "sum", "none"):
        module = FusedKDLoss(**SETTINGS, reduction=reduction, backend="reference")
        for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            settings = {"reduction": reduction, "backend": "reference"}
            same(one(*tensors, mask=mask), fused_kd_loss(**arguments, mask=mask, **settings))
            same(one(*tensors), fused_kd_loss(**arguments, **settings))
    assert not list(module.parameters())
    assert repr(module) == (
        "FusedKDLoss(temperature=1.5, distillation_loss_weight=0.75, "
        "distillation_loss='kl_div', convention='haystack', reduction='none', backend='reference')"
    )
    assert repr(FusedKDLoss()) == (
        "FusedKDLoss(temperature=1.0, distillation_loss_weight=0.5, "
        "distillation_loss='kl_div', convention='haystack', reduction='mean', backend=None)"
    )


def test_the_function_can_be_pickled():
    assert pickle.loads(pickle.dumps(fused_kd_loss)) is kdfast.fused_kd_loss


LOGITS = torch.zeros(4, 9, 2)
HEADS = torch.zeros(4, 9)

REFUSED = [
    ({"teacher_logits": LOGITS.clone().requires_grad_()}, "teacher's logits require grad.*no_grad"),
    (
        {"teacher_logits": (HEADS, HEADS.clone().requires_grad_())},
        "teacher's logits require grad.*no_grad",
    ),
    ({"teacher_logits": None}, "None with distillation_loss_weight 0.75, expected .*weight 0"),
    ({"teacher_logits": LOGITS[:, :8]}, r"teacher.*\(4, 8\), expected the student's \(4, 9\)"),
    ({"teacher_logits": LOGITS[:3]}, r"teacher.*\(3, 9\), expected the student's \(4, 9\)"),
    ({"student_logits": HEADS}, r"student.*shape \(4, 9\), expected one \(B, L, 2\) tensor or"),
    ({"student_logits": torch.zeros(4, 9, 3)}, r"student.*shape \(4, 9, 3\), expected one"),
    ({"student_logits": torch.zeros(2, 4, 9)}, r"student.*shape \(2, 4, 9\), expected one"),
    ({"student_logits": (HEADS, HEADS[:, :8])}, r"shape \(4, 9\) and \(4, 8\), expected one"),
    ({"student_logits": (LOGITS, LOGITS)}, r"shape \(4, 9, 2\) and \(4, 9, 2\), expected one"),
    ({"student_logits": (HEADS,)}, r"logits are \(Tensor\), expected one"),
    ({"student_logits": [HEADS] * 3}, r"logits are \(Tensor, Tensor, Tensor\), expected one"),
    ({"student_logits": (HEADS, None)}, r"logits are \(Tensor, NoneType\), expected one"),
    ({"student_logits": None}, "student's logits are NoneType, expected one"),
    ({"student_logits": LOGITS.numpy()}, "student's logits are ndarray, expected one"),
    ({"student_logits": (HEADS, HEADS.half())}, "float32 on cpu and .*float16 on cpu, .*same"),
    ({"student_logits": LOGITS.long()}, "student's logits are torch.int64, expected float16"),
    ({"teacher_logits": LOGITS.bool()}, "teacher's logits are torch.bool, expected float16"),
    ({"student_logits": LOGITS + 0j}, "student's logits are torch.complex64, expected float16"),
    ({"student_logits": LOGITS.to_sparse()}, "sparse_coo on cpu, expected dense tensors"),
    ({"teacher_logits": LOGITS.to("meta")}, "strided on meta, expected dense tensors with data"),
    (
        {"student_logits": torch.nested.nested_tensor([LOGITS[0]] * 4, layout=torch.jagged)},
        "student's logits are a nested tensor, expected dense tensors",
    ),
    ({"student_logits": LOGITS[:, :0], "teacher_logits": LOGITS[:, :0]}, "L = 0.*at least one"),
    ({"start_positions": torch.zeros(3).long()}, r"start_positions.*\(3,\), .*shape \(4,\)"),
    ({"start_positions": torch.zeros(4, 1).long()}, r"start_positions.*\(4, 1\), .*shape \(4,\)"),
    ({"end_positions": torch.zeros(4)}, "end_positions is torch.float32 .*int64 or torch.int32"),
    ({"end_positions": [0, 0, 0, 0]}, "end_positions is list, expected torch.int64 or"),
    ({"end_positions": torch.zeros(4).long().to("meta")}, "is on meta, expected .* cpu"),
    ({"mask": torch.ones(4, 9).long()}, "mask is torch.int64 .*, expected torch.bool"),
    ({"mask": torch.ones(4, 8).bool()}, r"mask.*shape \(4, 8\), .*shape \(4, 9\)"),
    ({"mask": torch.ones(9).bool()}, r"mask.*shape \(9,\), .*shape \(4, 9\)"),
    ({"mask": torch.ones(4, 9).bool().to_sparse()}, "mask is torch.sparse_coo, expected a dense"),
    ({"backend": "cuda"}, "backend is 'cuda', expected None or .* on cpu: 'reference'"),
]

REFUSED_SETTINGS = [
    ({"temperature": 0}, "temperature is 0, expected a finite number above 0"),
    ({"temperature": -1.0}, "temperature is -1.0, expected a finite number above 0"),
    ({"temperature": math.inf}, "temperature is inf, expected a finite number above 0"),
    ({"temperature": math.nan}, "temperature is nan, expected a finite number above 0"),
    ({"temperature": 10**400}, "temperature is 10+, expected a finite number above 0"),
    ({"temperature": torch.tensor(1.0)}, "temperature is a Tensor, expected a Python float"),
    ({"temperature": "1"}, "temperature is a str, expected a Python float"),
    ({"distillation_loss_weight": 1.01}, "weight is 1.01, expected 0 to 1 inclusive"),
    ({"distillation_loss_weight": -0.1}, "weight is -0.1, expected 0 to 1 inclusive"),
    ({"distillation_loss_weight": math.nan}, "weight is nan, expected 0 to 1 inclusive"),
    ({"distillation_loss_weight": torch.tensor(0.5)}, "weight is a Tensor, expected a Python"),
    ({"distillation_loss": "kl"}, "distillation_loss is 'kl', expected one of 'kl_div', 'mse'"),
    ({"distillation_loss": None}, "distillation_loss is None, expected one of 'kl_div', 'mse'"),
    ({"convention": "HF"}, "convention is 'HF', expected one of 'haystack', 'hf'"),
    ({"reduction": "batchmean"}, "reduction is 'batchmean', expected one of 'mean', 'sum', 'none'"),
]


@pytest.mark.parametrize("change, message", REFUSED + REFUSED_SETTINGS)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message) as refusal:
        fused_kd_loss(**batch(dtype=torch.float32) | change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change, message", REFUSED_SETTINGS)
def test_module_refuses_its_settings_when_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        FusedKDLoss(**change)


@pytest.mark.parametrize("name", ["teacher_logits", "start_positions", "end_positions", "mask"])
def test_devices_that_differ_are_refused(name):
    arguments = batch() | {"mask": torch.ones(4, 9, dtype=torch.bool)}
    with FakeTensorMode() as mode:
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        given = arguments[name]
        elsewhere = torch.empty(given.shape, dtype=given.dtype, device="cuda:0")
        with pytest.raises(ValueError, match="on cuda:0, expected the student's cpu"):
            fused_kd_loss(**arguments | {name: elsewhere})
