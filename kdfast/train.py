"""`python -m kdfast.train`: distil a small reader from a large one.

Without any argument it runs the embedded demo.
"""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

from kdfast import recipes
from kdfast.distill import checkpoint, costs, inputs, invariance, models, scoring
from kdfast.distill.config import OBJECTIVE, TrainConfig
from kdfast.distill.dropout import speed_up_dropout
from kdfast.distill.feed import make_feed
from kdfast.distill.log import Clock, TrainLog, progress_line
from kdfast.distill.optim import Updater, make_optimizer
from kdfast.distill.precision import AUTOCAST, pick_device, resolve
from kdfast.distill.ranks import Ranks
from kdfast.distill.record import (
    check_shared,
    code_key,
    describe_machine,
    open_output,
    remove_run,
    write_run,
)
from kdfast.distill.step import Stepper
from kdfast.errors import UserError
from kdfast.squad.batches import CutRule, TrainingOrder


def main(argv: list[str] | None = None) -> int:
    """The program. Returns the exit status: 0, or 2 for a mistake in what it was given."""
    argv = sys.argv[1:] if argv is None else argv
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        if argv:
            config = parse(argv)
            with Ranks.join() as ranks:
                train(config, ranks)
        else:
            from kdfast.demo.tour import tour

            tour()
    except UserError as error:
        if not error.is_repeated:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; checkpoints of --save_steps, if any, are whole", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> TrainConfig:
    """Flags to settings, over those of a recipe, over the defaults.

    Unknown flags and values end the program with argparse's own message, `--recipe list` with the
    recipes.
    """
    parser = HfArgumentParser(TrainConfig, prog="python -m kdfast.train", description=__doc__)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe == "list":
        print(recipes.listing())
        parser.exit()
    if recipe is not None:
        parser.set_defaults(**recipes.load(recipe).settings)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return config


def train(config: TrainConfig, ranks: Ranks | None = None) -> dict:
    """One run from files to a finished student; returns what run.json holds."""
    ranks = ranks or Ranks()
    config.check()
    device = pick_device(ranks.local_rank)
    precision = resolve(config.mixed_precision, device)
    ranks.agree({"settings": config, "code": code_key(), "torch": torch.__version__})
    output = Path(config.output_dir or ".").expanduser()
    resumed_from = None
    if ranks.is_first and not config.check_invariance:
        config = restarted(config, output, ranks)
        open_output(config)
        if config.resume_from_checkpoint:
            resumed_from = checkpoint.find_checkpoint(config.resume_from_checkpoint, output)
    resumed_from = ranks.share(str(resumed_from or ""))
    if not config.check_invariance:
        check_shared(output, ranks, "--output_dir")
    check_shared(config.cache_path, ranks, "--cache_dir")
    say_config(config, device, precision, ranks)

    student = inputs.load_student(config, ranks)
    windows = inputs.prepare(config, student, config.train_file, "train", ranks)
    validation = inputs.load_validation(config, student, ranks)
    teacher_logits, teacher_key = inputs.cached_teacher(
        config, windows, student, device, precision, ranks
    )
    ranks.agree({"training data": windows.key, "teacher": teacher_key})

    model = student.model.to(device)
    if device.type == "cpu" and not config.torch_compile:  # it compiles its own dropout
        speed_up_dropout(model)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    updater = Updater(
        model, make_optimizer(model, config.weight_decay), scaler, config.max_grad_norm
    )
    chosen = inputs.trained_windows(config, windows, ranks)
    order = TrainingOrder(chosen, config.train_batch_size, config.seed)
    total = total_steps(config, order)
    identity = {name: getattr(config, name) for name in OBJECTIVE}
    identity |= {"windows": windows.key, "teacher_cache": teacher_key, "precision": precision}
    progress = checkpoint.Progress()
    if resumed_from:
        progress = checkpoint.load_checkpoint(Path(resumed_from), model, updater, identity)
        if not (output / "best").is_dir():
            progress.best_f1 = None
        ranks.say(f"Resumed from {resumed_from} after step {progress.steps}.")

    if (
        config.overwrite and ranks.is_first and not config.check_invariance
    ):  # not before all that the run needs has proved good
        remove_run(output)
    forward = model.compiled() if config.torch_compile else model
    multiple = models.COMPILED_WIDTH if config.torch_compile else 1
    if config.gradient_checkpointing:
        model.keep_no_activations()
    work = costs.count_work(model)
    if progress.rule is None:
        trial = costs.Trial(model, forward, device, AUTOCAST[precision])
        rule = costs.choose_rule(config, work, trial)
        progress.rule = CutRule(**json.loads(ranks.share(json.dumps(asdict(rule)))))
    feed = make_feed(windows, teacher_logits, device, multiple)
    stepper = Stepper(
        config,
        model,
        forward,
        updater,
        feed,
        windows.lengths,
        progress.rule,
        device,
        precision,
        total,
        multiple,
        ranks,
    )
    if config.check_invariance:
        return check_invariance(stepper, order, ranks)
    matmul_rate = costs.matmul_rate(device, AUTOCAST[precision] or torch.float32)
    log = None
    if ranks.is_first:
        if config.overwrite:  # not before all that the run needs has proved good
            remove_run(output)
        log = TrainLog(output, progress.steps, config.report_to == "tensorboard")
    ranks.say(f"{total} steps of {config.train_batch_size} windows.")
    evaluation = None
    clock = Clock(work, matmul_rate)
    with tqdm(
        total=total, initial=progress.steps, desc="train", unit="step", disable=not ranks.is_first
    ) as bar:
        while progress.steps < total:
            indices = order.step(progress.steps)
            last = progress.steps + 1 == total
            report = stepper.run(
                progress.steps, indices, None if last else order.step(progress.steps + 1)
            )
            if stepper.rule != progress.rule:
                bar.write(f"Out of memory: steps are now cut by {stepper.rule}.")
            progress.steps, progress.rule = progress.steps + 1, stepper.rule
            speed = clock.add(report, windows.lengths[indices])
            if log:
                log.step(report, speed)
            bar.set_postfix_str(progress_line(report, speed), refresh=False)
            bar.update()
            if validation and due(progress.steps, config.eval_steps, total):
                with clock.stopped():
                    evaluation = validation.score(model, device, precision, ranks)
                    is_best = take_best(progress, evaluation)
                    if log:
                        log.evaluation(progress.steps, evaluation.metrics)
                        bar.write(f"step {progress.steps}: {scoring.line(evaluation.metrics)}")
                    if log and is_best:
                        checkpoint.replace_model(output / "best", model, student.tokenizer)
            if log and config.save_steps and due(progress.steps, config.save_steps, total):
                with clock.stopped():
                    log.flush()
                    checkpoint.save_checkpoint(
                        output,
                        model,
                        student.tokenizer,
                        updater,
                        progress,
                        identity,
                        config.save_total_limit,
                    )
    if log:
        log.close()
    if updater.updates == 0:
        raise UserError(
            "No step reached the weights, as every gradient was not finite: check the student's "
            "weights, or lower --learning_rate."
        )
    if updater.updates < progress.steps:
        ranks.say(f"{progress.steps - updater.updates} of {progress.steps} steps were skipped.")
    if validation and evaluation is None:  # a run that was complete already
        evaluation = validation.score(model, device, precision, ranks)
        if take_best(progress, evaluation) and ranks.is_first:
            checkpoint.replace_model(output / "best", model, student.tokenizer)

    record = {
        "config": asdict(config),
        "precision": precision,
        "ranks": ranks.count,
        **describe_machine(device),
        "student_parameters": sum(each.numel() for each in model.parameters()),
        "train_windows": len(chosen),
        "steps": progress.steps,
        "updates": updater.updates,
        "teacher_cache": teacher_key,
        "cuts": asdict(progress.rule),
        "matmul_flops_per_second": matmul_rate,
        "train_speed": asdict(clock.speed()) if clock.speed() else None,
        "metrics": None if evaluation is None else evaluation.metrics,
        "eval_windows_per_second": None if evaluation is None else evaluation.windows_per_second,
        "best_f1": progress.best_f1,
    }
    if ranks.is_first:
        place_models(config, output, model, student.tokenizer)
        write_run(output, record)
    ranks.barrier()
    ranks.say(f"The student is in {output}; run.json there holds settings, versions and figures.")
    return record


def check_invariance(stepper: Stepper, order: TrainingOrder, ranks: Ranks) -> dict:
    """Print how the first step's gradient depends on how it is split. UserError where it does."""
    splits = invariance.check(stepper, order.step(0))
    ranks.say(
        "Distance of the gradient from that of one piece in fp64, over its norm; dropout is off."
    )
    ranks.say(invariance.table(splits))
    wrong = [each.name for each in splits if not each.good]
    if wrong:
        raise UserError(
            f"The gradient depends on the split: see {', '.join(wrong)} above. Do not train with "
            "this model; report it with the table."
        )
    return {"splits": [asdict(each) for each in splits]}


def total_steps(config: TrainConfig, order: TrainingOrder) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, round(config.num_train_epochs * order.steps_per_epoch))


def due(steps: int, every: int | None, total: int) -> bool:
    """Whether something happens after `steps`: every so many steps, and after the last one."""
    return steps == total or (every is not None and steps % every == 0)


def restarted(config: TrainConfig, output: Path, ranks: Ranks) -> TrainConfig:
    """The settings after torchrun has started the ranks anew: go on from the last checkpoint."""
    if ranks.restarts == 0:
        return config
    if checkpoint.list_checkpoints(output):
        return replace(config, resume_from_checkpoint="last", overwrite=False)
    return replace(config, resume_from_checkpoint=None, overwrite=True)


def take_best(progress: checkpoint.Progress, evaluation: scoring.Evaluation) -> bool:
    """Whether no evaluation before had as good an f1."""
    f1 = evaluation.metrics["f1"]
    is_best = progress.best_f1 is None or f1 > progress.best_f1
    if is_best:
        progress.best_f1 = f1
    return is_best


def place_models(config: TrainConfig, output: Path, model: models.SpanModel, tokenizer) -> None:
    """The last model into output_dir; with --load_best_model_at_end the best, and last/ beside."""
    if not config.load_best_model_at_end:
        checkpoint.save_model(output, model, tokenizer)
        return
    checkpoint.replace_model(output / "last", model, tokenizer)
    for path in (output / "best").iterdir():
        shutil.copy2(path, output / path.name)


def say_config(config: TrainConfig, device: torch.device, precision: str, ranks: Ranks) -> None:
    """Print the settings that the run uses, a line each."""
    of = f", one of {ranks.count} ranks" if ranks.count > 1 else ""
    ranks.say(f"kdfast.train on {device}, precision {precision}{of}")
    for name, value in asdict(config).items():
        if value is not None and value is not False:
            ranks.say(f"  {name}: {value}")
    if config.recipe is not None:
        for line in recipes.load(config.recipe).lines():
            ranks.say(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
