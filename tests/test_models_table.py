"""docs/models.md says what models of each supported type do."""

import pytest

from tests import models_table, published

REMEDY = "docs/models.md is out of date: `python -m tests.models_table` writes its table again"


def test_a_row_for_every_type_and_every_column():
    table = models_table.in_document()
    assert tuple(table) == published.TYPES, REMEDY
    assert all(list(row) == list(models_table.COLUMNS) for row in table.values()), REMEDY


@pytest.mark.program
@pytest.mark.parametrize("column", models_table.COLUMNS)
@pytest.mark.parametrize("model_type", published.TYPES)
def test_a_cell_says_what_was_seen(column, model_type, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = models_table.COLUMNS[column](model_type)
    assert models_table.in_document()[model_type][column] == seen, REMEDY
