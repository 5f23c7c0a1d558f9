"""Prompts, and what is read of replies."""

import json
from collections import Counter

import pytest

from kdfast.synthetic.contexts import Paragraph
from kdfast.synthetic.prompts import PROMPT, candidates_of, prompts_of

ONE = json.dumps({"question": "Who  was\nit?", "answer": "Rollo"})


def test_a_context_with_braces_is_taken_as_it_is():
    ((prompt, answer),) = prompts_of(Paragraph("{context}", "a {title} {count}"), PROMPT, 3)
    assert "a {title} {count}" in prompt and "Title: {context}" in prompt and answer == ""
    assert '{"question": "...", "answer": "..."}' in prompt and "{count}" not in prompt[:60]


def test_one_prompt_for_each_answer_that_stands_there_once():
    paragraph = Paragraph("", "Rollo met Anna, and Anna him.", dict.fromkeys(["Rollo", "Anna", ""]))
    template = "{before}<hl> {answer} <hl>{after}"
    assert prompts_of(paragraph, template, 1) == [
        ("<hl> Rollo <hl> met Anna, and Anna him.", "Rollo")
    ]


@pytest.mark.parametrize(
    "reply",
    [
        ONE,
        f"Here you are:\n{ONE}\nThat is all.",
        f"```json\n[{ONE}]\n```",
        f"[\n{ONE},\n{{}}\n]",
        json.dumps({"questions": [json.loads(ONE)]}, indent=1),
        f"<think>Perhaps {{ [ \n{ONE.replace('Rollo', 'Anna')}</think>{ONE}",
    ],
)
def test_forms_of_a_reply(reply):
    assert candidates_of(reply, "", Counter()) == [("Who was it?", "Rollo")]


def test_a_question_without_an_answer():
    for reply in ('{"question": "Who?"}', '{"question": "Who?", "answer": null}'):
        assert candidates_of(reply, "", Counter()) == [("Who?", "")]


@pytest.mark.parametrize(
    "value, reason",
    [
        ({"question": ""}, "is empty"),
        ({"question": ["Who?"]}, "is no text"),
        ({"question": "Who?", "answer": {"text": "x"}}, "is no text"),
        ({"question": "x" * 2001}, "is longer than"),
        ({"question": "Who\x00?"}, "holds control characters"),
        ({"question": "Who?", "answer": "\ud800"}, "holds control characters"),
        ("Who?", "holds no question in JSON"),
        ([[[[[[[[[[{"question": "Who?"}]]]]]]]]]], "holds no question in JSON"),
    ],
)
def test_what_is_dropped_and_why(value, reason):
    counts = Counter()
    assert candidates_of(json.dumps(value), "", counts) == []
    (found,) = counts
    assert reason in found and counts[found] == 1


def test_digits_without_end():
    counts = Counter()
    assert candidates_of(f'{{"question": {"9" * 10_000}}}', "", counts) == []
    assert list(counts) == ["a reply holds no question in JSON"]
