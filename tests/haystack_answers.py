"""Answers of Haystack 2's extractive reader, as JSON: `python -I haystack_answers.py FOLDER`.

It runs in Haystack's own environment, where there is no kdfast. Read from standard input:
{"question", "contexts"}. Written: a list of [context's number, start, end, answer, score].
"""

import json
import os
import sys

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"


def main() -> None:
    from haystack import Document
    from haystack.components.readers import ExtractiveReader
    from haystack.utils import ComponentDevice

    asked = json.load(sys.stdin)
    reader = ExtractiveReader(
        model=sys.argv[1],
        device=ComponentDevice.from_str("cpu"),
        max_seq_length=96,
        stride=20,
        no_answer=False,
        overlap_threshold=None,
    )
    reader.warm_up()
    documents = [Document(content=text, meta={"n": n}) for n, text in enumerate(asked["contexts"])]
    answers = reader.run(query=asked["question"], documents=documents, top_k=1000)["answers"]
    found = [
        [a.document.meta["n"], a.document_offset.start, a.document_offset.end, a.data, a.score]
        for a in answers
    ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
