"""Whether SpanModel reads a model as transformers does: a few tokens, when it is loaded.

In place of a list of types: what a type lacks shows in its logits.
"""

import torch
from transformers import PreTrainedModel

from kdfast.common.errors import UserError, first_line
from kdfast.models.checks import vocabulary_size
from kdfast.models.span_model import SpanModel, reach_of, takes_token_types

LENGTHS = (12, 7)  # tokens of the two windows
MOST = 512  # of the first, where it must be longer than layers reach that look at near tokens only
# Shares of what the logits span. Rounding in fp32 reaches 1e-6 of it in 22 layers; the least that
# padding changed was 0.07 (MobileBERT). What is more than the first counts as a fault; what is less
# than the second is no change at all.
TOLERANCE = 1e-3
ROUNDING = 1e-5


def check_reads_alike(reader: PreTrainedModel, name: str, role: str) -> None:
    """Raise UserError for a model that SpanModel would read otherwise than transformers does.

    On two windows of unequal length, in fp32 and without dropout: a token must change the logits
    before it; the logits of SpanModel must be those of transformers' own class; and the shorter
    window alone must have those that it has next to the longer one, as micro-batches are cut and
    padded as it suits. It takes some 50 tokens, of ModernBERT 400. transformers computes first:
    SpanModel gives some types an attention of its own, in place.

    Args:
        reader: In eval(), in fp32 on the CPU.
        name, role: Of the model, and the flag that names it, for the message.
    """
    kind = f"{role} {name} is of type {reader.config.model_type}"
    longer, shorter = LENGTHS
    if (reach := reach_of(reader)) is not None:
        longer = min(max(longer, reach + 8), MOST)
    types = None
    try:
        ids, changed = _windows(reader, longer, shorter)
        mask = torch.arange(longer) < torch.tensor([longer, shorter])[:, None]
        if takes_token_types(reader):
            types = mask * (torch.arange(longer) > 3).long()
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            given = {} if types is None else {"token_type_ids": types}
            theirs = reader(ids, attention_mask=mask.long(), **given)
            wanted = torch.stack([theirs.start_logits, theirs.end_logits], -1)
            model = SpanModel(reader)
            found = model(ids, mask, types)
            same = None if types is None else types[[1, 1], :shorter]
            alone, other = model(torch.stack([ids[1, :shorter], changed]), None, same)
    except Exception as error:  # whatever its forward() asks of its input
        raise UserError(
            f"{kind}, which does not compute the logits of two windows ({first_line(error)}): "
            "name a model of another type, or one with another config.json."
        ) from error
    real = wanted[mask]
    span = float(real.max() - real.min())
    if not span or not real.isfinite().all():
        return  # of weights that tell nothing, or are not finite: refused where they are used
    if _distance(alone[:-1], other[:-1]) <= ROUNDING * span:
        raise UserError(
            f"{kind}, in which a token changes nothing before it, and a reader looks both ways: "
            "name an encoder."
        )
    differences = {
        "whose logits kdfast does not compute as transformers does": _distance(found[mask], real),
        "whose logits change with padding": _distance(alone, found[1, :shorter]),
    }
    for what, difference in differences.items():
        if difference > TOLERANCE * span:
            raise UserError(
                f"{kind}, {what} (by {difference:.2g} in logits that span {span:.2g}): "
                "name a model of another type."
            )


def _windows(
    reader: PreTrainedModel, longer: int, shorter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids from all over the vocabulary: two windows (2, longer), the second padded, and (shorter,)
    the second with another last token."""
    padding = getattr(reader.config, "pad_token_id", None) or 0
    known = torch.arange(vocabulary_size(reader))
    known = known[known != padding]
    ids = known[torch.linspace(0, len(known) - 1, longer + shorter + 1).long()]
    second, last = ids[longer:-1], ids[-1:]
    padded = torch.nn.functional.pad(second, (0, longer - shorter), value=padding)
    return torch.stack([ids[:longer], padded]), torch.cat([second[:-1], last])


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; infinite where one is not finite and the other is."""
    return float((found - wanted).abs().nan_to_num(nan=torch.inf).max())
