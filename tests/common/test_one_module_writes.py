"""Nothing but common/files.py, folders.py and locks.py opens, makes, renames or deletes a file."""

import ast
from pathlib import Path

import pytest

import kdfast

PACKAGE = Path(kdfast.__file__).parent
WRITERS = ("common/files.py", "common/folders.py", "common/locks.py")
CALLS = {
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "rename", "renames", "unlink"),
    *("rmdir", "rmtree", "symlink_to", "hardlink_to", "symlink", "link", "copytree", "copyfile"),
    *("copy2", "mkfifo", "chmod", "truncate", "save_file", "save_pretrained", "savefig"),
    *("open_memmap", "tofile", "savez", "savetxt", "mkdtemp", "mkstemp", "NamedTemporaryFile"),
    *("TemporaryFile", "TemporaryDirectory", "fdopen", "FileIO", "SummaryWriter", "to_csv"),
    *("to_parquet", "to_json", "save_to_disk", "upload_file"),
}
# Of these modules only: strings, dataclasses and lists have methods of the same names.
QUALIFIED = {("os", "open"), ("os", "replace"), ("os", "remove"), ("shutil", "copy")}
QUALIFIED |= {("shutil", "move"), ("torch", "save"), ("np", "save"), ("np", "memmap")}
OWN = {"write_text", "write_bytes", "rename"}  # names of functions of files.py and folders.py too
# What may write elsewhere, and why.
EXCEPTIONS = {
    ("common/program.py", "open"): "os.devnull takes what is said after the end of a stream",
    ("cards/figures.py", "savefig"): "matplotlib draws into memory",
    ("data/chunks.py", "savez"): "numpy writes into what new_file has opened",
    ("data/cache.py", "memmap"): "maps to read",
    ("teachers/cache.py", "memmap"): "maps what open_in_place has opened",
    ("models/save.py", "save_pretrained"): "transformers writes, into a fresh folder",
    ("training/log.py", "SummaryWriter"): "TensorBoard writes, into a subfolder",
}


def writes(source):
    """The calls in a module's text that may write: line and name of what is called."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        is_method = isinstance(called, ast.Attribute)
        name = called.attr if is_method else getattr(called, "id", "")
        owner = called.value.id if is_method and isinstance(called.value, ast.Name) else ""
        if name == "open" and owner != "os":
            given = [*node.args[0 if is_method else 1 :], *(each.value for each in node.keywords)]
            modes = [each.value for each in given if isinstance(each, ast.Constant)]
            if any(
                isinstance(each, str) and set(each) & set("wax+") and len(each) < 4
                for each in modes
            ):
                yield node.lineno, name
        elif (owner, name) in QUALIFIED or (name in CALLS and (is_method or name not in OWN)):
            yield node.lineno, name
        elif is_method and name == "replace" and len(node.args) == 1 and not node.keywords:
            yield node.lineno, name  # of a Path: that of a text takes two


def test_one_module_writes():
    found, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module in WRITERS:
            continue
        for line, name in writes(path.read_text(encoding="utf-8")):
            used.add((module, name))
            if (module, name) not in EXCEPTIONS:
                found.append(f"kdfast/{module}:{line} calls {name}: let common/files.py do so")
    assert not found, "\n".join(found)
    assert used == EXCEPTIONS.keys(), "an exception that nobody needs"


@pytest.mark.parametrize(
    "line",
    [
        'open("a", "w")',
        'open("a", mode="xb")',
        'path.open("r+b")',
        'path.open(mode="a")',
        'path.write_text("a")',
        "path.replace(other)",
        "os.replace(path, other)",
        "os.open(path, os.O_WRONLY)",
        "shutil.rmtree(path)",
        'tempfile.mkstemp(dir=".")',
        "save_file(tensors, path)",
        'np.memmap(path, np.uint8, "r+")',
    ],
)
def test_what_writes_is_seen(line):
    assert list(writes(line))


@pytest.mark.parametrize(
    "line", ['path.open("rb")', 'open("a")', 'text.replace("a", "b")', "replace(run, a=1)"]
)
def test_what_does_not_write(line):
    assert not list(writes(line))
