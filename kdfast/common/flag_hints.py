"""The error message for an unknown flag: which flag of ours has that meaning, if any."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

STEP = "the windows of one optimizer step, over all devices and micro-batches"
OWN_CUTS = "the program cuts its batches by itself"
ONE_WAY = "AdamW with linear warm-up and linear decay is what there is"
# Names that other trainers use -> ours, of which the first that the program has is meant, and how
# the meaning differs. Without one of ours: why there is none.
USUAL = (
    ("per_device_train_batch_size per_gpu_train_batch_size batch_size", "train_batch_size", STEP),
    ("micro_batch_size per_device_batch_size", "train_batch_size", STEP),
    ("per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size", "", OWN_CUTS),
    ("teacher_batch_size batch_size auto_find_batch_size", "", OWN_CUTS),
    ("check_invariance", "", "python -m kdfast.doctor --check_invariance does it"),
    ("fp16", "mixed_precision", "--mixed_precision fp16"),
    ("bf16", "mixed_precision", "--mixed_precision bf16"),
    ("fp32", "mixed_precision", "--mixed_precision no"),
    ("use_amp amp precision dtype torch_dtype", "mixed_precision", "no, fp16 or bf16"),
    ("lr peak_lr peak_learning_rate", "learning_rate", ""),
    ("num_epochs epochs n_epochs max_epochs", "num_train_epochs", ""),
    ("steps num_steps total_steps num_train_steps max_train_steps", "max_steps", ""),
    ("model_name_or_path model_name model_path model_dir", "model student", ""),
    ("model student_model student_name_or_path student_path", "student", ""),
    ("student_model_name_or_path", "student", ""),
    ("teacher_model teacher_name_or_path teacher_path", "teacher", ""),
    ("teacher_model_name_or_path teacher_model_name", "teacher", ""),
    ("dataset_name dataset data train_data", "data train_file", "a file or a hub id"),
    ("train_filename train_dataset data_dir training_file", "train_file", "a file or a hub id"),
    ("dataset_config dataset_config_name", "data train_file", "ID:CONFIG names a configuration"),
    ("validation_data dev_file dev_filename eval_file", "validation_file data", ""),
    ("dev_split validation_split_percentage", "validation_split", "a share, such as 0.1"),
    ("unlabeled_file unlabelled_data unlabeled_data", "unlabelled_file", ""),
    ("patience early_stopping", "early_stopping_patience", "in evaluations"),
    ("test_file predict_file input input_file", "data validation_file", ""),
    ("out output out_dir save_dir output_path", "output output_dir", ""),
    ("output_file output_dir", "output", "a JSONL file"),
    ("overwrite_output_dir", "overwrite", ""),
    ("overwrite_cache", "cache_dir", "its content is found again by what it was made of"),
    ("resume resume_from", "resume_from_checkpoint", ""),
    ("max_length max_len max_seq_len max_seq_length", "max_seq_length max_seq_len", ""),
    ("max_answer_len max_answer_length", "max_answer_length max_answer_len", ""),
    (
        "max_question_len max_question_length max_query_length",
        "max_query_length max_question_len",
        "",
    ),
    ("topk n_best n_best_size", "top_k", ""),
    (
        "alpha alpha_ce kd_weight distil_weight",
        "distillation_loss_weight",
        "gold spans get the rest",
    ),
    ("temp tau kd_temperature distillation_temperature", "temperature", ""),
    ("warmup_steps num_warmup_steps", "warmup_ratio", "a share of the steps"),
    ("warmup_proportion warmup", "warmup_ratio", "a share of the steps"),
    ("grad_acc_steps gradient_accumulation", "gradient_accumulation_steps", ""),
    ("clip_grad_norm gradient_clipping max_norm", "max_grad_norm", ""),
    ("wd decay", "weight_decay", ""),
    ("dropout embeds_dropout", "embeds_dropout_prob", ""),
    ("compile", "torch_compile", ""),
    ("evaluate_every evaluation_strategy eval_strategy do_eval", "eval_steps", "a number of steps"),
    ("checkpoint_every save_strategy", "save_steps", "a number of steps"),
    ("checkpoints_to_keep", "save_total_limit", ""),
    ("hub_model_id hub_repo", "push_to_hub", "the name of a repository"),
    ("null_score_diff_threshold", "null_threshold", ""),
    ("logging_steps logging_strategy", "", "every step is in train_log.jsonl"),
    ("do_train", "", "the program always trains"),
    ("version_2_with_negative squad_v2", "", "the data say which questions have no answer"),
    ("tokenizer tokenizer_name", "", "a model's own tokenizer is used"),
    ("optim optimizer lr_scheduler_type scheduler", "", ONE_WAY),
    ("device no_cuda use_cuda use_cpu use_gpu", "", "the first GPU that is visible is used"),
    ("dataloader_num_workers num_workers preprocessing_num_workers", "", "not needed"),
    ("gpus num_gpus n_gpu num_processes", "", "torchrun --nproc_per_node starts one for each"),
    ("local_rank", "", "torchrun's environment says it"),
    ("trust_remote_code", "", "code from a model's folder is never run"),
)


def explain(unknown: Sequence[str], known: Sequence[str], program: str) -> str:
    """Sentences on what a program could not read of its command line.

    unknown: the strings that were left over, with the values among them. known: the program's
    flags, without dashes. program: its name.
    """
    flags = list(dict.fromkeys(text.partition("=")[0] for text in unknown if _is_flag(text)))
    if not flags:
        return f"{unknown[0]} belongs to no flag of {program}: --help lists all flags."
    return " ".join(f"{flag} is no flag of {program}: {_remedy(flag, known)}" for flag in flags)


def _is_flag(text: str) -> bool:
    return re.match(r"--?[^\W\d]", text) is not None


def _remedy(flag: str, known: Sequence[str]) -> str:
    name = flag.lstrip("-").replace("-", "_").lower()
    why_none = ""
    for theirs, ours, remark in USUAL:
        if name not in theirs.split():
            continue
        meant = next((each for each in ours.split() if each in known), None)
        if meant:
            return f"--{meant} is meant{f' ({remark})' if remark else ''}."
        if not ours:
            why_none = f"leave it out, {remark}."
    nearest = get_close_matches(name, known, n=1)
    if nearest and not why_none:
        return f"did you mean --{nearest[0]}?"
    return why_none or "--help lists all flags."
