"""Templates of what is shown of a run: what its files hold stays text, in Markdown and in HTML.

Every value that a template prints goes through `markdown` or `shown_in_html`, unless it is Markup.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
# Categories of characters that are not seen, and that may change what is seen around them.
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Of these, what texts of many languages need: white space, joiners, marks of direction, hyphens.
IN_TEXTS = "\t\n\r\u200c\u200d\u200e\u200f\u00ad"
# What begins something in Markdown within a line. An underscore inside a word begins nothing.
SYNTAX = re.compile(r"[\\`*\[\]<>&|#~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def render(template: str, **values: Any) -> str:
    """Fill in a file of templates/."""
    is_html = template.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        finalize=shown_in_html if is_html else markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, codes=codes, setting=setting, quoted=quoted)
    environment.filters.update(device=device)
    return environment.get_template(template).render(**values)


def visible(text: str, kept: str = "") -> str:
    """`text` with each character that is not seen, those in `kept` apart, as Python writes it."""
    if text.isprintable():
        return text
    return "".join(
        ascii(each)[1:-1] if unicodedata.category(each) in UNSEEN and each not in kept else each
        for each in text
    )


def plain(text: Any) -> str:
    """`text` in one line, all of it visible."""
    return visible(re.sub(r"\s+", " ", str(text)))


def markdown(value: Any) -> Any:
    """A value within a line or a table's cell of Markdown."""
    if isinstance(value, (Markup, int, float, jinja2.Undefined)):
        return value
    # Two backslashes and a bracket would begin a formula on the hub.
    return Markup(
        SYNTAX.sub(lambda each: "&#92;" if each[0] == "\\" else f"\\{each[0]}", plain(value))
    )


def shown_in_html(value: Any) -> Any:
    """A value in HTML, before Jinja escapes it."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return visible(value, kept=IN_TEXTS) if is_text else value


def each_text(content: Any, change: Callable[[str], Any]) -> Any:
    """`content`, values of JSON, with every string in it changed, but for the names in objects."""
    if isinstance(content, dict):
        return {name: each_text(value, change) for name, value in content.items()}
    if isinstance(content, list):
        return [each_text(value, change) for value in content]
    return change(content) if isinstance(content, str) else content


def code(text: Any) -> Markup:
    """`text` in Markdown's code marks, also where it holds such marks."""
    text = plain(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or not text else ""
    return Markup(f"{marks}{space}{text}{space}{marks}")


def codes(texts: list[Any], between: str) -> Markup:
    """Each text in code marks."""
    return Markup(between.join(map(code, texts)))


def setting(value: Any) -> str:
    """A setting as people write it: 3e-05 for 0.00003, JSON's words for the rest."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def quoted(text: str) -> Markup:
    """`text` as Python source."""
    return Markup(visible(json.dumps(text, ensure_ascii=False)))


def device(record: dict[str, Any]) -> str:
    """The hardware that a result file names."""
    hardware = record["hardware"]
    threads = hardware["cpu_threads"]
    return hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"
