"""The support table of damage: what a program makes of a file that is damaged in some way.

Ends: SAME, the result has the bits that it has without the damage, as the file is not needed, or is
made again. NOTICED, the same, and a line names the file. REFUSED, status 2, one sentence that names
file and remedy, and nothing is lost. READ, of a finished run alone: what stands there is read, as
nothing tells it from what was written. No program ends otherwise: by other numbers, a traceback, a
hang, or a write through a link to what is outside. `damage.py` has the programs and the ways.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests import damage
from tests.damage import NOTICED, READ, REFUSED, SAME, WAYS


def row(usual: str, **others: str) -> dict[str, str]:
    """An end for each way, and those ways that end otherwise."""
    assert others.keys() <= WAYS.keys()
    return dict.fromkeys(WAYS, usual) | others


# The checkpoint before it is used. A link is refused wherever a run would write; so is a
# checkpoint of another format, which no program of today can read.
# What cannot be read now may be whole: the run ends.
CHECKPOINT = row(NOTICED, link=REFUSED, older=REFUSED, unreadable=REFUSED)
# A link to the very file is read. Folders of an older format are not looked at, and made again.
FEATURES = row(REFUSED, link=SAME, older=SAME)
# A part of what a killed run has left is made again.
UNFINISHED = row(SAME, unreadable=REFUSED)
# A lock's content is nothing; what is no plain file is not opened.
LOCK = row(SAME, folder=REFUSED, link=REFUSED, pipe=REFUSED, unreadable=REFUSED)

# Any program's model may stand there: what can be read is read.
MODEL = row(REFUSED, swapped=READ, link=READ, older=READ)
CARD = row(NOTICED, unreadable=REFUSED)

TABLE = {
    "resume": {
        "out/checkpoint-4/model.safetensors": CHECKPOINT,
        "out/checkpoint-4/optimizer.safetensors": CHECKPOINT,
        "out/checkpoint-4/trainer_state.json": CHECKPOINT,
        "out/checkpoint-4/SHA256SUMS": CHECKPOINT,
        "out/checkpoint-4/best/model.safetensors": CHECKPOINT | {"older": NOTICED},
        # Two runs of one student have the same.
        "out/checkpoint-4/config.json": CHECKPOINT | {"swapped": SAME},
        "out/checkpoint-4/tokenizer.json": CHECKPOINT | {"swapped": SAME},
    },
    "train": {
        "cache/features/TRAIN/header.json": FEATURES,
        "cache/features/TRAIN/input_ids.npy": FEATURES,
        "cache/features/TRAIN/end_positions.npy": FEATURES,
        "cache/features/TRAIN/SHA256SUMS": FEATURES,
        "cache/teacher/PASS/header.json": FEATURES | {"older": REFUSED},
        "cache/teacher/PASS/logits.npy": FEATURES,
        "cache/teacher/PASS/SHA256SUMS": FEATURES,
        "cache/features/TRAIN.lock": row(SAME),  # which is not needed where the cache is there
        "cache/teacher/PASS.lock": row(SAME),
    },
    "train halfway": {
        "halfway/features/TRAIN.chunks/000000.npz": FEATURES | {"pipe": SAME, "deleted": SAME},
        "halfway/features/TRAIN.chunks/source.npz": UNFINISHED | {"folder": REFUSED},
        "halfway/features/TRAIN.lock": LOCK,
        "halfway/teacher/PASS.lock": LOCK,
        "halfway/teacher/PASS.partial/header.json": UNFINISHED,
        "halfway/teacher/PASS.partial/logits.npy": UNFINISHED | {"link": REFUSED},
        "halfway/teacher/PASS.partial/sums.bin": UNFINISHED | {"link": REFUSED},
    },
    "train shards": {
        "shards/teacher/PASS.shards/header.json": row(REFUSED, link=SAME, deleted=SAME),
        "shards/teacher/PASS.shards/0/header.json": UNFINISHED,
        "shards/teacher/PASS.shards/0/logits.npy": UNFINISHED,
        "shards/teacher/PASS.shards/0/sums.bin": UNFINISHED,
    },
    "evaluate": {
        "done/model.safetensors": MODEL | {"flipped": READ},
        "done/config.json": MODEL,
        "done/tokenizer.json": MODEL,
        "done/tokenizer_config.json": MODEL | {"folder": READ, "deleted": READ},
        "done/run.json": MODEL | {"deleted": READ},  # without it windows are of the usual size
    },
    "predict": {
        "done/model.safetensors": MODEL | {"flipped": READ},
        "done/config.json": MODEL,
        "done/tokenizer.json": MODEL,
        "done/tokenizer_config.json": MODEL | {"folder": READ, "deleted": READ},
    },
    "card": {
        "done/model.safetensors": CARD
        | {"folder": REFUSED, "link": SAME, "pipe": REFUSED, "older": SAME},
        "done/run.json": MODEL | {"link": SAME, "older": SAME},
        "done/card.json": row(REFUSED, swapped=SAME, older=SAME, deleted=SAME),
        "done/train_log.jsonl": CARD  # the line that is flipped is of an evaluation
        | {"flipped": SAME, "swapped": SAME, "link": SAME, "older": SAME},
        "done/eval/dev.eval.json": CARD | {"link": SAME, "deleted": READ},
        "done/eval/dev.questions.json": row(SAME),  # of the report
        "done/README.md": row(SAME, folder=REFUSED, link=REFUSED),
    },
}


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """The ground of all cells, and how each program ends on it undamaged."""
    path = tmp_path_factory.mktemp("ground")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        damage.make_ground(path / "first", 20, 42)
        damage.make_ground(path / "other", 21, 7)
        for number, program in enumerate(TABLE):
            home = path / str(number)
            home.mkdir()
            assert damage.end_of(path, home, program) == SAME
    return path


CELLS = [
    pytest.param(program, name, way, end, id=f"{program}-{name}-{way}")
    for program, files in TABLE.items()
    for name, ends in files.items()
    for way, end in ends.items()
]


@pytest.mark.program
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.sample(24)  # 24 + 1 and len(WAYS) have no common factor: each way is tried
@pytest.mark.parametrize(("program", "name", "way", "end"), CELLS)
def test_damage(ground, tmp_path, program, name, way, end):
    assert damage.end_of(ground, tmp_path, program, name, way) == end


def table() -> list[str]:
    """The table in Markdown: of each file its usual end, and the ways that end otherwise."""
    lines = ["| program | file | usual end | otherwise |", "| --- | --- | --- | --- |"]
    for program, files in TABLE.items():
        for name, ends in files.items():
            ((usual, _),) = Counter(ends.values()).most_common(1)
            others = [f"{way}: {end}" for way, end in ends.items() if end != usual]
            lines.append(f"| {program} | `{name}` | {usual} | {', '.join(others)} |")
    return lines


def test_the_docs_have_the_table():
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    assert "\n".join(table()) in text
