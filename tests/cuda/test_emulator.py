"""Does the emulator see bugs? In tiny kernels, and in the CUDA rows with a line of them changed."""

import ctypes
import subprocess

import emulator
import pytest
import torch
from test_emulated_rows import INF, check, random_case

pytestmark = pytest.mark.program

# Names of the enum Bug in tiny_kernels.cpp, in its order.
NONE, MISSING_BARRIER, WRITE_AFTER_READ, WRONG_WIDTH, DIVERGENT_SHUFFLE = range(5)
DIVERGENT_BARRIER, EARLY_RETURN, LANE_OUTSIDE_MASK, CALLER_OUTSIDE_MASK = range(5, 9)
UNWRITTEN_SHARED, MISALIGNED, TOO_MANY_THREADS, LOAD_TOO_FAR, VOTES = range(9, 14)

SANITIZERS = ("-fsanitize=address,alignment", "-fno-sanitize-recover=all")
SEEDS = range(6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, rows):
    library = tmp_path_factory.mktemp("tiny") / "tiny.so"
    emulator.compile_cpp(emulator.HERE / "tiny_kernels.cpp", library, ())
    function = ctypes.CDLL(str(library)).tiny
    function.restype = ctypes.c_char_p
    return function


def results(tiny, bug, threads=96):
    """What each seed gives for 3 blocks: a message, or the numbers."""
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in SEEDS:
        out = torch.full((3,), torch.nan)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, out)]
        problem = tiny(bug, ctypes.c_uint64(seed), 3, threads, *pointers, 100)
        found.append(out if problem is None else problem.decode())
    return found, values.sum(1) + values.max(1).values


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_right_kernel(tiny, threads):
    found, want = results(tiny, NONE, threads)
    for out in found:
        torch.testing.assert_close(out, want)


def test_votes_and_shuffles(tiny):
    found, want = results(tiny, VOTES)
    for out in found:
        torch.testing.assert_close(out, want + 1 + 5)


@pytest.mark.parametrize("bug", [MISSING_BARRIER, WRITE_AFTER_READ, WRONG_WIDTH, UNWRITTEN_SHARED])
def test_wrong_numbers(tiny, bug):
    found, want = results(tiny, bug)
    assert any(not torch.allclose(out, want) for out in found)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (DIVERGENT_SHUFFLE, "divergent"),
        (DIVERGENT_BARRIER, "divergent"),
        (EARLY_RETURN, "returned"),
        (LANE_OUTSIDE_MASK, "is not in the mask"),
        (CALLER_OUTSIDE_MASK, "the mask lacks the caller"),
        (MISALIGNED, "misaligned access of 16 bytes"),
        (TOO_MANY_THREADS, "invalid configuration"),
    ],
)
def test_faults(tiny, bug, message):
    found, _ = results(tiny, bug, threads=128)
    # Which thread is caught first is the seed's choice.
    assert all(isinstance(out, str) for out in found) and message in "; ".join(found), found
    after, want = results(tiny, NONE)  # a fault leaves nothing behind
    assert all(torch.allclose(out, want) for out in after)


def sanitized(source, folder, change=None, types="f32"):
    """The program that the address sanitizer watches."""
    flags = (*SANITIZERS, "-DPROGRAM", *emulator.prepare(folder, change, types))
    try:
        emulator.compile_cpp(emulator.HERE / source, folder / "program", flags, shared=False)
    except RuntimeError as error:
        if "asan" in str(error):
            pytest.skip("g++ has no address sanitizer here (libasan)")
        raise
    return folder / "program"


def run(program, *arguments):
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)


def test_sanitizer_sees_a_load_too_far(tmp_path, rows):
    program = sanitized("tiny_kernels.cpp", tmp_path)
    assert run(program, str(NONE)).stdout == "sum 101\n"
    ended = run(program, str(LOAD_TOO_FAR))
    assert ended.returncode != 0 and "heap-buffer-overflow" in ended.stderr


def test_rows_stay_inside_their_operands(tmp_path, rows):
    ended = run(sanitized("rows_asan.cpp", tmp_path, types="f16 f32"))
    assert ended.returncode == 0, ended.stderr[:2000]
    assert ended.stdout == f"{4 * 7 * 8} calls\n"


INSIDE = "first >= 0 && first + V <= length"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{INSIDE};\n  if (inside && window", f"{INSIDE} + 1;\n  if (inside && window"),
        ("const bool in_row = position >= 0 &&", "const bool in_row ="),
        ("if (position >= 0 && position < length) {", "if (position >= 0) {"),
        ("row_loss[row] = parts", "row_loss[row + 1] = parts"),
    ],
    ids=["wide-load", "first-chunk", "last-store", "loss"],
)
def test_sanitizer_sees_a_mutated_row(tmp_path, rows, old, new):
    ended = run(sanitized("rows_asan.cpp", tmp_path, (old, new)))
    assert ended.returncode != 0 and "heap-buffer-overflow" in ended.stderr


def case_of_many_faces():
    """Five warps, holes in the mask, an infinity that must not count."""
    mask = torch.rand(2, 600, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[:, :2] = True
    case = random_case(600, batch=2, mask=mask, weight=0.7)
    case.teacher[0, 300:] -= 1e4
    case.student[0, 300:] = -INF
    case.targets = torch.tensor([0, 1]), torch.tensor([1, 0])
    return case


SHUFFLED_SUM = "x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes"
FIRST_BARRIER = "x[i];\n  }\n  __syncthreads();\n#pragma unroll"


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FIRST_BARRIER, FIRST_BARRIER.replace("  __syncthreads();\n", "")),
        ("scratch() + kMaxWarps * kMaxima", "scratch()"),
        (f"{SHUFFLED_SUM})", f"{SHUFFLED_SUM}, 16)"),
        ("if (warp != 0) return;", "if (warp != 0 || lane >= warps) return;"),
        ("lanes = kMaxWarps / 2", "lanes = kMaxWarps / 8"),
        ("maxima[lane % warps", "maxima[lane"),
        ("if (shrink_tT == A(0) && kind == kKlDiv) sums.soft = A(0);", ""),
        ("s[h][v] = takes_part ?", "s[h][v] = true ?"),
        ("const int first = chunk * V - lead;", "const int first = chunk * V;"),
        ("slope[1][v] = takes_part ?", "slope[1][v] = true ?"),
        ("if (position == row.target)", "if (position == row.target + 1)"),
    ],
    ids=[
        *("missing-barrier", "write-after-read", "shuffle-width", "divergent-shuffle"),
        *("short-tree", "unwritten-shared", "infinity", "mask", "lead", "masked-slope", "target"),
    ],
)
def test_mutated_rows_are_caught(tmp_path, rows, old, new):
    case = case_of_many_faces()
    if "chunk * V" in old:
        case = random_case(37)  # whose second window begins between two boundaries
    library = emulator.build(tmp_path, change=(old, new), types="f32")
    with pytest.raises((AssertionError, RuntimeError)):
        check(emulator.Emulator(library), case, SEEDS)


def test_unmutated_rows_pass(rows):
    check(rows, case_of_many_faces(), SEEDS)
