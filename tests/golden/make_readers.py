"""Writes the small readers, with random weights, that the golden answers are made of.

    python -m tests.golden.make_readers

They are kept, since a tokenizer or a model made anew may differ with the library's version.
"""

from pathlib import Path

import torch

from tests import readers

HERE = Path(__file__).parent
LENGTH = 96


def main() -> None:
    for model_type in ("roberta", "xlm-roberta"):
        model, tokenizer = readers.make(
            model_type, seed=5, max_position_embeddings=LENGTH + 2, initializer_range=0.5
        )
        tokenizer.model_max_length = LENGTH
        model.to(torch.float16).save_pretrained(HERE / model_type)
        tokenizer.save_pretrained(HERE / model_type)


if __name__ == "__main__":
    main()
