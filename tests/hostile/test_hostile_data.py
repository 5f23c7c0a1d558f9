"""SQuAD files, predictions and logs that were damaged or made up: an answer, or one sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdfast.common.errors import UserError
from kdfast.config import WindowSettings
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from kdfast.evaluation import answers, metrics, predictions
from kdfast.training.log import read_log
from tests import small_tokenizers
from tests.data.source_files import flat, official, write_parquet
from tests.hostile.mutations import check_sentence, damaged_bytes, examples, json_files

KINDS = {"official": official(), "flat": flat()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def read_to_the_end(path):
    """From the file to scored answers; returns whether it was taken."""
    try:
        found = read_examples(str(path))
        windows = windows_of(
            found,
            small_tokenizers.of_family("bert"),
            WindowSettings(60, 10, 20),
        )
        logits = np.zeros((len(windows.input_ids), 2), dtype=np.float32)
        spans = answers.best_spans(windows, logits, n_best_size=3)
        predicted = answers.predictions(spans, windows, found)
        metrics.score(metrics.gold_answers(found), predicted.predictions, predicted.null_odds, 0.0)
    except UserError as error:
        check_sentence(error)
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@examples(80)
@given(data=st.data())
def test_a_json_file(folder, kind, data):
    path = folder / f"{kind}.{data.draw(st.sampled_from(['json', 'jsonl']))}"
    path.write_bytes(data.draw(json_files(KINDS[kind])))
    read_to_the_end(path)


@examples(20)
@given(data=st.data())
def test_a_parquet_file(folder, data):
    path = folder / "good.parquet"
    if not path.exists():
        write_parquet(path, flat())
    bad = folder / "bad.parquet"
    bad.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    read_to_the_end(bad)


def test_a_sentence_is_one_line_whatever_it_quotes(folder):
    path = folder / "lines.json"
    row = {"id": "a\nb\x1b[2J" + 9999 * "x", "context": "c", "question": None}
    path.write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"a\\nb\\u001b\[2J") as caught:
        read_examples(str(path))
    check_sentence(caught.value)
    deep = folder / "deep.json"
    deep.write_text('{"a": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(UserError) as caught:
        predictions.read_answers(str(deep), [])
    check_sentence(caught.value)


@examples(30)
@given(
    content=json_files({"a": "Rollo", "b": ""}),
    read=st.sampled_from([predictions.read_answers, predictions.read_odds]),
)
def test_predictions_and_odds(folder, content, read):
    path = folder / "predictions.json"
    path.write_bytes(content)
    try:
        read(str(path), [])
    except UserError as error:
        check_sentence(error)


LINES = [{"step": 0, "loss": 1.0}, {"evaluated_after": 1, "f1": 3.0}, {"step": 1, "loss": None}]


@examples(20)
@given(content=st.lists(json_files(LINES[0]), max_size=4))
def test_a_log(folder, content):
    lines = [json.dumps(LINES[0]).encode(), *content]
    (folder / "train_log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(folder, 5, 5)[0] == LINES[0]
