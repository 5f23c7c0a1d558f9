"""`python -m kdfast.predict`: answer one question, or those of a file, with a reader.

A file holds SQuAD JSON, or one {"question", "context"} a line (JSONL), with an "id" if you like, or
another form of docs/data.md; - is standard input.
The answers are JSONL: {"id", "question", "score", "start", "end", "answer"} a question, or, with
--top_k above 1, {"id", "question", "answers"}, a list of the answers.
"""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from errno import EISDIR
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from kdfast.common import program
from kdfast.common.errors import UserError
from kdfast.common.files import create, open_device, refuse_link
from kdfast.common.folders import make_writable, remove, rename
from kdfast.common.progress import answering_bar, print_line
from kdfast.common.settings import flag
from kdfast.data.pairs import check_text
from kdfast.data.read import iter_examples
from kdfast.data.tally import Tally
from kdfast.evaluation.reader_settings import ReaderSettings


@dataclass(frozen=True)
class PredictConfig:
    """Give --question with --context or --context_file, or --data."""

    model: str = flag("", "Folder or hub id of the reader.")
    question: str | None = flag(None, "One question.")
    context: str | None = flag(None, "The text that --question is about.")
    context_file: str = flag("", "UTF-8 text file, instead of --context; - is stdin.")
    data: str | None = flag(
        None, "File of questions with contexts, SQuAD JSON or JSONL; - is stdin."
    )
    output: str | None = flag(None, "JSONL file for the answers. Default: standard output.")
    top_k: int = flag(1, "Answers to a question.")
    handle_impossible_answer: bool = flag(False, 'Let "" (no answer) compete.')
    max_answer_len: int = flag(15, "Tokens in the longest answer that is considered.")
    max_question_len: int = flag(64, "Tokens of the question that are kept.")
    max_seq_len: int | None = flag(
        None, "Tokens in a window. Default: 384, or what the model reads at most."
    )
    doc_stride: int | None = flag(
        None,
        "Context tokens that two windows share (in kdfast.train and kdfast.evaluate: the step "
        "from window to window). Default: 128, or half of --max_seq_len where that is less.",
    )
    align_to_words: bool = flag(True, "Widen answers to whole words.")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "fp16 is faster on a GPU.")

    def check(self) -> None:
        """Raise UserError for flags that are missing, contradictory or out of range."""
        if not self.model:
            raise UserError("--model is missing: name the reader's folder or hub id.")
        if (self.question is None) == (self.data is None):
            raise UserError("Give either --question or --data, and not both.")
        if self.data is not None and (self.context is not None or self.context_file):
            raise UserError("--context goes with --question: the records of --data hold theirs.")
        if self.question is not None and (self.context is None) == (not self.context_file):
            raise UserError("Give --question either --context or --context_file.")
        self.settings()

    def settings(self) -> ReaderSettings:
        given = {f.name: getattr(self, f.name, None) for f in fields(ReaderSettings)}
        return ReaderSettings().changed(given)


class Question(NamedTuple):
    """A question to answer; id as the answer's line has it."""

    id: str | int
    question: str
    context: str


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv, stdout_is_result=True)


def parse(argv: list[str]) -> PredictConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(PredictConfig, "predict", __doc__), argv)


def start(config: PredictConfig) -> None:
    """The work of the program."""
    try:
        predict(config)
    except OSError as error:
        if error.filename is not None:  # of a file that does not open
            raise
        raise UserError(
            f"The answers cannot be written ({error.strerror}): make room or name another --output."
        ) from error


def predict(config: PredictConfig) -> None:
    """Answer the questions in their order, each line as soon as it is there."""
    from kdfast.reader import Reader  # takes seconds, of which a typo in a flag costs none

    config.check()
    # Read before the first answer: a fault of the last record must not cost those before it.
    asked = list(read_questions(config))
    if not asked:
        raise UserError(f"--data {config.data} holds only questions without a text: write them.")
    with opened(config.output) as output:
        reader = Reader(config.model, mixed_precision=config.mixed_precision)
        for note in reader.notes:
            print_line(note, sys.stderr)
        pairs = ((each.question, each.context) for each in asked)
        warn = partial(print_line, file=sys.stderr)
        with answering_bar(len(asked), is_shown=config.data is not None) as bar:
            results = reader.stream(pairs, config.settings(), bar.update, warn)
            for result, each in zip(results, asked, strict=True):
                answers = result if isinstance(result, list) else [result]
                found = answers[0] if config.top_k == 1 else {"answers": answers}
                line = {"id": each.id, "question": each.question, **found}
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
                output.flush()


def read_questions(config: PredictConfig) -> Iterator[Question]:
    """The questions, checked; prints what of --data is left out.

    A record without an id has its number, from 0.
    """
    if config.data is None:
        context = config.context
        if context is None:
            context = check_text(f"--context_file {config.context_file}", read(config.context_file))
        question = check_text("--question", config.question)
        yield Question(0, question, check_text("--context", context))
        return
    tally = Tally()
    source = "/dev/stdin" if config.data == "-" else config.data
    for example in iter_examples(source, split="validation", tally=tally):
        if not example.question.strip():
            tally.add("no_question", example.id)
            continue
        has_number = example.numbered and example.id.isdecimal()
        name = int(example.id) if has_number else example.id
        yield Question(name, example.question, example.context)
    for note in tally.notes({}, training=False):
        print_line(note, sys.stderr)


def read(name: str) -> str:
    """The text of a file, to the character: offsets count from its first one."""
    try:
        path = Path("/dev/stdin" if name == "-" else name).expanduser()
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--context_file {name} cannot be read ({error.strerror}): check it."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--context_file {name} is not UTF-8 text: save it as UTF-8.") from error


@contextmanager
def opened(name: str | None) -> Iterator[TextIO]:
    """Standard output, or file `name`; what a run that fails has written is left in NAME.part.

    A device or a pipe is written as it is.
    """
    if name is None or name == "-":
        yield sys.stdout
        return
    path = Path(name).expanduser()
    part = path.parent / f"{path.name}.part"
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if path.exists() and not path.is_file():
            part, file = path, open_device(path)
        else:
            refuse_link(path)
            make_writable(path.parent)
            file = io.TextIOWrapper(create(part), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {name} cannot be written ({error.strerror}): name another."
        ) from error
    try:
        with file:
            yield file
    except BaseException:
        if part != path and part.stat().st_size == 0:
            remove(part)
        raise
    if part != path:
        rename(part, path)


if __name__ == "__main__":
    sys.exit(main())
