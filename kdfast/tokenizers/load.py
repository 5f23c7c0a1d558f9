"""A model's tokenizer: read as its files say, and written so that others read it too."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from kdfast.common.errors import UserError, first_line
from kdfast.common.files import write_bytes, write_text
from kdfast.common.folders import make_writable
from kdfast.tokenizers import vocabulary_files
from kdfast.tokenizers.classes import (
    BY_MODEL_TYPE,
    CLASS_TOKENS,
    SPECIAL_TOKENS,
    TYPED_IN_5,
    UNTYPED_IN_4,
)
from kdfast.tokenizers.template import backend_text, is_of_backend

FILE = "tokenizer.json"
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
HIGHEST_ID = 2**24  # above those of any vocabulary: the backend goes through all ids below one
SPECIAL = tuple(f"{each}_token" for each in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Further settings that a tokenizer keeps when it is written; all others tell of a class, which is
# in tokenizer.json by then, or of the machine that wrote them.
KEPT = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens")
# Settings of tokenizer_config.json by their names in a BertNormalizer.
BERT_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class FolderTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that is written as it was read."""

    read: bytes | None = None  # the tokenizer.json that it came from; None: vocabulary files
    read_as: str = ""  # its backend then; one that was changed since is written as it is now

    def save_pretrained(
        self, save_directory: str | PathLike[Any], *_: Any, **__: Any
    ) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, which transformers 4 and 5 both read.

        Returns the paths of the two. Of transformers' keywords none is used: it gives some itself.
        """
        folder = Path(save_directory)
        make_writable(folder)
        paths = folder / FILE, folder / "tokenizer_config.json"
        backend = self.backend_tokenizer
        if self.read is not None and backend_text(self) == self.read_as:
            write_bytes(paths[0], self.read)
        else:
            write_text(paths[0], backend.to_str(pretty=True))
        settings = {key: self.init_kwargs[key] for key in KEPT if key in self.init_kwargs}
        settings |= {key: str(token) for key, token in self.special_tokens_map.items()}
        if self.extra_special_tokens:
            settings["additional_special_tokens"] = [str(t) for t in self.extra_special_tokens]
        if self.model_max_length < 1e20:  # transformers' "nothing limits it"
            settings["model_max_length"] = self.model_max_length
        if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            # Where it is not stated, transformers 4 sets it to False.
            settings["add_prefix_space"] = backend.pre_tokenizer.add_prefix_space
        settings["model_input_names"] = self.model_input_names
        # Transformers 5 calls this class TokenizersBackend, which no version 4 knows.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        write_text(paths[1], text + "\n")
        return tuple(map(str, paths))


def load_tokenizer(folder: Path, role: str) -> FolderTokenizer:
    """The tokenizer in a model's folder, which gives the ids that transformers 4.57 gave.

    tokenizer.json is used as it stands. Transformers 4 changed it after reading, in two ways:

    - Special tokens, of tokenizer_config.json, special_tokens_map.json and added_tokens.json or
      else the class's own, that tokenizer.json lacks were added to it. So are here those that a
      file states, but of the class's own only those that are in tokenizer.json's vocabulary.
    - do_lower_case, strip_accents and tokenize_chinese_chars went into a BertNormalizer, and
      add_prefix_space and trim_offsets into the steps of a byte-level tokenizer. Here they do so
      where tokenizer_config.json states them, but no default of a class replaces what
      tokenizer.json says: there kdfast goes by the file, and not by transformers 4.

    AutoTokenizer is not used: that of transformers 5 builds normalizer and pre-tokenizer from the
    class, and not from the file.

    Without tokenizer.json it is made of the vocabulary's files as transformers 4 did
    (vocabulary_files.py), a SentencePiece model with its own character map.

    `model_input_names` holds "token_type_ids" where the model was trained with them, see
    `uses_token_types`.

    Args:
        folder: of the model.
        role: what an error calls it, such as "--teacher".

    Raises:
        UserError: where there is no tokenizer that loads.
    """
    try:
        return _load(folder)
    except UserError as error:
        raise UserError(f"{role} {folder} {error}") from error
    except BaseException as error:
        if not (isinstance(error, Exception) or is_of_backend(error)):  # as a Ctrl-C
            raise
        raise UserError(
            f"{role} {folder} has no tokenizer that loads ({first_line(error)}): "
            "save the model's tokenizer into that folder."
        ) from error


def has_token_types(folder: Path) -> bool:
    """Whether the model in `folder` has embeddings for two token types."""
    model = _read(folder / "config.json")
    model_type = str(model.get("model_type"))
    # MPNet has no such setting, though some of its folders state one.
    known = AutoConfig.for_model(model_type) if model_type in CONFIG_MAPPING else None
    by_default = getattr(known, "type_vocab_size", None)
    return by_default is not None and model.get("type_vocab_size", by_default) > 1


def uses_token_types(folder: Path) -> bool:
    """Whether the model in `folder` reads the token types that its tokenizer gives.

    Not where it has no embeddings for two of them. Else as tokenizer_config.json states in
    model_input_names; and where it does not, by the rule of the transformers that wrote config.json
    (4 where that is not said), with which it was trained: 4 gave them by default, to ALBERT and
    under the generic PreTrainedTokenizerFast too, 5 does not.
    """
    model, settings = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    if not has_token_types(folder):
        return False
    if "model_input_names" in settings:
        return "token_type_ids" in settings["model_input_names"]
    name = _class_name(model, settings)
    major = str(model.get("transformers_version") or 4).partition(".")[0]
    by_version_5 = major.isdecimal() and int(major) >= 5
    return name in TYPED_IN_5 if by_version_5 else name not in UNTYPED_IN_4


def _load(folder: Path) -> FolderTokenizer:
    model, settings = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    name = _class_name(model, settings)
    stated, added = _special_tokens(folder, settings)
    defaults = SPECIAL_TOKENS.get(name, {})
    read = (folder / FILE).read_bytes() if (folder / FILE).is_file() else None
    if read is not None:
        backend = Tokenizer.from_buffer(read)
        # What neither names would get an id that the model may have no embedding for.
        defaults = {key: token for key, token in defaults.items() if _knows(backend, token)}
    else:
        backend = vocabulary_files.convert(folder, name, settings, {**defaults, **stated})
    if (highest := max(backend.get_vocab().values(), default=0)) > HIGHEST_ID:
        raise ValueError(f"its vocabulary holds the id {highest}")
    special = {**defaults, **stated}
    before = backend.to_str()
    for key, how in CLASS_TOKENS.get(name, {}).items():
        token = special.get(key)
        if isinstance(token, str) and (read is None or not _holds(backend, token)):
            special[key] = AddedToken(token, special=True, **how)
    _state(backend, name, settings)
    if special.get("pad_token") is None and isinstance(model.get("pad_token_id"), int):
        special["pad_token"] = backend.id_to_token(model["pad_token_id"])
    extra = special.pop("additional_special_tokens", [])
    # New ones get their ids in this order.
    special = {key: special[key] for key in SPECIAL if special.get(key) is not None}
    _add(backend, added, [*special.values(), *extra])
    tokenizer = FolderTokenizer(
        tokenizer_object=backend,
        **special,
        extra_special_tokens=extra,
        **{key: settings[key] for key in KEPT if key in settings},
        model_max_length=_longest(settings),
        model_input_names=[
            name for name in MODEL_INPUTS if name != "token_type_ids" or uses_token_types(folder)
        ],
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("its vocabulary is empty")
    tokenizer.name_or_path = str(folder)
    tokenizer.read_as = backend_text(tokenizer)
    if read is not None and tokenizer.backend_tokenizer.to_str() == before:
        tokenizer.read = read
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, an empty one where there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def _longest(settings: dict[str, Any]) -> int:
    """The most tokens that the folder states."""
    stated = settings.get("model_max_length", settings.get("max_len")) or VERY_LARGE_INTEGER
    if not isinstance(stated, (int, float)) or not stated >= 1:
        raise ValueError(f"model_max_length is {stated!r}")
    return int(min(stated, VERY_LARGE_INTEGER))


def _class_name(model: dict[str, Any], settings: dict[str, Any]) -> str:
    """The slow class that the folder names, or transformers 4 chose for its model."""
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    return (named or BY_MODEL_TYPE.get(str(model.get("model_type")), "")).removesuffix("Fast")


def _special_tokens(
    folder: Path, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[AddedToken]]:
    """The special tokens that the folder states, by their keys, and its added tokens in order."""
    keys = (*SPECIAL, "additional_special_tokens")
    extra = settings.get("additional_special_tokens", settings.get("extra_special_tokens"))
    stated = {**settings, "additional_special_tokens": extra}
    if isinstance(extra, dict):  # with names, in later versions
        stated["additional_special_tokens"] = list(extra.values())
    added = {int(n): _token(t) for n, t in settings.get("added_tokens_decoder", {}).items()}
    if "added_tokens_decoder" not in settings:
        stated |= _read(folder / "special_tokens_map.json")
        special = {str(_token(stated[key])) for key in SPECIAL if stated.get(key)}
        for text, number in _read(folder / "added_tokens.json").items():
            one = text in special
            added[number] = AddedToken(text, special=one, normalized=not one)
    known = {str(token): token for token in added.values()}
    tokens = {}
    for key in keys:
        if key == "additional_special_tokens":
            if stated.get(key):
                tokens[key] = [_token(each) for each in stated[key]]
        elif key in stated:
            token = _token(stated[key])
            tokens[key] = known.get(str(token), token)
    return tokens, [added[number] for number in sorted(added)]


def _token(stated: Any) -> Any:
    """A token as a file states it: a text, None, or an object with the fields of AddedToken."""
    if not isinstance(stated, dict):
        return stated
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(stated["content"], **{key: stated[key] for key in fields if key in stated})


def _knows(backend: Tokenizer, token: str | list[str]) -> bool:
    """Whether a token, or each of several, has an id."""
    tokens = [token] if isinstance(token, str) else token
    return all(backend.token_to_id(each) is not None for each in tokens)


def _holds(backend: Tokenizer, token: str | AddedToken) -> bool:
    """Whether it is one of the tokens that are found in a text before it is split."""
    return any(each.content == str(token) for each in backend.get_added_tokens_decoder().values())


def _add(backend: Tokenizer, added: list[AddedToken], special: list[str | AddedToken]) -> None:
    """Add the tokens that the backend lacks, or has with other properties than are stated."""
    names = {str(token) for token in special}
    for token in [*added, *special]:
        if isinstance(token, AddedToken):
            token.special = token.special or token.content in names
            backend.add_tokens([token])
        elif not _holds(backend, token):
            backend.add_tokens([AddedToken(token, special=True)])


def _state(backend: Tokenizer, name: str, settings: dict[str, Any]) -> None:
    """Change the backend as transformers 4 did where `settings` states it."""
    normalizer, steps = backend.normalizer, backend.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer) and name in (
        "BertTokenizer",
        "DistilBertTokenizer",
        "ElectraTokenizer",
        "MPNetTokenizer",
    ):
        for key, field in BERT_SETTINGS.items():
            if key in settings and (name, key) != ("MPNetTokenizer", "tokenize_chinese_chars"):
                setattr(normalizer, field, settings[key])
        backend.normalizer = normalizer
    if isinstance(steps, pre_tokenizers.ByteLevel) and "add_prefix_space" in settings:
        steps.add_prefix_space = settings["add_prefix_space"]
        backend.pre_tokenizer = steps
    last = backend.post_processor
    if isinstance(last, processors.RobertaProcessing) and name == "RobertaTokenizer":
        for key in ("add_prefix_space", "trim_offsets"):
            if key in settings:
                setattr(last, key, settings[key])
        backend.post_processor = last
