"""Whether SpanModel reads a model as transformers does: a few tokens, when it is loaded.

In place of a list of types: what a type lacks shows in its logits.
"""

import torch
from transformers import PreTrainedModel

from kdfast.common.errors import UserError, first_line
from kdfast.models.checks import vocabulary_size
from kdfast.models.span_model import SpanModel

LENGTHS = (16, 9)  # tokens of the two windows
MOST = 512  # of the first, where it must be longer than layers reach that look at near tokens only
# A difference counts beyond this share of what the logits span. Rounding in fp32 reaches 1e-5 of it
# in 24 layers; the least that padding changed was 0.07 (MobileBERT). It is between the two.
TOLERANCE = 1e-3


def check_reads_alike(model: SpanModel, name: str, role: str) -> None:
    """Raise UserError for a model that SpanModel would read otherwise than transformers does.

    On two windows of unequal length, in fp32 and without dropout: a token must change the logits
    before it; the logits of SpanModel must be those of transformers' own class; and a window alone
    must have those that it has next to a longer one. Micro-batches are cut and padded as it suits.

    Args:
        model: In eval(), in fp32 on the CPU.
        name, role: Of the model, and the flag that names it, for the message.
    """
    reader = model.reader
    kind = f"{role} {name} is of type {reader.config.model_type}"
    lengths = LENGTHS
    if model.reach is not None:
        lengths = (min(max(LENGTHS[0], model.reach + 8), MOST), LENGTHS[1])
    types = None
    try:
        ids, mask = _windows(reader, lengths)
        if model.takes_token_types:
            types = (torch.arange(ids.shape[1]) > 4).long().expand_as(ids) * mask
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            given = {} if types is None else {"token_type_ids": types}
            theirs = reader(ids, attention_mask=mask.long(), **given)
            wanted = torch.stack([theirs.start_logits, theirs.end_logits], -1)
            found = model(ids, mask, types)
            alone = [
                model(
                    ids[row : row + 1, :length],
                    None,
                    None if types is None else types[row : row + 1, :length],
                )[0]
                for row, length in enumerate(lengths)
            ]
    except Exception as error:  # whatever its forward() asks of its input
        raise UserError(
            f"{kind}, which does not compute the logits of two windows ({first_line(error)}): "
            "name a model of another type, or one with another config.json."
        ) from error
    real = wanted[mask]
    span = float(real.max() - real.min())
    if not span or not real.isfinite().all():
        return  # of weights that tell nothing, or are not finite: refused where they are used
    if _distance(wanted[0, :-1], wanted[2, :-1]) == 0:
        raise UserError(
            f"{kind}, in which a token changes nothing before it, and a reader looks both ways: "
            "name an encoder."
        )
    differences = {
        "whose logits kdfast does not compute as transformers does": _distance(found[mask], real),
        "whose logits change with padding": max(
            _distance(each, wanted[row, : len(each)]) for row, each in enumerate(alone)
        ),
    }
    for what, difference in differences.items():
        if difference > TOLERANCE * span:
            raise UserError(
                f"{kind}, {what} (by {difference:.2g} in logits that span {span:.2g}): "
                "name a model of another type."
            )


def _windows(
    reader: PreTrainedModel, lengths: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (3, L) and the mask of real tokens: the first with another last token is the third."""
    padding = getattr(reader.config, "pad_token_id", None) or 0
    width = max(lengths)
    known = torch.arange(vocabulary_size(reader))
    known = known[known != padding]
    places = torch.linspace(0, len(known) - 1, 2 * width + 1).long()
    ids = known[places]
    rows = torch.stack([ids[:width], ids[width:-1], ids[:width]])
    rows[2, -1] = ids[-1]
    mask = torch.arange(width) < torch.tensor([*lengths, lengths[0]])[:, None]
    return rows.masked_fill(~mask, padding), mask


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; infinite where one is not finite and the other is."""
    return float((found - wanted).abs().nan_to_num(nan=torch.inf).max())
