"""What transformers 4 makes of model folders, as JSON: `python -I transformers4_answers.py`.

It runs by itself, on this environment's torch with .transformers4 before it. Read from standard
input: {"folders": name to path, "texts": name to [question, context], "settings": a list}. Written:
by folder {"ids": by text, "answers": by text, one for each of the settings}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / ".transformers4"))


def main() -> None:
    import transformers

    assert transformers.__version__ == "4.57.6", transformers.__version__
    asked = json.load(sys.stdin)
    found = {}
    for name, folder in asked["folders"].items():
        reader = transformers.pipeline("question-answering", folder, device="cpu")
        found[name] = {"ids": {}, "answers": {}}
        for text, (question, context) in asked["texts"].items():
            found[name]["ids"][text] = reader.tokenizer(question, context)["input_ids"]
            found[name]["answers"][text] = [
                reader(question=question, context=context, **each) for each in asked["settings"]
            ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
