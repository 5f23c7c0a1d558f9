"""The embedded default: a generated corpus, a small teacher that reads it, and its settings."""

from pathlib import Path

TEACHER = Path(__file__).with_name("teacher")

# Flags of kdfast.train, for the teacher's lessons and for the demo. A window holds a question and
# its whole passage: 90 tokens in the mean, 130 at most.
WINDOW = {"max_seq_length": 160, "max_query_length": 24, "doc_stride": 128}

SETTINGS = {
    **WINDOW,
    "student_layers": "0,3",
    "num_train_epochs": 6.0,
    "train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.1,
    "temperature": 1.0,
    "distillation_loss_weight": 0.9,
    "embeds_dropout_prob": 0.0,
}
