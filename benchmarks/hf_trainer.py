"""A candidate of bench_train_step: the Hugging Face Trainer, with the same loss by its hooks."""

import copy
from pathlib import Path

import numpy as np
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .measure import wall
from .train_candidates import LEARNING_RATE, WEIGHT_DECAY, Problem, Turn, collate, padded_loss

RANDOM, BY_LENGTH = "random", "group_by_length"  # values of train_sampling_strategy


class Examples:
    """The windows as the Trainer's dataset; input_ids are what it takes the lengths from."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict:
        start, end = self.windows.window_start[index], self.windows.window_start[index + 1]
        return {"input_ids": self.windows.input_ids[start:end], "index": index}


class DistillingTrainer(Trainer):
    """compute_loss is its documented hook, and what it returns is a mean over the batch, which the
    Trainer itself divides by the number of accumulated batches: they are of equal size here.
    """

    loss_is_scaled_for_ga = False
    chosen: list[int]  # the windows of the steps that are to be timed

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return padded_loss(model, inputs)

    def _get_train_sampler(self, train_dataset=None):
        return self.chosen

    def own_sampler(self):
        return super()._get_train_sampler()


class Clock(TrainerCallback):
    """From before the first batch is fetched to the end of the last update."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.started = wall(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            self.seconds = wall(args.device) - self.started


class HuggingFace:
    """Steps of trainer.train() on given windows.

    An epoch would take minutes, so the sampler's order is not run through: with random sampling
    any windows are as good as any others, and `batches_by_length` says which ones length grouping
    puts together.
    """

    def __init__(self, problem: Problem, batch: int, folder: Path, sampling: str):
        self.problem = problem
        self.padded_tokens = 0
        self.model = copy.deepcopy(problem.reader)
        at_once = min(batch, problem.windows_at_once)
        self.arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=batch // at_once,
            train_sampling_strategy=sampling,
            max_steps=1,  # __call__ knows how many
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=problem.max_grad_norm,
            bf16=problem.precision == "bf16",
            fp16=problem.precision == "fp16",
            use_cpu=problem.device.type == "cpu",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if problem.device.type == "cuda":
            self.arguments._n_gpu = 1  # of several cards it would use all
        self.optimizer = self.trainer().create_optimizer()

    def trainer(self) -> DistillingTrainer:
        made = DistillingTrainer(
            self.model,
            self.arguments,
            data_collator=self.collate,
            train_dataset=Examples(self.problem.windows),
            optimizers=(getattr(self, "optimizer", None), None),
        )
        made.remove_callback(PrinterCallback)
        return made

    def collate(self, examples: list[dict]) -> dict:
        indices = np.array([example["index"] for example in examples])
        batch = collate(self.problem, indices, None)
        self.padded_tokens += batch["input_ids"].numel()
        return batch

    def batches_by_length(self, count: int) -> list[np.ndarray]:
        """`count` of the batches that the Trainer's own sampler makes of an epoch: by their mean
        length, the middle ones of as many equal groups.
        """
        size = self.arguments.train_batch_size * self.arguments.gradient_accumulation_steps
        order = np.fromiter(self.trainer().own_sampler(), dtype=np.int64)
        batches = order[: len(order) // size * size].reshape(-1, size)
        ranked = batches[np.argsort(self.problem.windows.lengths[batches].sum(1))]
        return [ranked[int((i + 0.5) * len(ranked) / count)] for i in range(count)]

    def __call__(self, *steps: np.ndarray) -> Turn:
        self.padded_tokens = 0
        self.arguments.max_steps = len(steps)
        trainer, clock = self.trainer(), Clock()
        indices = np.concatenate(steps)
        trainer.chosen = indices.tolist()
        trainer.add_callback(clock)
        trainer.train()
        # Without this, each call would wrap the model's forward in one more autocast.
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return Turn(clock.seconds, indices, self.padded_tokens)
