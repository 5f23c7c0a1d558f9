"""Writes pickled/: the weights of the RoBERTa beside it as transformers 4 pickled them.

    v4/bin/python tests/golden/make_pickled.py

with the environment that make_pipeline_answers.py describes: transformers 4.57.6, torch 2.13.0.
Once whole, as pytorch_model.bin, and once in parts with an index.
"""

from pathlib import Path

from transformers import AutoModelForQuestionAnswering

HERE = Path(__file__).parent

model = AutoModelForQuestionAnswering.from_pretrained(HERE / "roberta", dtype="float16")
for name, size in (("whole", "1GB"), ("parts", "10KB")):
    folder = HERE / "pickled" / name
    model.save_pretrained(folder, safe_serialization=False, max_shard_size=size)
    (folder / "config.json").unlink()
