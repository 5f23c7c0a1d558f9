"""Templates of what is shown of a run: a name stays a name, in Markdown and in HTML."""

import json
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Fill in a file of templates/. Text in HTML is escaped; in Markdown its filters do that."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, cell=cell, setting=setting, quoted=quoted, device=device)
    return environment.get_template(template).render(**values)


def code(text: str) -> str:
    """`text` in Markdown's code marks, also where it holds such marks."""
    text = " ".join(text.split())
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def cell(text: str) -> str:
    """`text` within a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def setting(value: Any) -> str:
    """A setting as people write it: 3e-05 for 0.00003, JSON's words for the rest."""
    return cell(f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"'))


def quoted(text: str) -> str:
    """`text` as Python source."""
    return json.dumps(text, ensure_ascii=False)


def device(record: dict[str, Any]) -> str:
    """The hardware that a result file names."""
    hardware = record["hardware"]
    threads = hardware["cpu_threads"]
    return hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"
