"""`python -m kdfast.questions`: contexts to questions, kept where a teacher can answer them.

A model of transformers (--generator), or one behind an OpenAI-compatible endpoint
(--endpoint_model, with the key in OPENAI_API_KEY), writes questions and answers. The teacher
answers each question. It is kept where both answers agree, or where the teacher's margin is large.
The result is SQuAD JSON that says of each question where it is from and why it was kept.

All that was generated is in OUTPUT.candidates.jsonl. A run that was stopped goes on from there, and
other thresholds need no new questions.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdfast.common import program
from kdfast.common.errors import UserError
from kdfast.common.files import read_bytes, write_json
from kdfast.common.progress import passing_bar, print_line
from kdfast.common.settings import check_values, flag

if TYPE_CHECKING:
    from kdfast.synthetic.contexts import Paragraph
    from kdfast.synthetic.generation import Generation

FORMAT = 1  # raise it when the same settings and replies give other candidates


@dataclass(frozen=True)
class QuestionsConfig:
    """Give --data, --output, --teacher, and either --generator or --endpoint_model."""

    data: str = flag(
        "",
        "Contexts: a file in SQuAD's or another format (docs/data.md), with or without questions, "
        "a hub dataset, or a .txt file with blank lines between its paragraphs.",
    )
    output: str = flag("", "SQuAD JSON file for the questions.")
    teacher: str = flag("", "Folder or hub id of the reader that answers them.")
    generator: str = flag("", "Folder or hub id of a causal or a sequence-to-sequence model.")
    endpoint_model: str = flag("", "Name of a model of an OpenAI-compatible endpoint.")
    base_url: str | None = flag(
        None, "Address of the endpoint. Default: OPENAI_BASE_URL, or OpenAI's own."
    )
    request: str = flag(
        "{}", "JSON object, further fields of each request; null leaves out one that is sent."
    )
    timeout: float = flag(120.0, "Seconds that a request may take.", above=0, most=86400)
    max_retries: int = flag(
        5, "How often the client repeats a request after a timeout, 429 or 5xx.", least=0, most=100
    )
    prompt_file: str | None = flag(
        None,
        "Template in place of the built-in prompt, with {context}, {title} and {count}; or, for "
        "models that write a question to an answer, {answer}, {before} and {after}.",
    )
    questions_per_context: int = flag(5, "Questions that one reply may have.", above=0, most=1000)
    temperature: float = flag(0.0, "0 takes the most probable token.", least=0, most=100)
    max_new_tokens: int = flag(1024, "Tokens in a reply, at most.", above=0)
    batch_size: int = flag(8, "Prompts at once.", above=0, most=4096)
    seed: int = flag(42, "Seed of what is drawn.", least=0, most=2**31 - 1)
    min_f1: float = flag(
        0.8, "Least F1 of the teacher's answer by the generator's.", least=0, most=1
    )
    min_margin: float = flag(
        4.0, "Least margin, in logits, that keeps a question without agreement.", most=None
    )
    margin_over: Literal["no_answer", "second_span"] = flag(
        "no_answer",
        "What the score of the teacher's best span is compared with: no answer, or, of a teacher "
        "that knows only answerable questions, the next span that does not overlap it.",
    )
    unanswerable: float = flag(
        0.5,
        "Share of the questions that are also asked of another passage with the same title.",
        least=0,
        most=1,
    )
    min_null_margin: float = flag(
        4.0,
        "By how much no answer must beat the best span there, for it to be kept as unanswerable.",
        most=None,
    )

    def check(self) -> None:
        """Raise UserError for flags that are missing, contradictory or out of range."""
        check_values(self)
        for name in ("data", "output", "teacher"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: see --help.")
        if bool(self.generator) == bool(self.endpoint_model):
            raise UserError("Give either --generator or --endpoint_model, and not both.")
        if self.generator and (self.base_url or self.request != "{}"):
            raise UserError("--base_url and --request go with --endpoint_model: leave them out.")
        for name in ("min_margin", "min_null_margin"):
            if getattr(self, name) != getattr(self, name):
                raise UserError(f"--{name} is nan: give a number.")
        self.request_fields()

    def request_fields(self) -> dict[str, Any]:
        """What --request holds. Raises UserError."""
        try:
            found = json.loads(self.request)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.keys() & {"model", "messages", "stream", "n"}:
            raise UserError(
                "--request is no JSON object, or sets model, messages, stream or n: give fields "
                'such as {"top_p": 0.9}.'
            )
        return found

    def template(self) -> str:
        """The prompt with its placeholders. Raises UserError."""
        from kdfast.synthetic.prompts import PROMPT

        if self.prompt_file is None:
            return PROMPT
        try:
            found = read_bytes(Path(self.prompt_file).expanduser()).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {self.prompt_file} cannot be read ({error}).") from None
        if not any(name in found for name in ("{context}", "{before}")):
            raise UserError(f"--prompt_file {self.prompt_file} lacks {{context}}: write it in.")
        if "{answer}" not in found and ("{before}" in found or "{after}" in found):
            raise UserError(f"--prompt_file {self.prompt_file} lacks {{answer}}: write it in.")
        return found


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv)


def parse(argv: list[str]) -> QuestionsConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(QuestionsConfig, "questions", __doc__), argv)


def start(config: QuestionsConfig) -> None:
    """The work of the program."""
    config.check()
    template = config.template()
    from kdfast.models.hub import local_folder
    from kdfast.synthetic.candidates import CandidateFile
    from kdfast.synthetic.contexts import read_paragraphs
    from kdfast.synthetic.selection import Thresholds, select
    from kdfast.teachers.cache import weights_key

    counts: Counter[str] = Counter()
    paragraphs = read_paragraphs(config.data, counts)
    about = {
        "generator": config.generator or config.endpoint_model,
        "revision": "",
        "prompt": hashlib.sha256(template.encode()).hexdigest()[:16],
        "seed": config.seed,
        "teacher": config.teacher,
        "teacher_revision": weights_key(local_folder(config.teacher, "--teacher"))[:16],
    }
    if config.generator:
        about["revision"] = weights_key(local_folder(config.generator, "--generator"))[:16]
    file = CandidateFile(Path(config.output).expanduser(), key_of(config, paragraphs, about))
    with file.held():
        lines = file.load(len(paragraphs))
        if len(lines) < len(paragraphs):
            if lines:
                print_line(f"{file.path} has {len(lines)} of {len(paragraphs)} contexts: going on.")
            generation = generation_of(config, template, paragraphs)
            with passing_bar("questions", "context", len(paragraphs)) as bar:
                bar.update(len(lines))
                for line in generation.lines(set(lines)):
                    file.add(line)
                    lines[line["paragraph"]] = line
                    bar.update()
        limits = (config.min_f1, config.min_margin, config.min_null_margin, config.margin_over)
        found = select(paragraphs, lines, Thresholds(*limits), about, counts)
        say(counts, len(paragraphs))
        if not found["data"]:
            raise UserError(
                f"No question was kept, so that {config.output} is not written: {file.path} holds "
                "all of them; look there, and lower --min_f1 or --min_margin."
            )
        write_json(file.output, found)
        print_line(f"The questions are in {file.output}, all candidates in {file.path}.")


def address(base_url: str | None) -> str:
    """Of the endpoint: what was given, else what the environment says, else OpenAI's own."""
    return base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def key_of(config: QuestionsConfig, paragraphs: "list[Paragraph]", about: dict[str, Any]) -> str:
    """A key of all that candidates depend on but the versions of libraries."""
    names = ("base_url", "request", "questions_per_context", "temperature", "max_new_tokens")
    used: dict[str, Any] = {name: getattr(config, name) for name in (*names, "unanswerable")}
    if config.endpoint_model:
        used["base_url"] = address(config.base_url)
    if config.generator:  # the replies of a model to prompts that it reads together
        used["batch_size"] = config.batch_size
    contexts = hashlib.sha256()
    for each in paragraphs:
        contexts.update(json.dumps(asdict(each)).encode() + b"\n")
    made_of = [FORMAT, used, about | {"teacher": "", "generator": ""}, contexts.hexdigest()]
    made_of.append("" if config.generator else config.endpoint_model)
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def say(counts: Counter[str], contexts: int) -> None:
    """Print what was kept, and then what was dropped and why, the most frequent first."""
    kept = [counts.pop(name, 0) for name in ("agreement", "margin", "unanswerable")]
    print_line(
        f"{contexts} contexts: {kept[0]} questions are kept by agreement, {kept[1]} by the margin, "
        f"and {kept[2]} unanswerable ones."
    )
    for reason, count in sorted(counts.items(), key=lambda each: (-each[1], each[0])):
        if count:
            noted = reason.startswith("noted: ")
            print_line(f"  {'' if noted else 'dropped '}{count}: {reason.removeprefix('noted: ')}")


def generation_of(
    config: QuestionsConfig, template: str, paragraphs: "list[Paragraph]"
) -> "Generation":
    """The generator and the teacher, loaded. Raises UserError."""
    from kdfast.common.device import pick_device
    from kdfast.common.run import Run
    from kdfast.evaluation.evaluated_model import AnswerSettings
    from kdfast.synthetic.generation import Asking, Generation
    from kdfast.synthetic.generators import Endpoint, Generator, LocalGenerator, Sampling
    from kdfast.synthetic.judge import Judge

    sampling = Sampling(config.temperature, config.max_new_tokens, config.seed)
    generator: Generator
    if config.generator:
        generator = LocalGenerator(config.generator, sampling)
    else:
        tries = (config.timeout, config.max_retries)
        fields = config.request_fields()
        generator = Endpoint(
            config.endpoint_model, address(config.base_url), sampling, fields, tries
        )
    settings = AnswerSettings(None, None, None, 30, 20, Path("~/.cache/kdfast").expanduser())
    asking = Asking(template, config.questions_per_context, config.unanswerable, config.batch_size)
    judge = Judge(config.teacher, settings, Run(pick_device()))
    return Generation(paragraphs, generator, judge, asking)


if __name__ == "__main__":
    sys.exit(main())
