"""docs/models.md says what models of each supported type do."""

import pytest

from tests import models_table, published

REMEDY = "docs/models.md is out of date: `python -m tests.models_table` writes its table again"


def test_a_row_for_every_type_and_every_column():
    table = models_table.in_document()
    assert tuple(table) == published.TYPES, REMEDY
    assert all(list(row) == list(models_table.COLUMNS) for row in table.values()), REMEDY


def cells():
    for model_type in published.TYPES:
        for column in models_table.COLUMNS:
            is_slow = column == "compiles" and model_type not in ("distilbert", "modernbert")
            yield pytest.param(model_type, column, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.program
@pytest.mark.parametrize(("model_type", "column"), list(cells()))
def test_a_cell_says_what_was_seen(column, model_type, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = models_table.COLUMNS[column](model_type)
    assert models_table.in_document()[model_type][column] == seen, REMEDY
