"""What the config.json of published models says, widths, layers and vocabulary left out.

Read in the files of these names on huggingface.co, or in copies of them in public repositories
(PaddleNLP's tables of pretrained configurations, for DeBERTa and ALBERT). Ids of special tokens
that are beyond a small vocabulary are left out, too.
"""

from dataclasses import dataclass
from typing import Any

BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
ROBERTA = {
    **BERT,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
DEBERTA = {
    **BERT,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pos_att_type": "c2p|p2c",
    "position_biased_input": False,
    "relative_attention": True,
    "type_vocab_size": 0,
}
DEBERTA_V3 = {
    **DEBERTA,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_buckets": 256,
    "share_att_key": True,
}
DISTILBERT = {
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dropout": 0.1,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "output_past": True,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
}
MODERNBERT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
}


@dataclass(frozen=True)
class Published:
    """tokenizer: a family of tests.small_tokenizers that is like the model's own."""

    model_type: str
    tokenizer: str
    config: dict[str, Any]


MODELS = {
    "bert-base-uncased": Published("bert", "bert", {**BERT, "position_embedding_type": "absolute"}),
    "microsoft/Multilingual-MiniLM-L12-H384": Published(
        "bert", "xlm_roberta", {**BERT, "tokenizer_class": "XLMRobertaTokenizer"}
    ),
    "albert-base-v2": Published(
        "albert",
        "bert",
        {
            **BERT,
            "attention_probs_dropout_prob": 0,
            "bos_token_id": 2,
            "classifier_dropout_prob": 0.1,
            "down_scale_factor": 1,
            "embedding_size": 128,
            "eos_token_id": 3,
            "gap_size": 0,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0,
            "inner_group_num": 1,
            "net_structure_type": 0,
            "num_hidden_groups": 1,
            "num_memory_blocks": 0,
        },
    ),
    "google/electra-small-discriminator": Published(
        "electra",
        "bert",
        {
            **BERT,
            "embedding_size": 128,
            "summary_activation": "gelu",
            "summary_last_dropout": 0.1,
            "summary_type": "first",
            "summary_use_proj": True,
        },
    ),
    "roberta-base": Published("roberta", "roberta", ROBERTA),
    "klue/roberta-base": Published(
        "roberta", "bert", {**ROBERTA, "tokenizer_class": "BertTokenizer"}
    ),
    "xlm-roberta-base": Published("xlm-roberta", "xlm_roberta", {**ROBERTA, "output_past": True}),
    "camembert-base": Published(
        "camembert",
        "xlm_roberta",
        {**ROBERTA, "bos_token_id": 5, "eos_token_id": 6, "output_past": True},
    ),
    "microsoft/mpnet-base": Published(
        "mpnet",
        "roberta",
        {k: v for k, v in ROBERTA.items() if k != "type_vocab_size"}
        | {"relative_attention_num_buckets": 32},
    ),
    "microsoft/deberta-base": Published("deberta", "deberta", {**DEBERTA, "padding_idx": 0}),
    "microsoft/deberta-v2-xlarge": Published(
        "deberta-v2",
        "deberta_v2",
        {**DEBERTA_V3, "attention_head_size": 64, "conv_act": "gelu", "conv_kernel_size": 3},
    ),
    "microsoft/deberta-v3-base": Published("deberta-v2", "deberta_v2", DEBERTA_V3),
    "distilbert-base-uncased": Published("distilbert", "bert", DISTILBERT),
    "answerdotai/ModernBERT-base": Published("modernbert", "modernbert", MODERNBERT),
    "jhu-clsp/mmBERT-base": Published(
        "modernbert",
        "modernbert",
        {**MODERNBERT, "local_rope_theta": 160000.0, "position_embedding_type": "sans_pos"},
    ),
}
# What the other tests' readers of a type are.
COMMON = {
    "albert": "albert-base-v2",
    "bert": "bert-base-uncased",
    "camembert": "camembert-base",
    "deberta": "microsoft/deberta-base",
    "deberta-v2": "microsoft/deberta-v3-base",
    "distilbert": "distilbert-base-uncased",
    "electra": "google/electra-small-discriminator",
    "modernbert": "answerdotai/ModernBERT-base",
    "mpnet": "microsoft/mpnet-base",
    "roberta": "roberta-base",
    "xlm-roberta": "xlm-roberta-base",
}
TYPES = tuple(COMMON)
# What a type calls that which others call so.
NAMES = {
    "distilbert": {
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_dropout_prob": "dropout",
        "intermediate_size": "hidden_dim",
    },
    "modernbert": {
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_dropout_prob": "mlp_dropout",
    },
}


def named(name: str) -> Published:
    """A model of MODELS, or the common one of a model type."""
    return MODELS[COMMON.get(name, name)]
