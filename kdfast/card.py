"""`python -m kdfast.card`: card, pictures and report of a finished run, from its result files.

`kdfast.train` ends with it. Start it again when `kdfast.evaluate --output_dir MODEL_DIR/eval` has
written more results.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast.common import program
from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object, write_json
from kdfast.config import TrainConfig, flag
from kdfast.evaluation.settings import EvaluateConfig

if TYPE_CHECKING:
    from kdfast.cards.run_files import RunFiles

Log = Callable[[str], None]


@dataclass(frozen=True)
class CardConfig:
    """What the card of a run says beyond its result files, and where it goes."""

    model_dir: str | None = flag(None, "Folder of a finished run of kdfast.train.")
    beside: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "DIR",
            "help": "Folders of other runs, for the picture of quality against latency; later "
            "cards keep them.",
        },
    )
    report: bool = flag(
        False, "Let model and teacher answer the run's --validation_file, and write report.html."
    )
    language: str | None = flag(None, "Code of the data's language, or de,es. Default: as before.")
    license: str | None = flag(None, "The model's license. Default: as before.")
    push_to_hub: str | None = flag(
        None, "Upload the model to this hub repository, made private if it is new."
    )

    @classmethod
    def of_run(cls, config: TrainConfig) -> "CardConfig":
        """What the settings of a run say of it."""
        return cls(
            model_dir=config.output_dir,
            report=config.report,
            language=config.language,
            license=config.license,
            push_to_hub=config.push_to_hub,
        )

    def check(self) -> None:
        """Raise UserError for a flag that is missing or out of range."""
        if self.model_dir is None:
            raise UserError("--model_dir is missing: name the folder of a finished run.")

        from kdfast.cards import model_card

        model_card.check(self.language, self.push_to_hub)


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv)


def parse(argv: list[str]) -> CardConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(CardConfig, "card", __doc__), argv)


def start(config: CardConfig) -> None:
    """The work of the program."""
    config.check()
    publish(config, lambda text: print(text, flush=True))


def publish(config: CardConfig, log: Log) -> None:
    """Write pictures, card and, if wanted, report; then, if wanted, upload the model."""
    from kdfast.cards import figures, html, model_card
    from kdfast.cards.run_files import read_run
    from kdfast.models.save import writing
    from kdfast.training.run_folder import CARD_SETTINGS

    folder = Path(config.model_dir).expanduser()
    files = read_run(folder)
    if config.report and needs_answers(files):
        who = "Student and teacher answer" if files.teacher else "The model answers"
        log(f"{who} --validation_file for the report.")
        answer_validation(files)
        files = read_run(folder)
    kept = kept_settings(folder)
    beside = [read_run(Path(name).expanduser()) for name in config.beside or []]
    given = {str(each.folder.resolve()): each for each in beside}
    for name in kept["beside"]:
        try:
            given.setdefault(name, read_run(Path(name)))
        except UserError:
            log(f"{name}, which the card had, is left out: it is no run any more.")
    beside = list(given.values())
    kept = {
        "beside": list(given),
        "language": config.language or kept["language"] or files.config.get("language"),
        "license": config.license or kept["license"] or files.config.get("license"),
        "repository": config.push_to_hub or kept["repository"],
    }
    for note in [note for each in (files, *beside) for note in each.notes]:
        log(note)
    plots = {}
    if figures.is_possible():
        plots = figures.save(files, beside)
    else:
        log("Pictures are left out, as matplotlib is absent: pip install matplotlib.")
    path = model_card.write_card(
        files,
        plots,
        kept["repository"],
        kept["language"],
        kept["license"],
    )
    with writing(folder / CARD_SETTINGS):
        write_json(folder / CARD_SETTINGS, kept)
    log(f"The card is {path}.")
    if config.report:
        log(f"The report is {html.write(files, plots)}: open it in a browser.")
    if config.push_to_hub:
        log(f"The model is at {model_card.push(folder, config.push_to_hub)}.")


def kept_settings(folder: Path) -> dict[str, Any]:
    """What earlier cards of the run were given: `beside`, a list, and texts or None."""
    from kdfast.training.run_folder import CARD_SETTINGS

    found = read_json_object(folder / CARD_SETTINGS)
    texts = {name: found.get(name) for name in ("language", "license", "repository")}
    kept = {name: text if isinstance(text, str) else None for name, text in texts.items()}
    names = found.get("beside")
    names = [each for each in names if isinstance(each, str)] if isinstance(names, list) else []
    return {"beside": names, **kept}


def needs_answers(files: "RunFiles") -> bool:
    """Whether the run's own validation data were not answered question by question yet."""
    source = files.config["validation_file"]
    return source is not None and files.result_of(source) is None


def answer_validation(files: "RunFiles") -> None:
    """Evaluate model and teacher on the run's validation data, into its eval/."""
    from kdfast.cards.run_files import EVAL_FOLDER
    from kdfast.common.ranks import Ranks
    from kdfast.evaluate import evaluate

    config = files.config
    settings = EvaluateConfig(
        data=[config["validation_file"]],
        model=str(files.folder),
        compare=files.teacher,
        output_dir=str(files.folder / EVAL_FOLDER),
        cache_dir=config["cache_dir"],
        max_seq_length=config["max_seq_length"],
        max_query_length=config["max_query_length"],
        doc_stride=config["doc_stride"],
        max_answer_length=config["max_answer_length"],
        n_best_size=config["n_best_size"],
        mixed_precision=config["mixed_precision"],
        metric=files.run.get("metric"),
        language=files.run.get("language"),
    )
    evaluate(settings, Ranks())


if __name__ == "__main__":
    sys.exit(main())
