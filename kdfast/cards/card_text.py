"""The text of a model card: sections as on the published cards, figures from result files alone."""

import json
from typing import Any

from kdfast.cards.run_files import RunFiles, as_text, short
from kdfast.evaluation import tables

# What Haystack 1.x and the published cards call a setting, and what kdfast.train calls it.
HYPERPARAMETERS = {
    "batch_size": "train_batch_size",
    "n_epochs": "num_train_epochs",
    "max_seq_len": "max_seq_length",
    "learning_rate": "learning_rate",
    "lr_schedule": "warmup_ratio",
    "embeds_dropout_prob": "embeds_dropout_prob",
    "temperature": "temperature",
    "distillation_loss_weight": "distillation_loss_weight",
}
OF_DISTILLATION = ("temperature", "distillation_loss_weight")
WITHOUT_COUNTERPART = (
    "max_steps",
    "doc_stride",
    "max_query_length",
    "distillation_loss",
    "convention",
    "weight_decay",
    "max_grad_norm",
    "seed",
)


def body(files: RunFiles, title: str, loaded_as: str, language: list[str], plots: dict) -> str:
    """The card below its front matter, in Markdown.

    loaded_as: the folder or hub id in the usage block. plots: picture in the folder -> caption.
    """
    sections = [
        f"# {title}",
        summary(files),
        f"## Overview\n\n{overview(files, title, language)}",
        f"## Details\n\n{details(files)}",
        f"## Hyperparameters\n\n{hyperparameters(files)}",
    ]
    if performance_text := performance(files):
        sections.append(f"## Performance\n\n{performance_text}")
    if plots:
        pictures = [f"![{caption}]({name})" for name, caption in plots.items()]
        sections.append("## Course of the run\n\n" + "\n\n".join(pictures))
    sections.append(f"## Usage\n\n{usage(loaded_as)}")
    return "\n\n".join(sections) + "\n"


def summary(files: RunFiles) -> str:
    """One sentence: who learnt from whom."""
    if files.teacher is None:
        return f"A reader that kdfast trained from {student(files)} on gold spans, not distilled."
    teachers = " and ".join(code(files.short(name)) for name in files.teachers)
    return f"A reader that kdfast distilled from {teachers} into {student(files)}."


def student(files: RunFiles) -> str:
    """What the weights were before the run."""
    first = files.layers_stage or files.config
    if not first["student_layers"]:
        return code(files.short(files.origin))
    return f"layers {first['student_layers']} of {code(files.short(files.origin))}"


def overview(files: RunFiles, title: str, language: list[str]) -> str:
    config, ranks, device = files.config, files.run.get("ranks", 1), device_of(files.run)
    evaluated = [code(each["name"]) for each in files.results]
    if not evaluated and files.metrics():
        evaluated = [code(files.source(config["validation_file"]).name)]
    lines = {
        "Language model": code(title),
        "Language": ", ".join(language),
        "Downstream-task": "Extractive QA",
        "Training data": code(files.source(config["train_file"]).name),
        "Eval data": ", ".join(evaluated),
        "Code": f"kdfast {files.run['versions']['kdfast']}, `python -m kdfast.train`",
        "Infrastructure": f"{ranks}x {device}" if ranks > 1 else device,
    }
    return "  \n".join(f"**{name}:** {text}" for name, text in lines.items() if text)


def details(files: RunFiles) -> str:
    """Sentences on the run, then size and latency beside the other model's."""
    run, config = files.run, files.config
    lines = []
    if before := files.layers_stage:
        attention, data = before["attention_loss"], files.source(before["train_file"]).name
        also = "" if attention == "none" else f" and the attention's {attention}"
        lines.append(
            f"Before that: the student learnt the hidden states{also} of "
            f"{code(files.short(before['teacher'][0]))}, on {code(data)}, at a learning rate of "
            f"{as_text(before['learning_rate'])}."
        )
    if files.teachers:
        teachers = ", ".join(code(files.short(name)) for name in files.teachers)
        lines.append(
            f"Teacher: {teachers}, logits computed once. Soft loss: "
            f"{config['distillation_loss']}, padding masked."
        )
    lines.append(
        f"Training: {run['steps']} optimizer steps ({run['updates']} updates of the weights) over "
        f"{run['train_windows']} windows, precision {run['precision']}."
    )
    if speed := run.get("train_speed"):
        lines.append(
            f"Throughput: {speed['windows_per_second']:.1f} windows/s, "
            f"{speed['tokens_per_second']:.0f} tokens/s; {100 * speed['padding_share']:.1f} % of "
            f"what was computed was padding; {100 * speed['matmul_share']:.1f} % of the device's "
            "rate in large matrix products."
        )
    lines.append(f"Size: {run['student_parameters']} parameters.")
    named = [f"{name} {version}" for name, version in run["versions"].items() if version]
    lines.append(f"Versions: {', '.join(named)}.")
    text = "\n".join(f"- {line}" for line in lines)
    return f"{text}\n\n{table}" if (table := latency_table(files)) else text


def latency_table(files: RunFiles) -> str:
    """Size, latency and speed in evaluation, a row a model; "" where nothing measured them.

    From the first result with another model beside, or else the first.
    """
    result = next((each for each in files.results if "compared" in each), None)
    result = result or next(iter(files.results), None)
    if result is None:
        return ""
    models = [("this model", result["model"], result)]
    if "compared" in result:
        models.append((files.other(result), result["compared_with"], result["compared"]))
    rows = [
        "| model | parameters | latency, median | latency, p80 | windows/s |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, model, figures in models:
        latency = model["latency"]
        rows.append(
            f"| {cell(name)} | {model['parameters']} | {latency['median_ms']:.1f} ms | "
            f"{latency['p80_ms']:.1f} ms | {figures['windows_per_second']:.1f} |"
        )
    asked = short(models[0][1]["latency"]["data"])
    rows.append(
        f"\nLatency: one question of {code(asked)} asked alone, windows to logits; windows/s: all "
        f"of {code(result['name'])}. On {device_of(result)}, precision "
        f"{result['settings']['precision']}."
    )
    return "\n".join(rows)


def hyperparameters(files: RunFiles) -> str:
    """A row a setting: its name on the published cards, kdfast's, and the value."""
    config = files.config
    rows = ["| published cards | kdfast.train | value |", "|:--|:--|--:|"]
    for theirs, ours in HYPERPARAMETERS.items():
        value = as_text(config[ours])
        if theirs in OF_DISTILLATION and files.teacher is None:
            continue
        if theirs == "n_epochs" and config["max_steps"] > 0:
            continue
        if theirs == "lr_schedule":
            value = f"LinearWarmup, over {value} of the steps"
        rows.append(f"| `{theirs}` | `{ours}` | {cell(value)} |")
    for ours in WITHOUT_COUNTERPART:
        unused = ours == "max_steps" and config[ours] <= 0
        if not unused:
            rows.append(f"| | `{ours}` | {cell(as_text(config[ours]))} |")
    return "\n".join(rows)


def performance(files: RunFiles) -> str:
    """The sets' figures, the other model's beside, and those of --validation_file."""
    parts = []
    validated, source = files.metrics(), files.config["validation_file"]
    if validated and files.result_of(source) is None:
        parts.append(
            f"On {code(files.source(source).name)}, in the run itself: EM "
            f"{validated['exact']:.2f}, F1 {validated['f1']:.2f} ({validated['total']} questions), "
            f"scored by {tables.scored_by(files.run)}."
        )
    if not files.results:
        return "\n\n".join(parts)
    parts.append(tables.table([_escaped(each) for each in files.results]))
    level = files.results[0]["bootstrap"]["level"]
    parts.append(
        f"In brackets: {100 * level:.0f} % bootstrap intervals. `EM more` and `F1 more`: this "
        "model less the other one, on the same questions."
        if any("compared" in each for each in files.results)
        else f"In brackets: {100 * level:.0f} % bootstrap intervals."
    )
    parts += [line for each in files.results for line in _remarks(files, each)]
    return "\n\n".join(parts)


def _remarks(files: RunFiles, result: dict[str, Any]) -> list[str]:
    """What a reader of a set's figures must know."""
    lines, name = [], code(result["name"])
    if result["dataset"] is not None and result["file"] is not None:
        lines.append(f"{name} was read from the file {code(short(result['file']))}.")
    if "compared" in result:
        other = result["compared"]["metrics"]
        who = files.other(result)
        who = "the teacher" if who == "teacher" else code(who)
        lines.append(
            f"On {name} the other one is {who}: EM {other['exact']:.2f}, F1 {other['f1']:.2f}."
        )
    if result["null_threshold"]:
        lines.append(f"On {name} the null threshold is {result['null_threshold']:.4f}.")
    return lines


def usage(loaded_as: str) -> str:
    """A block that runs where kdfast is installed."""
    return f"""```python
from kdfast import Reader

reader = Reader({json.dumps(loaded_as)})
answer = reader(
    question="Who led the expedition?",
    context="The expedition of 1907 was led by Ernest Shackleton.",
)
print(answer["answer"], answer["score"])
```"""


def device_of(result: dict[str, Any]) -> str:
    """The hardware that a result file names."""
    hardware = result["hardware"]
    threads = hardware["cpu_threads"]
    return hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"


def code(text: str) -> str:
    """`text` in Markdown's code marks, whatever it holds."""
    text = " ".join(text.split())
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def cell(text: str) -> str:
    """`text` within a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"name": cell(result["name"])}
