"""`python -m kdfast.card`: card, pictures and report of a finished run, from its result files.

`kdfast.train` ends with it. Start it again when `kdfast.evaluate --output_dir MODEL_DIR/eval` has
written more results.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast.common import program
from kdfast.common.errors import UserError
from kdfast.common.files import read_record, refuse_link, write_json, write_text
from kdfast.common.progress import print_line
from kdfast.common.settings import flag
from kdfast.config import TrainConfig
from kdfast.evaluation.settings import EvaluateConfig

if TYPE_CHECKING:
    from kdfast.cards.run_files import RunFiles

Log = Callable[[str], None]


@dataclass(frozen=True)
class CardConfig:
    """What the card of a run says beyond its result files, and where it goes."""

    model_dir: str = flag("", "Folder of a finished run of kdfast.train.")
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
    cache_dir: str = flag("~/.cache/kdfast", "Folder for the features that --report prepares.")
    push_to_hub: str | None = flag(
        None, "Upload the model to this hub repository, made private if it is new."
    )

    @classmethod
    def of_run(cls, config: TrainConfig) -> "CardConfig":
        """What the settings of a run say of it."""
        output = config.output
        return cls(
            model_dir=output.output_dir,
            cache_dir=config.data.cache_dir,
            report=output.report,
            language=output.language or None,
            license=output.license or None,
            push_to_hub=output.push_to_hub or None,
        )

    def check(self) -> None:
        """Raise UserError for a flag that is missing or out of range."""
        if not self.model_dir:
            raise UserError("--model_dir is missing: name the folder of a finished run.")

        from kdfast.cards import model_card

        model_card.check(self.language, self.push_to_hub)

    def check_access(self) -> None:
        """Raise UserError for a --push_to_hub that the hub would refuse, or has no network for."""
        if self.push_to_hub:
            from kdfast.cards.push import check_access

            check_access(self.push_to_hub)


@dataclass(frozen=True)
class Card:
    """The card of a run and what it is made of.

    Attributes:
        files: The run.
        plots: Picture, relative to the run -> caption.
        results: Files with results for the hub, relative to the run.
        settings: What card.json holds: beside, language, license, repository.
    """

    files: "RunFiles"
    plots: dict[str, str]
    results: list[str]
    settings: dict[str, Any]

    def of_repository(self, repo_id: str) -> "Card":
        """The same card for a model that is on the hub."""
        return replace(self, settings=self.settings | {"repository": repo_id})

    def text(self) -> str:
        """What README.md holds."""
        from kdfast.cards.model_card import card_of

        wanted = (self.settings[name] for name in ("repository", "language", "license"))
        return card_of(self.files, self.plots, *wanted)

    def write(self) -> Path:
        """Write README.md and card.json into the run's folder; returns the former."""
        from kdfast.cards.model_card import CARD_FILE
        from kdfast.models.save import writing
        from kdfast.training.run_folder import CARD_SETTINGS

        path, settings = (self.files.folder / name for name in (CARD_FILE, CARD_SETTINGS))
        with writing(path.parent):
            write_text(path, self.text())
            write_json(settings, self.settings)
        return path


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv)


def parse(argv: list[str]) -> CardConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(CardConfig, "card", __doc__), argv)


def start(config: CardConfig) -> None:
    """The work of the program."""
    config.check()
    config.check_access()
    upload(write_card(config, print_line), config.push_to_hub, print_line)


def write_card(config: CardConfig, log: Log) -> Card:
    """Write pictures, results, card and, if wanted, report: all but what --push_to_hub does."""
    from kdfast.cards import figures, html, model_card
    from kdfast.cards.run_files import read_run
    from kdfast.models.save import writing

    folder = Path(config.model_dir).expanduser()
    files = read_run(folder)
    named = files.config["validation_file"]
    if config.report and isinstance(named, list):
        log("The report shows no questions, as the run has several --validation_file.")
    if config.report and isinstance(named, str) and not files.result_of_validation():
        who = "Student and teacher answer" if files.teachers else "The model answers"
        log(f"{who} --validation_file for the report.")
        answer_validation(files, config.cache_dir)
        files = read_run(folder)
    settings, others = card_settings(config, files, log)
    for note in [note for each in (files, *others) for note in each.notes]:
        log(note)
    if not find_spec("matplotlib"):
        log("Pictures are left out, as matplotlib is absent: pip install matplotlib.")
    with writing(folder):
        plots = figures.save(files, others) if find_spec("matplotlib") else {}
        results = model_card.write_results(files)
    card = Card(files, plots, results, settings)
    log(f"The card is {card.write()}.")
    if config.report:
        log(f"The report is {html.write(files, plots)}: open it in a browser.")
    return card


def card_settings(
    config: CardConfig, files: "RunFiles", log: Log
) -> tuple[dict[str, Any], list["RunFiles"]]:
    """What card.json is to hold, from the flags, an earlier card and the run; the runs beside."""
    from kdfast.cards import forms
    from kdfast.cards.run_files import read_run
    from kdfast.training.run_folder import CARD_SETTINGS

    path = files.folder / CARD_SETTINGS
    refuse_link(path)  # before the rest is written
    before = read_record(path, forms.CARD)
    others = {}
    for name in config.beside or []:
        run = read_run(Path(name).expanduser())
        others[str(run.folder.resolve())] = run
    for name in before.get("beside", []):
        try:
            others.setdefault(name, read_run(Path(name)))
        except UserError:
            log(f"{name}, which the card had, is left out: it is no run any more.")
    settings = {
        "beside": list(others),
        "language": config.language or before.get("language") or files.config.get("language"),
        "license": config.license or before.get("license") or files.config.get("license"),
        "repository": before.get("repository"),
    }
    return settings, list(others.values())


def upload(card: Card, repo_id: str | None, log: Log) -> None:
    """Upload the model with its card, which names the repository from then on.

    Where the hub refuses, a UserError says so, and the card in the run's folder stays as it is.
    """
    if not repo_id:
        return
    from kdfast.cards.push import push

    uploaded = card.of_repository(repo_id)
    address = push(card.files.folder, repo_id, uploaded.text(), [*card.plots, *card.results])
    uploaded.write()
    log(f"The model is at {address}.")


def answer_validation(files: "RunFiles", cache_dir: str) -> None:
    """Evaluate model and teacher on the run's validation data, into its eval/.

    cache_dir: not the one in run.json, which may be of another machine.
    """
    from kdfast.cards.run_files import EVAL_FOLDER
    from kdfast.common.ranks import Ranks
    from kdfast.evaluate import evaluate

    same = (
        *("max_seq_length", "max_query_length", "doc_stride"),
        *("max_answer_length", "n_best_size", "mixed_precision"),
    )
    settings = EvaluateConfig(
        data=[files.config["validation_file"]],
        model=str(files.folder),
        compare=files.first_teacher,
        output_dir=str(files.folder / EVAL_FOLDER),
        cache_dir=cache_dir,
        metric=files.run.get("metric"),
        language=files.run.get("language"),
        **{name: files.config[name] for name in same},
    )
    evaluate(settings, Ranks())


if __name__ == "__main__":
    sys.exit(main())
