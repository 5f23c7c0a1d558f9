"""The WordPiece tokenizer of the embedded teacher, made from the templates and word lists.

Each part of an invented name is one piece, and a year is two: a name or a year that training has
never seen consists of pieces that it has. Any other Latin word falls into letters.
"""

from __future__ import annotations

import re
import string

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from kdfast.demo.names import NAME_WORDS, UNITS, word_lists
from kdfast.demo.templates import domains
from kdfast.tokenizers.load import FolderTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """Every piece, in the order of its id."""
    lists = word_lists()
    tails = [tail for kind, parts in lists["parts"].items() if "_tail" in kind for tail in parts]
    texts = [*NAME_WORDS, *UNITS, "knots it she he the"]
    texts += [
        part for kind, parts in lists["parts"].items() if "_tail" not in kind for part in parts
    ]
    texts += [value for values in lists["values"].values() for value in values]
    for domain in domains():
        texts += [domain.noun, *domain.intro, *domain.aside]
        for relation in domain.relations:
            texts += [*relation.say, *relation.ask, *relation.held_out]
    plain = re.sub(r"\{\w+\}", " ", " ".join(texts).lower())
    pieces = set(re.findall(r"[a-z]+", plain)) | {f"##{tail}" for tail in tails}
    for letter in string.ascii_lowercase + string.digits:
        pieces |= {letter, f"##{letter}"}
    for number in range(100):
        pieces |= {f"{number:02d}", f"##{number:02d}"}
    return SPECIAL + sorted(pieces | set(string.punctuation))


def make_tokenizer(max_length: int) -> FolderTokenizer:
    """The tokenizer in Hugging Face's form, lower-casing, with BERT's special tokens."""
    ids = {piece: i for i, piece in enumerate(vocabulary())}
    backend = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = WordPieceDecoder()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return FolderTokenizer(
        tokenizer_object=backend,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
