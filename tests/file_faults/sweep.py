"""Whole programs in which chosen file operations fail; in a process that has `calls.c` preloaded.

python -m tests.file_faults.sweep FOLDER reads cases from standard input, a JSON list a line:
[program, kind, first, last, errno]. It writes a line for each: [exit status, operations seen,
what it printed].
"""

import ctypes
import json
import shutil
import sys
import traceback
from pathlib import Path

import torch

from kdfast import card, evaluate, predict, prepare
from tests import forks
from tests.programs import World

SECONDS = 60  # a case that takes longer hangs
TRAINING = {"save_steps": 2, "eval_steps": 3, "load_best_model_at_end": True, "max_steps": 4}


def programs(world: World):
    """Name: function of a folder of its own, which holds a copy of a finished run."""
    data = str(world.validation_file)
    common = {"validation_file": None, "output_dir": None, "max_steps": None}
    common |= {"train_batch_size": None, "learning_rate": None}
    return {
        "train": lambda place: world.run(
            **TRAINING, output_dir=place / "new", cache_dir=place / "cache"
        ),
        "resume": lambda place: world.run(
            **TRAINING | {"max_steps": 6},
            output_dir=place / "out",
            cache_dir=place / "kept",
            resume_from_checkpoint="last",
            allow_changes="max_steps",
        ),
        "prepare": lambda place: prepare.main(world.flags(**common, cache_dir=place / "cache")),
        "evaluate": lambda place: evaluate.main(
            ["--model", f"{place}/out", "--data", data, "--output_dir", f"{place}/evaluation"]
        ),
        "predict": lambda place: predict.main(
            ["--model", f"{place}/out", "--data", data, "--output", f"{place}/answers.jsonl"]
        ),
        "card": lambda place: card.main(["--model_dir", f"{place}/out"]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    world = World(folder / "made")
    whole = folder / "whole"
    outcome, world.output = sys.stdout, whole / "out"
    sys.stdout = (folder / "printed").open("w")
    assert world.run(**TRAINING, cache_dir=whole / "kept") == 0
    for line in sys.stdin:
        program, *fault = json.loads(line)
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        said, seen = folder / "said", folder / "seen"

        def child(program=program, fault=fault, place=place, said=said, seen=seen):
            sys.stderr = sys.stdout = said.open("w")
            kind, first, last, code = fault
            library.fail_calls(kind.encode(), str(place).encode(), first, last, code)
            status = 99
            try:
                status = programs(world)[program](place)
            except BaseException:
                traceback.print_exc()
            seen.write_text(str(library.calls_seen()))
            forks.leave(status)

        process = forks.FORK.Process(target=child)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
        print(
            json.dumps([process.exitcode, int(seen.read_text()), said.read_text()]),
            file=outcome,
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
