"""The model card: README.md with front matter, and .eval_results/."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from kdfast.cards.render import each_text, markdown, plain, render
from kdfast.cards.run_files import Record, RunFiles, Source, short
from kdfast.common.errors import UserError
from kdfast.common.files import listed, read_bytes, refuse_link, write_text
from kdfast.common.folders import remove, subfolder
from kdfast.evaluation import tables
from kdfast.evaluation.suites import own_set

CARD_FILE = "README.md"
RESULTS_FOLDER = ".eval_results"
PROGRAM = "kdfast.evaluate"  # in the notes of each result
METRICS = {"exact": ("exact_match", "Exact Match"), "f1": ("f1", "F1")}
ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy "
    "da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu "
    "hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb "
    "lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om "
    "or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw "
    "ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


def check(language: str | None, repo_id: str | None) -> None:
    """Raise UserError for a --language that is none, or a --push_to_hub that is no repository."""
    for each in [] if language is None else language.split(","):
        if each not in (*ISO_639_1.split(), "multilingual") and not re.fullmatch("[a-z]{3}", each):
            raise UserError(
                f"--language {language}: {each!r} is no ISO 639 code: give such as en or de,es."
            )
    if repo_id is not None:
        with suppress(HFValidationError):
            validate_repo_id(repo_id)
            if "/" in repo_id:
                return
        raise UserError(f"--push_to_hub {repo_id} is no repository's id: give USER/NAME.")


def card_of(
    files: RunFiles,
    plots: Mapping[str, str],
    repo_id: str | None = None,
    language: str | None = None,
    license: str | None = None,
) -> str:
    """The text of README.md. What is not known is left out.

    Args:
        files: The run.
        plots: Picture, relative to the folder -> caption.
        repo_id: Where the model is to be found; None for the folder.
        language: Codes of languages, divided by commas; None for those of --train_languages or of
            known hub datasets.
        license: The model's license.
    """
    title = repo_id or files.name
    train_data = train_sources(files)
    languages = language.split(",") if language else known_languages(files)
    # Latency is that of the first result with another model, or else of the first.
    by_comparison = sorted(files.results, key=lambda each: "compared" not in each)
    return render(
        "model_card.md",
        metadata=Markup(as_yaml(front_matter(files, title, languages, license).to_dict()).strip()),
        title=title,
        files=files,
        languages=languages,
        license=license,
        train_data=[each.name for each in train_data],
        validated=files.validated(),
        measured=next(iter(by_comparison), None),
        table=Markup(tables.table(each_text(files.results, markdown))),
        scored_by=tables.scored_by,
        short=short,
        plots=plots,
        loaded_as=repo_id or str(files.folder),
    )


def train_sources(files: RunFiles) -> list[Source]:
    """All data that the run was trained on."""
    unlabelled = files.config.get("unlabelled_file") or []
    return files.sources(files.config["train_file"]) + files.sources(unlabelled)


def known_languages(files: RunFiles) -> list[str]:
    """The languages of the training data, as --train_languages or the hub's sets have them."""
    named = files.config["train_file"]
    found = files.config.get("train_languages") or [
        own_set(text).language
        for text, each in zip(
            [named] if isinstance(named, str) else named, files.sources(named), strict=True
        )
        if each.on_hub
    ]
    return list(dict.fromkeys(each for each in found if each))


def as_yaml(content: Any) -> str:
    """`content` as YAML, every text in one line and visible."""
    return yaml.safe_dump(each_text(content, plain), sort_keys=False, allow_unicode=True)


def front_matter(
    files: RunFiles, title: str, languages: list[str], license: str | None
) -> ModelCardData:
    """The card's metadata, as the hub reads it."""
    on_hub = [each.name for each in train_sources(files) if each.on_hub]
    found = eval_results(files)
    return ModelCardData(
        language=languages[0] if len(languages) == 1 else languages or None,
        license=license,
        library_name="transformers",
        pipeline_tag="question-answering",
        tags=["extractive-qa", "kdfast", *(["distillation"] if files.teachers else [])],
        datasets=on_hub or None,
        base_model=None if files.is_local(files.origin) else files.origin,
        metrics=[metric for metric, _ in METRICS.values()] if found else None,
        model_name=title,
        eval_results=found or None,
    )


def eval_results(files: RunFiles) -> list[EvalResult]:
    """Exact match and F1 of every evaluated set, and of its worst forms where it has such."""
    found = []
    for result in files.results:
        source, rule = Source.of_result(result), _rule(result)
        found += _entries(source, result["name"], result["metrics"], rule)
        if "worst_forms" in result:
            worst = result["worst_forms"]["metrics"]
            found += _entries(source, result["name"], worst, f"{rule}, worst forms")
    if not files.result_of_validation():
        for each in files.validated():
            found += _entries(each["source"], each["label"], each, _rule(each))
    return found


def _rule(result: Record) -> str:
    """The rule of a result within a figure's name, where it is another than SQuAD's."""
    return "" if (rule := tables.scored_by(result)) == "squad" else f", {rule}"


def _entries(
    source: Source, name: str, metrics: Mapping[str, float], rule: str
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="question-answering",
            task_name="Question Answering",
            dataset_type=source.name,
            dataset_name=name,
            dataset_config=source.config,
            dataset_split=source.split,
            dataset_revision=source.revision,
            metric_type=metric,
            metric_name=f"{heading}{rule}",
            metric_value=round(metrics[key], 4),
        )
        for key, (metric, heading) in METRICS.items()
    ]


def write_results(files: RunFiles) -> list[str]:
    """.eval_results/SET.yaml of every set that was read from the hub: its F1, EM in the notes.

    The form is that of huggingface.co/docs/hub/eval-results, a file a set. task_id is the set's
    config: the hub shows a result where the dataset declares a task of that id.

    Returns:
        The files' names, relative to the run's folder.
    """
    folder = files.folder / RESULTS_FOLDER
    refuse_link(folder)
    for path in listed(folder, "*.yaml"):
        if path.is_file() and PROGRAM.encode() in read_bytes(path):  # one of an earlier card
            remove(path)
    written = []
    for result in files.results:
        source = Source.of_result(result)
        if not source.on_hub:
            continue
        entry = EvalResultEntry(
            dataset_id=source.name,
            task_id=source.config or "default",
            value=round(result["metrics"]["f1"], 4),
            notes=f"F1{_rule(result)}; exact match {result['metrics']['exact']:.4f}; {PROGRAM}",
        )
        subfolder(folder)
        name = f"{RESULTS_FOLDER}/{result['name']}.yaml"
        write_text(files.folder / name, as_yaml(eval_result_entries_to_yaml([entry])))
        written.append(name)
    return written
