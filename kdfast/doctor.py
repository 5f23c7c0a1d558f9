"""`python -m kdfast.doctor`: what computes the loss on this machine, and why the rest does not.

Prints a page to paste into an issue. Reads versions and devices, runs every usable backend once on
a few windows, changes nothing. Exits with 0, also where something is missing. With --convert,
makes safetensors of a model's pickled weights instead; with --check_invariance, tests one step of
a training run.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

import kdfast
from kdfast import fused_kd_loss
from kdfast.common import program
from kdfast.common.errors import UserError, first_line
from kdfast.common.machine import cpu_name
from kdfast.common.progress import print_line
from kdfast.common.ranks import Ranks
from kdfast.common.signals import StopSignals
from kdfast.config import TrainConfig
from kdfast.kernels import backends, native

VOLTA = (
    "A V100 (sm_70) needs torch 2.14 or older from PyTorch's cu126 index: CUDA 13 has no sm_70, "
    "and torch 2.15 has no cu126. To build csrc for it, take the nvcc of a CUDA 12.x."
)


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv, stdout_is_result=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    parser = program.plain_parser("doctor", __doc__)
    parser.add_argument(
        "--check_invariance",
        action="store_true",
        help="With the flags of kdfast.train, which --help then lists: train nothing, but compare "
        "one step's gradient over many ways to split it into micro-batches and ranks.",
    )
    parser.add_argument(
        "--convert",
        metavar="DIR|HUB_ID",
        help="Write model.safetensors of the weights in this model's pytorch_model.bin.",
    )
    parser.add_argument(
        "--output_dir",
        help="With --convert, a new folder for the whole model. Default: DIR itself, or a folder "
        "of the hub model's name.",
    )
    if "--check_invariance" in argv:
        from kdfast import train

        config = train.parse([each for each in argv if each != "--check_invariance"])
        if config is None or not config.data.train_file:
            raise UserError("--train_file is missing: give the flags of a run of kdfast.train.")
        return argparse.Namespace(check_invariance=config)
    given = program.parse(parser, argv)
    if given.output_dir and not given.convert:
        raise UserError("--output_dir needs --convert: leave it out, or name a model to convert.")
    return given


def start(given: argparse.Namespace) -> None:
    """The work of the program."""
    if given.check_invariance:
        return check_invariance(given.check_invariance)
    if given.convert:
        from kdfast.models.conversion import convert

        print_line(f"{convert(given.convert, given.output_dir)} is written.")
    else:
        for line in page():
            print_line(line)


def check_invariance(config: TrainConfig) -> None:
    """Report whether a step's gradient depends on how it is split. Raises UserError if it does."""
    from kdfast import train
    from kdfast.config_checks import check
    from kdfast.teachers.layers import layer_teacher_key
    from kdfast.training import inputs, invariance
    from kdfast.training.assemble import TrainingData, assemble
    from kdfast.training.train_files import TrainFiles

    check(config.replace(output_dir="."))  # nothing is written there
    if config.model.stage == "both":
        raise UserError("--check_invariance looks at one stage: give --stage layers.")
    with StopSignals() as stop, Ranks.join() as ranks:
        run = train.start_run(config, ranks, stop)
        train.log_config(config, run)
        student = inputs.load_student(config, ranks)
        files = TrainFiles.prepare_for(config, student, ranks)
        if config.model.stage == "layers":
            layer_teacher_key(config, student)
        targets = files.find_targets(config, student.tokenizer, run)
        logits = files.teacher_logits(config, targets, run)
        data = TrainingData(files.windows, logits, files.shares(config, ranks))
        invariance.report(assemble(config, run, student.model, data), train.train_loop)


def page() -> list[str]:
    lines = ["Software"]
    lines += table(software())
    lines += ["", "Hardware"]
    lines += table(hardware())
    for device in devices():
        lines += ["", f"The loss of tensors on {device}"]
        lines += table(verdicts(device))
    lines += ["", VOLTA, *faults()]
    return lines


def table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<14}{text}" for name, text in rows]


def software() -> list[tuple[str, str]]:
    cuda = torch.version.cuda
    return [
        ("kdfast", kdfast.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'built without CUDA'}"),
        ("triton", installed("triton")),
        ("transformers", installed("transformers")),
        ("C++ compiler", compiler() or "not found"),
        ("nvcc", nvcc() or "not found"),
        ("driver", driver() or "no NVIDIA driver found"),
    ]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def compiler() -> str | None:
    """What the first C++ compiler of those that build csrc says of itself."""
    for command in (os.environ.get("CXX"), os.environ.get("CC"), "c++", "g++", "clang++"):
        if command and (text := output_of(*shlex.split(command), "--version")):
            return text.splitlines()[0]
    return None


def nvcc() -> str | None:
    """The release of the CUDA compiler on PATH."""
    found = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    return found and found[1]


def driver() -> str | None:
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return ", ".join(sorted(set(output_of("nvidia-smi", *query).split()))) or None


def output_of(*command: str) -> str:
    """Standard output of a program; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def hardware() -> list[tuple[str, str]]:
    rows = [("processor", f"{cpu_name()}, {os.cpu_count()} cores")]
    rows += [("threads", f"{torch.get_num_threads()} used by torch")]
    if not torch.cuda.is_available():
        why = "no CUDA device is found" if torch.version.cuda else "this torch has no CUDA"
        return [*rows, ("GPU", f"none: {why}")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        rows.append(("GPU", f"{card.name}, sm_{card.major}{card.minor}, {memory:.0f} GiB"))
    return rows


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def verdicts(device: str) -> list[tuple[str, str]]:
    """For each backend: usable, or the sentence why not; and which one is taken."""
    tensor = torch.empty(0, device=device)
    rows = []
    for name in ("native", "triton", "reference"):
        refused = backends.why_not(name, tensor)
        rows.append((name, f"not usable: {refused}" if refused else trial(name, device)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is what this page is about
        return [*rows, ("taken", backends.choose(tensor, None))]


def trial(name: str, device: str) -> str:
    """What comes of a small call: its largest difference from the reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 33, 2, generator=generator)
    positions = torch.arange(4)
    results = []
    for backend, where in ((name, device), ("reference", "cpu")):
        logits = student.to(where).requires_grad_()
        targets = positions.to(where)
        try:
            loss = fused_kd_loss(logits, teacher.to(where), targets, targets, backend=backend)
            slope = torch.autograd.grad(loss, logits)[0]
        except Exception as error:
            return f"fails: {type(error).__name__}: {first_line(error)}"
        results.append(torch.cat([loss.detach()[None], slope.flatten()]).cpu())
    difference = (results[0] - results[1]).abs().max().item()
    if difference > 1e-5 or difference != difference:
        return f"wrong: differs from the reference by {difference:.1g}"
    return f"usable{how(name, device)}, within {difference:.0e} of the reference on a small batch"


def how(name: str, device: str) -> str:
    """The code path of the native rows."""
    if name != "native":
        return ""
    if device == "cpu":
        return f" ({[isa for isa in native.ISAS[1:] if native.has_isa(isa)][-1]})"
    return f" (built for {native.built_architectures()})"


def faults() -> list[str]:
    """What is known to be wrong with this machine's combination of card, torch and nvcc."""
    found = []
    listed = torch.cuda.get_arch_list() if torch.cuda.is_available() else []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if listed and not any(runs_on(arch, major, minor) for arch in listed):
            found.append(
                f"This torch has no code for cuda:{index} (sm_{major}{minor}): it was built for "
                f"{', '.join(listed)}."
            )
    if refused := backends.why_not("native", torch.empty(0)):
        found.append(
            f"The loss is slow on a CPU here, as {refused}. With KDFAST_REQUIRE_EXTENSION=1 that "
            "fails where the extension cannot be built, and shows what the compiler says."
        )
    release = nvcc()
    if release and int(release.split(".")[0]) >= 13:
        found.append(f"The nvcc here is {release}: it builds csrc for sm_75 and newer.")
    return found


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch` ("sm_75", or the PTX "compute_90") runs on sm_{major}{minor}."""
    number = int(re.sub(r"\D", "", arch))
    is_same_major = number // 10 == major or arch.startswith("compute")
    return is_same_major and number <= 10 * major + minor


if __name__ == "__main__":
    raise SystemExit(main())
