import pytest
import torch

from kdfast.models.packing import PACKS
from kdfast.models.span_model import SpanModel
from tests import published, readers


@pytest.mark.parametrize("model_type", sorted(PACKS))
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_an_additive_mask_is_the_boolean_one(model_type, precision):
    reader, _ = readers.make(model_type)
    model = SpanModel(reader)
    assert model.takes_4d_mask
    ids, mask = readers.ids_of(reader)
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        wanted = model(ids, mask)
        added = model.additive(mask[:, None, None, :])
        assert added.dtype == (precision or torch.float32)
        hidden = reader.base_model(ids, attention_mask=added)[0]
        with torch.autocast("cpu", enabled=False):
            found = model.head(hidden.float())
    assert torch.equal(found[mask], wanted[mask])


@pytest.mark.parametrize("model_type", published.TYPES)
def test_padding_has_positions(model_type):
    """A window of all the tokens that a model was made for can still be read."""
    for positions in (512, 514, 100):
        reader, _ = readers.make(model_type, max_position_embeddings=positions)
        model = SpanModel(reader)
        assert model.width_multiple() == 1  # on a CPU, which gains nothing
        multiple = model.width_multiple(compiled=True)
        assert multiple == 8 or (multiple == 1 and positions % 8)
        longest = positions
        if model_type in ("camembert", "mpnet", "roberta", "xlm-roberta"):
            longest -= reader.config.pad_token_id + 1
        width = -(-longest // multiple) * multiple
        ids = torch.full((1, width), reader.config.pad_token_id)
        ids[:, :longest] = 7
        mask = torch.arange(width)[None] < longest
        assert model(ids, mask).isfinite().all()


@pytest.mark.parametrize("lengths", [(40, 23), (40, 40), (9, 7), (10, 4)])
def test_near_tokens_are_those_of_transformers(lengths):
    """In windows longer and shorter than the 4 tokens to each side; padding is never NaN."""
    reader, _ = readers.make("modernbert", layers=4, local_attention=8)
    model = SpanModel(reader)
    assert model.reach == 4
    ids, mask = readers.ids_of(reader, lengths)
    with torch.no_grad():
        theirs = reader(ids, attention_mask=mask.long())
        found = model(ids, mask)
        assert found.isfinite().all()
        torch.testing.assert_close(found[..., 1][mask], theirs.end_logits[mask])
        if lengths[0] == lengths[1]:
            torch.testing.assert_close(model(ids), found)
        model.reach = 3
        changed = (model(ids, mask) - found)[mask].abs().max()
    assert changed > 0.01


@pytest.mark.slow
def test_eight_thousand_tokens():
    reader, _ = readers.make("modernbert")
    ids, mask = readers.ids_of(reader, (8192, 8000))
    with torch.no_grad():
        found = SpanModel(reader)(ids, mask)
        alone = reader(ids[1:, :8000])
    torch.testing.assert_close(found[1:, :8000, 0], alone.start_logits, rtol=1e-4, atol=1e-4)
