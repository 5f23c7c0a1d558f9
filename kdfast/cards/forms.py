"""What the card needs of run.json, card.json and eval/: what these hold besides may be anything.

Entries that earlier versions do not write may be absent.
"""

from typing import Any

from kdfast.common.forms import (
    Form,
    boolean,
    list_of,
    mapping,
    number,
    optional,
    record,
    text,
    unicode,
    where,
    whole,
)

# One file, or several.
FILES = where(lambda value: text(value) is None or (bool(value) and list_of(text)(value) is None))
FROM = {"teacher": optional(list_of(text)), "student": optional(text)}
FROM |= {"student_layers": optional(text), "train_file": FILES, "learning_rate": number()}
LAYERS_STAGE = FROM | {"attention_loss": text}
CONFIG: dict[str, Form] = {
    **FROM,
    **dict.fromkeys(("distillation_loss", "convention", "stage"), text),
    "mixed_precision": optional(text),
    "validation_file": optional(FILES),
    "validation_split": optional(number()),
    **dict.fromkeys(("language", "license"), optional(unicode)),
    **dict.fromkeys(("max_seq_length", "max_query_length", "doc_stride"), whole()),
    **dict.fromkeys(("max_answer_length", "n_best_size", "train_batch_size", "seed"), whole()),
    **dict.fromkeys(("num_train_epochs", "warmup_ratio", "embeds_dropout_prob"), number()),
    **dict.fromkeys(("temperature", "distillation_loss_weight", "weight_decay"), number()),
    **dict.fromkeys(("max_steps", "max_grad_norm"), number()),
    "load_best_model_at_end": boolean,
    "train_languages": optional(list_of(unicode)),
    "unlabelled_file": optional(FILES),
}
FIGURES: dict[str, Form] = {"exact": number(), "f1": number(), "total": whole()}
PARTS = ("HasAns_f1", "NoAns_f1", "best_f1")  # of figures, where there are such questions
RULE = {"metric": text, "language": optional(text)}  # absent: SQuAD's
ONE_FILE = record(FIGURES | RULE | {"file": text}, *RULE)
METRICS = record(
    FIGURES | dict.fromkeys(PARTS, number()) | {"files": list_of(ONE_FILE)}, *PARTS, "files"
)
HARDWARE = record({"cpu": text, "cpu_threads": whole(), "gpu": optional(text)})
TRAIN_FILE = {"file": text, "language": optional(unicode), "weight": number(), "trained": whole()}
TRAIN_FILE |= {"unlabelled": whole()}
RUN: dict[str, Form] = {
    "config": record(
        CONFIG,
        "stage",
        "language",
        "license",
        "train_languages",
        "unlabelled_file",
        "validation_split",
    ),
    **dict.fromkeys(("steps", "updates", "train_windows", "student_parameters"), whole()),
    **RULE,
    "questions": record({"files": list_of(record(TRAIN_FILE))}, "files"),
    "ranks": whole(1),
    "precision": text,
    "hardware": HARDWARE,
    "versions": mapping(optional(text)),
    "layers_stage": optional(record(LAYERS_STAGE)),
    "local_paths": list_of(text),
    "train_speed": optional(
        record(
            dict.fromkeys(
                ("windows_per_second", "tokens_per_second", "padding_share", "matmul_share"),
                number(),
            )
        )
    ),
    "metrics": optional(METRICS),
    "best_f1": optional(number()),
    "best_steps": optional(whole()),
    "early_stopping": optional(record({"planned_steps": whole()})),
}
LATER = ("questions", "ranks", "layers_stage", "local_paths", "train_speed", "best_steps")
_RUN = record(RUN, *RULE, *LATER, "early_stopping")


def run_form(value: Any) -> str | None:
    """The form of run.json."""
    if (fault := _RUN(value)) is not None:
        return fault
    if "kdfast" not in value["versions"]:
        return "versions.kdfast"
    config, first = value["config"], value.get("layers_stage")
    for name, each in (("layers_stage", first), ("config", config)):
        if each and not each["teacher"] and not each["student"]:
            return f"{name}.teacher"
    needs_teacher = (first, config if config["distillation_loss_weight"] else None)
    if any(each and not each["teacher"] for each in needs_teacher):
        return "config.teacher"
    validated = config["validation_file"] or config.get("validation_split")
    return "config.validation_file" if value["metrics"] and not validated else None


# train_log.jsonl
STEP = record(
    {"step": whole(), "lr": number(), "soft": optional(number()), "hard": optional(number())}
)
EVALUATION = record({"evaluated_after": whole(), **FIGURES, "files": list_of(ONE_FILE)}, "files")

# eval/NAME.eval.json
INTERVAL = where(lambda value: list_of(number())(value) is None and len(value) == 2)
INTERVALS = record(dict.fromkeys((*FIGURES, *PARTS), INTERVAL), *FIGURES, *PARTS)
MODEL = record(
    {
        "name": text,
        "parameters": whole(1),
        "weights_sha256": text,
        "latency": record({"data": text, "median_ms": number(), "p80_ms": number()}),
    }
)
DIFFERENCE = record({"mean": number(), "interval": INTERVAL, "p": number()})
COMPARED = record(
    {
        "metrics": METRICS,
        "windows_per_second": number(),
        "difference": record({"exact": DIFFERENCE, "f1": DIFFERENCE}),
    }
)
RESULT: dict[str, Form] = {
    "name": unicode,
    **dict.fromkeys(("dataset", "config", "split", "revision", "file"), optional(text)),
    **RULE,
    "model": MODEL,
    "compared_with": optional(MODEL),
    "settings": record({"precision": text}),
    "bootstrap": record({"level": number()}),
    "hardware": HARDWARE,
    "metrics": METRICS,
    "intervals": INTERVALS,
    "null_threshold": optional(number()),
    "windows_per_second": number(),
    "worst_forms": record({"metrics": METRICS, "intervals": INTERVALS}),
    "compared": COMPARED,
    "questions_sha256": text,
}
_RESULT = record(RESULT, *RULE, "worst_forms", "compared", "questions_sha256")


def result_form(value: Any) -> str | None:
    """The form of an evaluation's result of one set."""
    if (fault := _RESULT(value)) is not None:
        return fault
    if "compared" in value and not value["compared_with"]:
        return "compared_with"
    return None if value["dataset"] or value["file"] else "file"


# eval/NAME.questions.json
ANSWER: dict[str, Form] = {"answer": text, "exact": number(), "f1": number()}


def questions_form(is_compared: bool) -> Form:
    """The form of what an evaluation made of each question; is_compared: so did another model."""
    return mapping(record(ANSWER | ({"compared": record(ANSWER)} if is_compared else {})))


KEPT = {"beside": list_of(unicode)}
KEPT |= dict.fromkeys(("language", "license", "repository"), optional(unicode))
CARD = record(KEPT, *KEPT)  # of card.json
