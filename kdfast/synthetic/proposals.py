"""What may stand for a word: nearest neighbours of word vectors, and a masked language model's."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from kdfast.common.device import pick_device, place
from kdfast.common.errors import UserError, first_line
from kdfast.common.files import listed, open_file
from kdfast.models.hub import local_folder, without_safetensors
from kdfast.synthetic.words import is_other, vocabulary_words
from kdfast.tokenizers.load import load_tokenizer

Words = Sequence[re.Match[str]]
# Of a file of vectors, whose words come by frequency: as many as Haystack reads.
MOST_VECTORS = 100_000
# One word in so many is masked in a forward pass: 14 %, near the 15 % of BERT's training. Haystack
# masks one word in a pass, which takes as many passes as a text has words.
MASKED_AT_ONCE = 7
LOGITS_AT_ONCE = 2**28  # fp32, a gibibyte: tokens of a micro-batch times the vocabulary
CPU_TOKENS = 768


class Proposer(Protocol):
    """Gives each word of some texts what may stand for it; nothing where it knows nothing."""

    def propose(self, texts: Sequence[str], words: Sequence[Words]) -> list[list[list[str]]]:
        """For each text, for each of its words, the best proposals first."""


class Neighbours:
    """The nearest words by the cosine of their vectors; each distinct word is looked up once.

    Args:
        words: Those that have a vector.
        vectors: fp32 (words, width).
        count: How many are proposed.
    """

    def __init__(self, words: Sequence[str], vectors: torch.Tensor, count: int):
        self.words = list(words)
        self.count = count
        self._rows = {word: row for row, word in enumerate(self.words)}
        self._vectors = torch.nn.functional.normalize(vectors, dim=1)
        self._known: dict[str, list[str]] = {}

    @classmethod
    def of_embeddings(cls, name: str, count: int) -> "Neighbours":
        """Of the words in a model's vocabulary, by its input embeddings."""
        role = "--embeddings"
        model, tokenizer = _load(AutoModel, name, role)
        words = vocabulary_words(tokenizer)
        matrix = model.get_input_embeddings().weight.detach()
        ids = [number for number in words if number < len(matrix)]
        if not ids:
            raise UserError(f"{role} {name}: its vocabulary holds no whole words: name another.")
        return cls([words[number] for number in ids], matrix[ids], count)

    @classmethod
    def of_file(cls, path: Path, count: int) -> "Neighbours":
        """Of a text file with a word and its vector in each line, as GloVe, word2vec, fastText.

        Raises UserError for a file of another form.
        """
        words: list[str] = []
        rows: list[np.ndarray] = []
        try:
            with open_file(path) as file:
                for number, line in islice(enumerate(file, 1), MOST_VECTORS + 1):
                    word, *values = line.decode().rstrip().split(" ")
                    if number == 1 and len(values) == 1:
                        continue  # the header of word2vec and fastText: how many, how wide
                    if rows:  # GloVe 840B has words with blanks, such as ". . ."
                        word = " ".join([word, *values[: -len(rows[0])]])
                        values = values[-len(rows[0]) :]
                    words.append(word)
                    rows.append(np.array(values, dtype=np.float32))
                    if len(rows[-1]) != len(rows[0]) or not np.isfinite(rows[-1]).all():
                        raise ValueError
        except OSError as error:
            raise UserError(f"--vectors {path}: cannot be read ({error.strerror}).") from None
        except ValueError:
            raise UserError(
                f"--vectors {path}: line {number} is no word with as many finite numbers as the "
                "first: give a text file of GloVe, word2vec or fastText."
            ) from None
        if not rows or not len(rows[0]):
            raise UserError(f"--vectors {path}: it holds no vectors: give another file.")
        return cls(words, torch.from_numpy(np.stack(rows)), count)

    def propose(self, texts: Sequence[str], words: Sequence[Words]) -> list[list[list[str]]]:
        """See Proposer."""
        self._look_up({word[0] for each in words for word in each} - self._known.keys())
        return [[self._known[word[0]] for word in each] for each in words]

    def _look_up(self, words: Iterable[str]) -> None:
        rows = {}
        for word in sorted(words):
            row = self._rows.get(word, self._rows.get(word.lower()))
            self._known[word] = []
            if row is not None:
                rows[word] = row
        # Of more than is asked for, as the word itself and its other spellings are among them.
        most = min(2 * self.count + 8, len(self.words))
        items = iter(rows.items())
        while part := list(islice(items, 256)):
            near = self._vectors[[row for _, row in part]] @ self._vectors.T
            for (word, _), best in zip(part, near.topk(most).indices.tolist(), strict=True):
                found = [self.words[each] for each in best if is_other(self.words[each], word)]
                self._known[word] = found[: self.count]


@dataclass(frozen=True)
class _Row:
    """One window of a text. masked: token -> (text, word) for which it proposes."""

    ids: list[int]
    masked: dict[int, tuple[int, int]]


class MaskedModel:
    """What a masked language model proposes in the place of words that are one token.

    A word is masked together with every MASKED_AT_ONCE-th one of its window. Texts longer than what
    the model reads are cut into windows.
    """

    def __init__(self, name: str, count: int):
        role = "--masked_model"
        self.model, self.tokenizer = _load(AutoModelForMaskedLM, name, role)
        self.count = count
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"{role} {name}: its tokenizer has no mask token: name another model.")
        self._words = vocabulary_words(self.tokenizer)
        vocabulary = self.model.config.vocab_size
        self.device = pick_device()
        self.model = place(self.model, self.device)
        self._ids = torch.tensor([each for each in self._words if each < vocabulary])
        self._ids = self._ids.to(self.device)
        self._max_tokens = max(64, LOGITS_AT_ONCE // vocabulary)
        if self.device.type == "cpu":
            self._max_tokens = min(self._max_tokens, CPU_TOKENS)
        around = self.tokenizer("")["input_ids"]
        self._before, self._after = around[:-1], around[-1:]
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        self._most = min(positions - 2, 512) - len(around)

    @torch.inference_mode()
    def propose(self, texts: Sequence[str], words: Sequence[Words]) -> list[list[list[str]]]:
        """See Proposer."""
        proposals: list[list[list[str]]] = [[[] for _ in each] for each in words]
        rows = sorted(self._rows(texts, words), key=lambda row: len(row.ids))
        while rows:
            # The longest first, so that a width that does not fit fails at once.
            fitting = max(1, self._max_tokens // len(rows[-1].ids))
            rows, batch = rows[:-fitting], rows[-fitting:]
            for (text, word), best in self._best(batch):
                written = words[text][word][0]
                found = [each for each in best if is_other(each, written)]
                proposals[text][word] = found[: self.count]
        return proposals

    def _rows(self, texts: Sequence[str], words: Sequence[Words]) -> Iterator[_Row]:
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for text, (ids, offsets) in enumerate(
            zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            at = {
                token: (text, word)
                for word, token in _single_tokens(words[text], offsets)
                if ids[token] in self._words
            }
            for start in range(0, len(ids), self._most):
                window = ids[start : start + self._most]
                places = [each for each in at if start <= each < start + len(window)]
                for first in range(min(MASKED_AT_ONCE, len(places))):
                    yield self._row(
                        window, start, {p: at[p] for p in places[first::MASKED_AT_ONCE]}
                    )

    def _row(self, window: list[int], start: int, masked: dict[int, tuple[int, int]]) -> _Row:
        ids = list(window)
        for token in masked:
            ids[token - start] = self.tokenizer.mask_token_id
        shift = len(self._before) - start
        return _Row(
            [*self._before, *ids, *self._after],
            {token + shift: word for token, word in masked.items()},
        )

    def _best(self, rows: list[_Row]) -> Iterator[tuple[tuple[int, int], list[str]]]:
        width = max(len(row.ids) for row in rows)
        padding = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row.ids + [padding] * (width - len(row.ids)) for row in rows])
        real = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        places = [(number, token) for number, row in enumerate(rows) for token in row.masked]
        logits = self.model(ids.to(self.device), attention_mask=real.to(self.device)).logits
        index, token = torch.tensor(places, device=self.device).T
        best = logits[index, token][:, self._ids].topk(min(2 * self.count + 8, len(self._ids)))
        numbers = self._ids[best.indices].tolist()
        keys = [word for row in rows for word in row.masked.values()]
        for key, found in zip(keys, numbers, strict=True):
            yield key, [self._words[each] for each in found]


class FirstOf:
    """Of several proposers the first that knows a word."""

    def __init__(self, proposers: Sequence[Proposer]):
        self.proposers = proposers

    def propose(self, texts: Sequence[str], words: Sequence[Words]) -> list[list[list[str]]]:
        """See Proposer."""
        every = [each.propose(texts, words) for each in self.proposers]
        return [
            [next((each for each in of_word if each), []) for of_word in zip(*of_text, strict=True)]
            for of_text in zip(*every, strict=True)
        ]


def _single_tokens(words: Words, offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(word, token) of the words that are one token. offsets: of the tokens, in their order."""
    token = 0
    for number, word in enumerate(words):
        while token < len(offsets) and offsets[token][1] <= word.start():
            token += 1
        held = token
        while held < len(offsets) and offsets[held][0] < word.end():
            held += 1
        if held == token + 1 and offsets[token][1] == word.end():
            yield number, token


def _load(kind: Any, name: str, role: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model in fp32 and its tokenizer. Raises UserError where it does not load."""
    folder = local_folder(name, role)
    if not listed(folder, "*.safetensors"):
        raise without_safetensors(folder, name, role)
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors and transformers share no base class for these
        raise UserError(f"{role} {name} does not load ({first_line(error)}).") from error
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(
            f"{role} {name} lacks {len(missing)} weights, such as {sorted(missing)[0]}: name a "
            f"folder saved from {kind.__name__}."
        )
    return model.eval(), load_tokenizer(folder, role)
