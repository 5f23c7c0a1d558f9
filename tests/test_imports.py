"""Imports point down only, a bare `import kdfast` is light, and every spelling works."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kdfast

PACKAGE = Path(kdfast.__file__).parent
# Who may import whom: a module imports those of a lower rank, and its own folder.
RANKS = {
    "_C": 0,
    "common": 0,
    "recipes": 1,
    "config_inputs": 1,
    "config": 2,
    "config_checks": 3,
    "command_line": 4,
    "tokenizers": 1,
    "data": 3,
    "models": 4,
    "teachers": 5,
    "kernels": 5,
    "fused_kd_loss": 6,
    "evaluation": 6,
    "training": 7,
    "cards": 8,
    "synthetic": 8,
    "reader": 8,
}
PROGRAM = 9
SPELLINGS = [
    "from kdfast import fused_kd_loss; call = fused_kd_loss",
    "import kdfast; call = kdfast.fused_kd_loss",
    "from kdfast.fused_kd_loss import fused_kd_loss; call = fused_kd_loss",
    "import kdfast.fused_kd_loss; call = kdfast.fused_kd_loss",
]
CALL = "assert call(z, z, p, p).item() > 0, call"


def imported(source, module, is_package):
    """Absolute dotted names that `source`, the text of `module`, imports at any depth."""
    parents = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join(up + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), is_package, path


TRITON = {"triton_launch", "triton_kernels", "triton_memory"}
BACKENDS = {"native", *TRITON}


def fault(module, name):
    """Why `module` may not import the absolute dotted `name`; None where it may."""
    importer, target = module.split("."), name.split(".")
    if target[0] in ("tests", "benchmarks"):
        return "nobody imports tests or benchmarks"
    own = importer[1] if len(importer) > 1 else ""
    if own in ("data", "tokenizers") and target[0] == "torch":
        return f"{own} knows no model and no device"
    is_loss = own in ("", "fused_kd_loss", "kernels") and importer[-1] not in TRITON
    if is_loss and target[0] in ("numpy", "triton"):
        return "the loss needs torch alone"
    if target[0] != "kdfast" or not own:
        return None
    rank = RANKS.get(own, PROGRAM)
    if len(target) == 1 or not is_part(target[1]):
        return None if rank >= RANKS["training"] else "kdfast itself is above the parts"
    is_of_loss = own in ("fused_kd_loss", "kernels")
    if importer[-1] == "reference" or (is_of_loss and target[1] != "kernels"):
        return "the loss needs torch alone"
    if own == target[1] == "kernels":
        both = {importer[-1], target[2]}
        is_apart = both <= BACKENDS and not both <= TRITON
        return "backends never import each other" if is_apart else None
    if own == target[1] or RANKS.get(target[1], PROGRAM) < rank or rank == PROGRAM:
        return None
    return f"{own} is not above {target[1]}"


def is_part(name):
    """Whether kdfast.`name` is a module: not so for kdfast.__version__, say."""
    return name == "_C" or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_imports_point_down():
    up = [
        f"{module} imports {name}: {why}"
        for module, is_package, path in modules()
        for name in imported(path.read_text(encoding="utf-8"), module, is_package)
        if (why := fault(module, name))
    ]
    assert not up, "\n".join(up)


def test_no_imports_in_a_circle():
    """Among modules, whether imported at the top or in a function."""
    known = {module: (is_package, path) for module, is_package, path in modules()}
    arrows = {
        module: {
            part
            for name in imported(path.read_text(encoding="utf-8"), module, is_package)
            for part in (name, name.rpartition(".")[0])
            if part in known and part not in (module, "kdfast")
        }
        for module, (is_package, path) in known.items()
    }
    while free := [module for module, below in arrows.items() if not below & arrows.keys()]:
        for module in free:
            del arrows[module]
    assert not arrows, f"in a circle, or above one: {sorted(arrows)}"


@pytest.mark.parametrize(
    "module, line",
    [
        ("kdfast.data.read", "from kdfast.models import load"),
        ("kdfast.data.read", "from ..fused_kd_loss import kd_loss_rows"),
        ("kdfast.data.read", "import torch.nn"),
        ("kdfast.kernels.reference", "from . import backends"),
        ("kdfast.kernels.reference", "import kdfast"),
        ("kdfast.fused_kd_loss", "def late():\n    from kdfast.data.examples import Example"),
        ("kdfast.fused_kd_loss", "import triton.language"),
        ("kdfast.kernels.native", "from kdfast.kernels import triton_launch"),
        ("kdfast.training.step", "from kdfast.train import main"),
        ("kdfast.reader", "from kdfast import predict"),
        ("kdfast.evaluation.scoring", "from kdfast.reader import Reader"),
        ("kdfast.recipes", "from kdfast.config import TrainConfig"),
        ("kdfast.train", "from tests.demo import corpus"),
    ],
)
def test_an_import_that_points_up_is_seen(module, line):
    assert any(fault(module, name) for name in imported(line, module, False))


def fresh(*lines):
    """Standard output of the lines in an interpreter of their own."""
    run = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.program
def test_import_brings_torch_and_nothing_else():
    loaded = fresh(
        "import sys, torch",
        "before = {name.partition('.')[0] for name in sys.modules}",
        "import kdfast",
        "print(*({name.partition('.')[0] for name in sys.modules} - before))",
        "print(*(name for name in ('transformers', 'datasets', 'triton') if name in sys.modules))",
    )
    assert loaded.splitlines() == ["kdfast", ""]


# Each spelling is first once, and each two of them stand in either order.
@pytest.mark.program
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_spellings_in_a_fresh_interpreter(order):
    fresh(
        "import sys, torch",
        "assert 'kdfast' not in sys.modules",
        "z, p = torch.eye(3)[None, :, :2], torch.zeros(1, dtype=torch.long)",
        *(line for which in order for line in (SPELLINGS[which], CALL)),
    )


@pytest.mark.program
def test_reader_is_imported_on_first_use():
    fresh(
        "import sys, kdfast",
        "assert 'Reader' in kdfast.__all__ and 'transformers' not in sys.modules",
        "reader = kdfast.Reader",
        "from kdfast import Reader",
        "import kdfast.reader",
        "assert reader is Reader is kdfast.reader.Reader and not hasattr(kdfast, 'nothing')",
    )


def test_version_is_that_of_the_package():
    assert kdfast.__version__ == version("kdfast")
