"""What transformers 4 knew of its tokenizer classes, where a folder does not say it itself."""

from typing import Any

# Each class's own special tokens, where the folder states none.
_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_DEBERTA = {"bos_token": "[CLS]", "eos_token": "[SEP]", **_BERT}
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_NOT_USED = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]
SPECIAL_TOKENS: dict[str, dict[str, Any]] = {
    "AlbertTokenizer": {**_DEBERTA, "unk_token": "<unk>", "pad_token": "<pad>"},
    "BertTokenizer": _BERT,
    "CamembertTokenizer": {**_ROBERTA, "additional_special_tokens": _NOT_USED},
    "DebertaTokenizer": _DEBERTA,
    "DebertaV2Tokenizer": _DEBERTA,
    "ElectraTokenizer": _BERT,
    "MPNetTokenizer": {**_ROBERTA, "unk_token": "[UNK]"},
    "RobertaTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
}
# How some classes look for theirs: a mask takes the blank before it, as a word does.
_WORD = {"mask_token": {"lstrip": True, "normalized": False}}
CLASS_TOKENS = {
    "AlbertTokenizer": _WORD,
    "CamembertTokenizer": _WORD,
    "DebertaTokenizer": _WORD,
    "DebertaV2Tokenizer": {"unk_token": {"normalized": True}},
    "MPNetTokenizer": _WORD,
    "RobertaTokenizer": _WORD,
    "XLMRobertaTokenizer": _WORD,
}
# The classes that give token types to a model by default, in transformers 4 all but these few, and
# in transformers 5 these few alone. Names as of the slow class.
UNTYPED_IN_4 = {f"{name}Tokenizer" for name in ("Camembert", "DistilBert", "MPNet", "Roberta")}
UNTYPED_IN_4 |= {"XLMRobertaTokenizer"}
TYPED_IN_5 = {f"{name}Tokenizer" for name in ("Bert", "Deberta", "DebertaV2", "Electra")}
TYPED_IN_5 |= {f"{name}Tokenizer" for name in ("DPRReader", "FNet", "Lxmert", "MobileBert")}
# What transformers 4 made of a folder that names no class.
BY_MODEL_TYPE = {
    "albert": "AlbertTokenizer",
    "bert": "BertTokenizer",
    "camembert": "CamembertTokenizer",
    "deberta": "DebertaTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "electra": "ElectraTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
