"""Small fast tokenizers of each supported family, made on the spot in milliseconds.

Each is the transformers class of its family, so that its special tokens, token types and offsets
are the real ones; only the vocabulary is small. Characters outside the text below become unknown
tokens (bytes, for the byte-level families). Every process makes the same: byte-level BPE is
trained, and vocabularies.json holds what WordPiece and Unigram training made of the text once, as
their trainers settle ties by a hash that differs in each process.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXT = (
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, "
    "a region in France. They were descended from Norse raiders and pirates from Denmark. "
    "In what country is Normandy located? When were they there? Who was the leader? "
    "Das Königreich lag an der Küste; die Straße führte weiter. El año siguiente volvió. "
    "在罗洛大军到来之前，它的人口与皮卡第没有差别。 ما هي عاصمة فرنسا؟ عاصمة فرنسا هي باريس. "
    "naïve café résumé 1066, 1,000.5 km (about 620 miles) - e.g. Rollo's."
)


VOCABULARIES = json.loads(Path(__file__).with_name("vocabularies.json").read_text("utf-8"))


def bert():
    """WordPiece, lower case, token types 0 and 1: [CLS] q [SEP] d [SEP]."""
    vocab = {piece: number for number, piece in enumerate(VOCABULARIES["wordpiece"])}
    return transformers.BertTokenizerFast(vocab=vocab, do_lower_case=True)


def _byte_level(vocab_size: int, special: list[str]) -> tuple[dict, list]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def roberta(vocab_size: int = 400):
    """Byte-level BPE, no token types: <s> q </s></s> d </s>."""
    vocab, merges = _byte_level(vocab_size, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.RobertaTokenizerFast(vocab=vocab, merges=merges)


def deberta(vocab_size: int = 400):
    """Byte-level BPE whose offsets count a word's blank to it: [CLS] q [SEP] [SEP] d [SEP].

    The tokens around the pair, without types, are what transformers 5 makes of this class.
    """
    vocab, merges = _byte_level(vocab_size, ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])
    return transformers.DebertaTokenizerFast(vocab=vocab, merges=merges)


def modernbert(vocab_size: int = 400):
    """Byte-level BPE of no class of its own, no token types: [CLS] q [SEP] d [SEP]."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    vocab, merges = _byte_level(vocab_size, special)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(each, vocab[each]) for each in ("[CLS]", "[SEP]")],
    )
    names = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """Pieces with their log-probabilities."""
    return [(piece, 0.0) for piece in special] + [tuple(each) for each in VOCABULARIES["unigram"]]


def xlm_roberta():
    """Unigram on Metaspace, no token types: <s> q </s></s> d </s>."""
    vocab = _unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.XLMRobertaTokenizerFast(vocab=vocab)


def deberta_v2():
    """Unigram on Metaspace with token types: [CLS] q [SEP] d [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    return transformers.DebertaV2TokenizerFast(
        vocab=_unigram(special), unk_id=special.index("[UNK]")
    )


FAMILIES = {
    "bert": bert,
    "roberta": roberta,
    "xlm_roberta": xlm_roberta,
    "deberta": deberta,
    "deberta_v2": deberta_v2,
    "modernbert": modernbert,
}


@cache
def of_family(name: str):
    """One shared tokenizer of a family: leave it as it is."""
    return FAMILIES[name]()
