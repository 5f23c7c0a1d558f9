"""A model folder as Haystack 2's extractive reader takes it, in an environment of its own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdfast.reader import Reader

pytestmark = pytest.mark.program

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "golden" / "roberta"
# Each is one window: over several the two rank by different scores.
CONTEXTS = [
    "The school in Dornow was founded in 1902. Its head is Anna Weber.",
    "👩\u200d🚀 Anna Weber flew to the Moon 🌕.",
    "عاصمة فرنسا هي باريس.",
    "首都是巴黎。",
]


@pytest.fixture
def python():
    """The interpreter of an environment that has Haystack 2."""
    own = ROOT / ".venv-haystack" / "bin" / "python"
    if own.is_file():
        return str(own)
    if find_spec("haystack") is None:
        pytest.skip("Haystack 2 is not installed: `make haystack` installs it in .venv-haystack")
    return sys.executable


def test_haystack_reads_a_folder_and_finds_the_same_answers(python):
    question = "Who is the head?"
    done = subprocess.run(
        # -I: next to the script there is a tokenizers.py, which is not the library.
        [python, "-I", str(ROOT / "tests" / "haystack_answers.py"), str(FOLDER)],
        input=json.dumps({"question": question, "contexts": CONTEXTS}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    best = {}
    for number, *answer, score in json.loads(done.stdout):
        best[number] = max(best.get(number, (-1.0,)), (score, *answer))
    ours = Reader(FOLDER, device="cpu")(
        question=[question] * len(CONTEXTS),
        context=CONTEXTS,
        max_seq_len=96,
        max_answer_len=96,
        align_to_words=False,
    )
    assert [list(best[n][1:]) for n in range(len(CONTEXTS))] == [
        [answer["start"], answer["end"], answer["answer"]] for answer in ours
    ]
