"""What README, docs and CONTRIBUTING point to exists: links, headings, paths, names, the tree."""

import importlib
import re

import pytest

from tests.examples import BLOCK, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")), *PAGES]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
CODE = re.compile(r"`([^`\n]+)`")
TREE = re.compile(r"^```\n(kdfast/\n.*?)^```", re.MULTILINE | re.DOTALL)
# Where a path begins that a document names.
HOMES = ("", "kdfast", "csrc", "kdfast/kernels", "tests", "tests/golden")
ENDS = (".py", ".cpp", ".cu", ".h", ".xz")
# Of other projects, and what stands for any file of a kind.
OTHERS = {"run_squad_w_distillation.py", "run_qa.py", "recipes/NAME.yaml", "make_*.py"}
OTHERS |= {"augment_squad.py"}
UNMADE = (".transformers4", ".venv", "../shared")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def headings(text):
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document):
    for path, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = (document.parent / path) if path else document
        if not target.exists():
            yield path
        elif anchor and anchor not in headings(target.read_text(encoding="utf-8")):
            yield f"{path}#{anchor}"


def folders():
    """What a path of this project begins with."""
    inside = [path for path in (ROOT / "kdfast").iterdir() if path.is_dir()]
    return {path.name for path in (*ROOT.iterdir(), *inside) if path.is_dir()}


def missing_paths(text):
    for word in (word for code in CODE.findall(BLOCK.sub("", text)) for word in code.split()):
        is_path = word.endswith(ENDS) or ("/" in word and word.split("/")[0] in folders())
        if not is_path or word in OTHERS or word.startswith(UNMADE):
            continue
        if not any(path for home in HOMES for path in (ROOT / home).glob(word.rstrip("/"))):
            yield word


def missing_names(text):
    """Of dotted names such as kdfast.hf.KDTrainer."""
    for name in re.findall(r"kdfast(?:\.\w+)+", " ".join(CODE.findall(BLOCK.sub("", text)))):
        parts = name.split(".")
        found = importlib.import_module("kdfast")
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                try:
                    importlib.import_module(".".join(parts[:number]))
                except ImportError:
                    yield name
                    break
            found = getattr(found, part)


def in_tree(text):
    """The paths of README's tree."""
    (tree,) = TREE.findall(text)
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            yield folder + name
        else:
            yield name
            folder = name


@each_document
def test_links(document):
    assert list(broken_links(document)) == []


@each_document
def test_paths_and_names(document):
    text = document.read_text(encoding="utf-8")
    assert [*missing_paths(text), *missing_names(text)] == []


def test_every_page_is_linked_from_readme():
    linked = {path for path, _ in LINK.findall(DOCUMENTS[0].read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES} <= linked


def test_the_tree():
    named = set(in_tree(DOCUMENTS[0].read_text(encoding="utf-8")))
    assert [name for name in named if not (ROOT / name).exists()] == []
    package = ROOT / "kdfast"
    parts = {f"kdfast/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    programs = {
        f"kdfast/{path.name}"
        for path in package.glob("*.py")
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
    assert parts | programs <= named


def test_what_is_not_there_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](none.md) [c](#no-title)\n")
    assert list(broken_links(page)) == ["none.md", "#no-title"]
    assert list(missing_paths("`data/read.py` `data/reed.py` `tests/none/`")) == [
        "data/reed.py",
        "tests/none/",
    ]
    assert list(missing_names("`kdfast.hf.KDTrainer(x)` and `kdfast.hf.KDTrain`")) == [
        "kdfast.hf.KDTrain"
    ]
