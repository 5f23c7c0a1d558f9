"""`python -m tests.demo.make_teacher WORK_FOLDER [TEACHER_FOLDER]`: train the embedded teacher.

Three lessons with kdfast.train itself, on gold spans alone and from short passages to full ones.
About twenty minutes on one core. The corpora, the runs and their figures stay in WORK_FOLDER; the
teacher is written to TEACHER_FOLDER, by default the one in the package, with its weights in fp16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from kdfast import train
from kdfast.demo import TEACHER, WINDOW
from kdfast.demo.corpus import write_corpus
from kdfast.demo.passages import Lesson
from tests.demo.start import start_model
from tests.demo.vocabulary import make_tokenizer

SEED = 1
# (lesson, questions, steps, warm-up share)
LESSONS: tuple[tuple[Lesson, int, int, float], ...] = (
    ("pair", 16_000, 500, 0.1),
    ("short", 20_000, 600, 0.1),
    ("full", 60_000, 3_000, 0.08),
)
FLAGS = {
    **WINDOW,
    "distillation_loss_weight": 0.0,
    "train_batch_size": 32,
    "learning_rate": 1e-3,
    "embeds_dropout_prob": 0.0,
    "eval_steps": 500,
    "seed": SEED,
}


def main(argv: list[str]) -> int:
    """The program. Returns the exit status: 0, or that of the lesson that failed."""
    if not 1 <= len(argv) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    work = Path(argv[0])
    target = Path(argv[1]) if len(argv) == 2 else TEACHER
    student = work / "start"
    tokenizer = make_tokenizer(WINDOW["max_seq_length"])
    start_model(len(tokenizer), WINDOW["max_seq_length"], SEED).save_pretrained(student)
    tokenizer.save_pretrained(student)
    for number, (lesson, questions, steps, warmup) in enumerate(LESSONS, 1):
        train_file, validation_file = write_corpus(
            work / f"corpus-{number}", SEED + number, train_questions=questions, lesson=lesson
        )
        output = work / f"run-{number}"
        flags = {
            **FLAGS,
            "student": student,
            "train_file": train_file,
            "validation_file": validation_file,
            "output_dir": output,
            "cache_dir": work / "cache",
            "max_steps": steps,
            "warmup_ratio": warmup,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        status = train.main([*words, "--overwrite"])
        if status:
            return status
        student = output
    save_half(student, target, tokenizer)
    print(f"The teacher is in {target}.")
    return 0


def save_half(source: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model of `source` to `target` in fp16."""
    model = AutoModelForQuestionAnswering.from_pretrained(source, dtype=torch.float32)
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
