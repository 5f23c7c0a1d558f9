"""The same three questions in the official and in the flat form."""

import json

CONTEXT = "Rollo led the Normans. They settled in Normandy."
OTHER = "Sis lies in Cilicia."


def official():
    return {
        "version": "v2.0",
        "data": [
            {
                "title": "Normans",
                "paragraphs": [
                    {
                        "context": CONTEXT,
                        "qas": [
                            {
                                "id": "a",
                                "question": "Who led?",
                                "answers": [{"text": "Rollo", "answer_start": 0}],
                                "is_impossible": False,
                            },
                            {
                                "id": "b",
                                "question": "When?",
                                "answers": [],
                                "plausible_answers": [{"text": "They", "answer_start": 23}],
                                "is_impossible": True,
                            },
                        ],
                    },
                    {"context": OTHER, "qas": [{"id": 7, "question": "Where is Sis?"}]},
                ],
            }
        ],
    }


def flat():
    return [
        {
            "id": "a",
            "title": "Normans",
            "context": CONTEXT,
            "question": "Who led?",
            "answers": {"text": ["Rollo"], "answer_start": [0]},
        },
        {
            "id": "b",
            "title": "Normans",
            "context": CONTEXT,
            "question": "When?",
            "answers": {"text": [], "answer_start": []},
        },
        {
            "id": "7",
            "title": "Normans",
            "context": OTHER,
            "question": "Where is Sis?",
            "answers": None,
        },
    ]


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"
