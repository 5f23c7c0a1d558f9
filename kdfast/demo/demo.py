"""What `python -m kdfast.train` does without arguments: the main job on the embedded default."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.common.device import pick_device
from kdfast.common.precision import resolve
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.demo import SETTINGS, TEACHER, corpus
from kdfast.models.load import load_reader
from kdfast.training.inputs import load_validation

Rows = list[dict[str, Any]]

HOME = Path("kdfast-demo")
FIGURES = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_f1")


def run(train: Callable[[TrainConfig], dict[str, Any]], home: Path = HOME, seed: int = 42) -> Rows:
    """Distil the embedded teacher, train the same student without it, and print one table.

    Args:
        train: `kdfast.train.train`.
        home: Folder of the generated corpus, the cache and both students.
        seed: Of both runs.

    Returns:
        The table's rows, with the figures of the evaluations unrounded.
    """
    train_file, validation_file = corpus.write_corpus(home / "corpus")
    common = TrainConfig(
        **SETTINGS,
        teacher=str(TEACHER),
        train_file=str(train_file),
        validation_file=str(validation_file),
        cache_dir=str(home / "cache"),
        overwrite=True,
        seed=seed,
    )
    print("\n1 of 3: the student learns from the teacher and from the gold spans", flush=True)
    distilled = common.replace(output_dir=str(home / "distilled"))
    learned = train(distilled)
    print("\n2 of 3: the same student learns from the gold spans alone", flush=True)
    plain = train(
        common.replace(output_dir=str(home / "undistilled"), distillation_loss_weight=0.0)
    )
    print("\n3 of 3: the teacher is evaluated", flush=True)
    rows = [
        {"reader": "teacher", **score_teacher(distilled)},
        {"reader": "student, distilled", **row(learned)},
        {"reader": "student, gold spans alone", **row(plain)},
    ]
    print(table(rows), flush=True)
    return rows


def score_teacher(config: TrainConfig) -> dict[str, Any]:
    """The teacher's row: it answers the same validation questions in the same way."""
    device = pick_device()
    loaded = load_reader(config.model.teacher[0], "--teacher")
    kind = loaded.model.reader.config.model_type
    run = Run(device, resolve(config.speed.mixed_precision, device, [kind]))
    validation = load_validation(config, loaded, Ranks())
    assert validation is not None  # the demo has a set
    result = validation.score(loaded.model.to(device), run)
    return row(
        {
            "metrics": result.metrics,
            "student_parameters": sum(each.numel() for each in loaded.model.parameters()),
        }
    )


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A row of the table from what run.json holds."""
    return {
        **{name: record["metrics"][name] for name in FIGURES},
        "parameters": record["student_parameters"],
    }


def table(rows: Rows) -> str:
    """The rows as a Markdown table."""
    head = ("", "EM", "F1", "HasAns EM", "HasAns F1", "NoAns F1", "parameters")
    lines = [f"| {' | '.join(head)} |", f"|:--{'|--:' * (len(head) - 1)}|"]
    for each in rows:
        cells = [each["reader"], *(f"{each[name]:.1f}" for name in FIGURES)]
        cells.append(f"{each['parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"
