"""Tokenizers of folders without tokenizer.json, made of their vocabulary as transformers 4 did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import (
    SLOW_TO_FAST_CONVERTERS,
    Converter,
    SpmConverter,
)

from kdfast.common.errors import UserError

# Each class's vocabulary: the files that hold it.
FILES = {
    "AlbertTokenizer": ("spiece.model",),
    "BertTokenizer": ("vocab.txt",),
    "CamembertTokenizer": ("sentencepiece.bpe.model",),
    "DebertaTokenizer": ("vocab.json", "merges.txt"),
    "DebertaV2Tokenizer": ("spm.model",),
    "ElectraTokenizer": ("vocab.txt",),
    "MPNetTokenizer": ("vocab.txt",),
    "RobertaTokenizer": ("vocab.json", "merges.txt"),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model",),
}

UNIGRAM = 1  # as a SentencePiece model names its kind


@dataclass
class SlowTokenizer:
    """What transformers' converters read of a slow tokenizer."""

    vocab_file: str
    do_lower_case: bool
    keep_accents: bool
    split_by_punct: bool
    vocab: dict[str, int] = field(default_factory=dict)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.vocab[token]


def convert(
    folder: Path, name: str, settings: dict[str, Any], special: dict[str, Any]
) -> Tokenizer:
    """The `tokenizers` object of a folder's vocabulary files.

    Args:
        folder: of the model.
        name: the slow class.
        settings: the content of tokenizer_config.json.
        special: the special tokens by key, as in classes.SPECIAL_TOKENS.

    Raises:
        UserError: where the class is unknown or has no files there. Its sentence goes on after the
            folder's name. Damaged files raise other errors.
    """
    if name not in FILES:
        raise UserError(
            f"has no tokenizer.json, and {name or 'its tokenizer'} cannot be made without one: "
            "save its fast version (tokenizer.json) into that folder."
        )
    files = [folder / file for file in FILES[name]]
    if not all(file.is_file() for file in files):
        raise UserError(
            f"has no tokenizer: neither tokenizer.json nor {' and '.join(FILES[name])}: "
            "save the model's tokenizer into that folder."
        )
    kind: type[Converter] = SLOW_TO_FAST_CONVERTERS[name]
    if issubclass(kind, SpmConverter):
        slow = SlowTokenizer(
            str(files[0]),
            settings.get("do_lower_case", name == "AlbertTokenizer"),
            settings.get("keep_accents", False),
            settings.get("split_by_punct", False),
        )
        try:
            converter = kind(slow)
        except ImportError as error:
            raise UserError(
                f"holds a SentencePiece model ({files[0].name}), which protobuf reads: "
                "pip install protobuf."
            ) from error
        if converter.proto.trainer_spec.model_type != UNIGRAM:
            raise UserError(
                f"holds a SentencePiece model ({files[0].name}) that is no unigram model: "
                "save its fast version (tokenizer.json) into that folder."
            )
        pieces = converter.vocab(converter.proto)
        slow.vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        return converter.converted()
    original = SimpleNamespace(
        add_prefix_space=settings.get("add_prefix_space", False),
        **{key: str(token) for key, token in special.items() if token is not None},
    )
    if len(files) == 1:
        with files[0].open(encoding="utf-8") as lines:
            original.vocab = {line.rstrip("\n"): number for number, line in enumerate(lines)}
        if settings.get("do_basic_tokenize", True):
            original.basic_tokenizer = SimpleNamespace(
                do_lower_case=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                tokenize_chinese_chars=settings.get("tokenize_chinese_chars", True),
            )
    else:
        original.vocab = original.encoder = json.loads(files[0].read_text(encoding="utf-8"))
        merges = files[1].read_text(encoding="utf-8").split("\n")[1:-1]  # below the version
        original.bpe_ranks = dict.fromkeys(tuple(merge.split()) for merge in merges)
    original.convert_tokens_to_ids = original.vocab.__getitem__
    original.cls_token_id = original.vocab[original.cls_token]
    original.sep_token_id = original.vocab[original.sep_token]
    return kind(original).converted()
