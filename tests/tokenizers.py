"""Small fast tokenizers of each supported family, trained on the spot in milliseconds.

Each is the transformers class of its family, so that its special tokens, token types and offsets
are the real ones; only the vocabulary is small. Characters outside the training text become
unknown tokens (bytes, for the byte-level families).
"""

from __future__ import annotations

import json
from functools import cache

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

TEXT = (
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, "
    "a region in France. They were descended from Norse raiders and pirates from Denmark. "
    "In what country is Normandy located? When were they there? Who was the leader? "
    "Das Königreich lag an der Küste; die Straße führte weiter. El año siguiente volvió. "
    "在罗洛大军到来之前，它的人口与皮卡第没有差别。 ما هي عاصمة فرنسا؟ عاصمة فرنسا هي باريس. "
    "naïve café résumé 1066, 1,000.5 km (about 620 miles) - e.g. Rollo's."
)


def bert(vocab_size: int = 300, *, text: str = TEXT):
    """WordPiece, lower case, token types 0 and 1: [CLS] q [SEP] d [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return transformers.BertTokenizerFast(vocab=backend.get_vocab(), do_lower_case=True)


def _byte_level(vocab_size: int, special: list[str], text: str) -> tuple[dict, list]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def roberta(vocab_size: int = 400, *, text: str = TEXT):
    """Byte-level BPE, no token types: <s> q </s></s> d </s>."""
    vocab, merges = _byte_level(vocab_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], text)
    return transformers.RobertaTokenizerFast(vocab=vocab, merges=merges)


def deberta(vocab_size: int = 400, *, text: str = TEXT):
    """Byte-level BPE whose offsets count a word's blank to it: [CLS] q [SEP] [SEP] d [SEP].

    The tokens around the pair, without types, are what transformers 5 makes of this class.
    """
    vocab, merges = _byte_level(vocab_size, ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"], text)
    return transformers.DebertaTokenizerFast(vocab=vocab, merges=merges)


def _unigram(vocab_size: int, special: list[str], unknown: str, text: str) -> list:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    backend.train_from_iterator(text.split(". "), trainer)
    return [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]


def xlm_roberta(vocab_size: int = 300, *, text: str = TEXT):
    """Unigram on Metaspace, no token types: <s> q </s></s> d </s>."""
    vocab = _unigram(vocab_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>", text)
    return transformers.XLMRobertaTokenizerFast(vocab=vocab)


def deberta_v2(vocab_size: int = 300, *, text: str = TEXT):
    """Unigram on Metaspace with token types: [CLS] q [SEP] d [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocab = _unigram(vocab_size, special, "[UNK]", text)
    return transformers.DebertaV2TokenizerFast(vocab=vocab, unk_id=special.index("[UNK]"))


FAMILIES = {
    "bert": bert,
    "roberta": roberta,
    "xlm_roberta": xlm_roberta,
    "deberta": deberta,
    "deberta_v2": deberta_v2,
}


@cache
def of_family(name: str):
    """One shared tokenizer of a family: leave it as it is."""
    return FAMILIES[name]()
