"""What `python -m kdfast.train` does without arguments: the main job on the embedded default."""

from pathlib import Path

from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.demo import SETTINGS, TEACHER, corpus
from kdfast.models import load
from kdfast.models.precision import pick_device, resolve
from kdfast.train import train
from kdfast.training.inputs import load_validation

HOME = Path("kdfast-demo")
FIGURES = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_f1")


def tour(home: Path = HOME, seed: int = 42) -> list[dict]:
    """Distil the embedded teacher, train the same student without it, and print one table.

    Everything is written below `home`: the generated corpus, the cache,
    and both students. Returns the table's rows, with the figures of the evaluations unrounded.
    """
    train_file, validation_file = corpus.write_corpus(home / "corpus")
    common = {
        **SETTINGS,
        "teacher": str(TEACHER),
        "train_file": str(train_file),
        "validation_file": str(validation_file),
        "cache_dir": str(home / "cache"),
        "overwrite": True,
        "seed": seed,
    }
    print("\n1 of 3: the student learns from the teacher and from the gold spans", flush=True)
    distilled = TrainConfig(output_dir=str(home / "distilled"), **common)
    learned = train(distilled)
    print("\n2 of 3: the same student learns from the gold spans alone", flush=True)
    without = {**common, "distillation_loss_weight": 0.0}
    plain = train(TrainConfig(output_dir=str(home / "undistilled"), **without))
    print("\n3 of 3: the teacher is evaluated", flush=True)
    rows = [
        {"reader": "teacher", **score_teacher(distilled)},
        {"reader": "student, distilled", **row(learned)},
        {"reader": "student, gold spans alone", **row(plain)},
    ]
    print(table(rows), flush=True)
    return rows


def score_teacher(config: TrainConfig) -> dict:
    """The teacher's row: it answers the same validation questions in the same way."""
    device = pick_device()
    loaded = load.load_reader(config.teacher[0], "--teacher")
    precision = resolve(config.mixed_precision, device)
    validation = load_validation(config, loaded, Ranks())
    result = validation.score(loaded.model.to(device), device, precision)
    return row(
        {
            "metrics": result.metrics,
            "student_parameters": sum(each.numel() for each in loaded.model.parameters()),
        }
    )


def row(record: dict) -> dict:
    """A row of the table from what run.json holds."""
    return {
        **{name: record["metrics"][name] for name in FIGURES},
        "parameters": record["student_parameters"],
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    head = ("", "EM", "F1", "HasAns EM", "HasAns F1", "NoAns F1", "parameters")
    lines = [f"| {' | '.join(head)} |", f"|:--{'|--:' * (len(head) - 1)}|"]
    for each in rows:
        cells = [each["reader"], *(f"{each[name]:.1f}" for name in FIGURES)]
        cells.append(f"{each['parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"
