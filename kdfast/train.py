"""`python -m kdfast.train`: distil a small reader from a large one.

Without any argument it runs the embedded demo.
"""

import sys

from kdfast.common import program
from kdfast.train_flags import parse

if __name__ == "__main__":  # flags come first: what is imported below takes seconds
    sys.exit(program.run(parse, "kdfast.train:start"))

import json
import signal
from dataclasses import asdict
from pathlib import Path

import torch

from kdfast import recipes
from kdfast.card import CardConfig, publish
from kdfast.common.machine import code_key, describe_machine
from kdfast.common.progress import training_bar
from kdfast.common.ranks import Ranks
from kdfast.common.signals import Stopped, StopSignals
from kdfast.config import TrainConfig
from kdfast.data.batches import MicroBatchPolicy, TrainingOrder
from kdfast.models import load
from kdfast.models.dropout import speed_up_dropout
from kdfast.models.loader import make_loader
from kdfast.models.precision import AUTOCAST, enable_determinism, pick_device, resolve
from kdfast.models.save import rehearse_saving
from kdfast.teachers import layers
from kdfast.training import checkpoint, inputs, invariance, micro_batches, resume, stages
from kdfast.training.log import Clock, progress_line
from kdfast.training.nonfinite import NonfiniteSteps
from kdfast.training.optimizer import Updater, make_optimizer
from kdfast.training.results import Results
from kdfast.training.run_folder import (
    check_shared,
    local_paths,
    open_output,
    remove_run,
    sole_run,
    write_run,
)


def start(config: TrainConfig | None) -> None:
    """The work of the program. config: None runs the embedded demo."""
    with StopSignals() as stop:
        if config is None:
            from kdfast.demo.tour import tour

            tour()
            return
        with Ranks.join() as ranks:
            train(config, ranks, stop)


def train(config: TrainConfig, ranks: Ranks | None = None, stop: StopSignals | None = None) -> dict:
    """One run from files to a finished student; returns what run.json holds.

    Raises Stopped where `stop` ended it at a checkpoint.
    """
    ranks, stop = ranks or Ranks(), stop or StopSignals()
    config.check()
    inputs.validation_set(config)  # a metric without its language is refused at once
    if not config.check_invariance:
        CardConfig.of_run(config).check()
    if config.stage == "both":
        with stages.held(config, ranks) as runs:
            for each in runs:
                record = train(each, ranks, stop)
        return record
    stop.grace_seconds, stop.is_first = config.grace_seconds, ranks.is_first
    device = pick_device(ranks.local_rank)
    precision = resolve(config.mixed_precision, device)
    if config.deterministic:
        enable_determinism(device)
    ranks.assert_same_on_all_ranks(
        {"settings": config, "code": code_key(), "torch": torch.__version__}
    )
    settings = resume.settings_of(config, precision)
    check_shared(config.cache_path, ranks, "--cache_dir")
    output = Path(config.output_dir or ".").expanduser()
    if config.check_invariance:
        say_config(config, device, precision, ranks)
        return distil(config, output, None, settings, device, precision, ranks, stop)
    if ranks.is_first:
        config = resume.restarted(config, output, ranks)
        open_output(config)
    check_shared(output, ranks, "--output_dir")
    with sole_run(output, ranks):
        resumed = resume.Resumed.find(config, output, ranks)
        if resumed:
            resumed.check(settings)
        say_config(config, device, precision, ranks)
        return distil(config, output, resumed, settings, device, precision, ranks, stop)


def distil(
    config: TrainConfig,
    output: Path,
    resumed: resume.Resumed | None,
    settings: dict,
    device: torch.device,
    precision: str,
    ranks: Ranks,
    stop: StopSignals,
) -> dict:
    """The recipe, once `output` is this run's own."""
    student = inputs.load_student(config, ranks)
    if ranks.is_first and not config.check_invariance:
        rehearse_saving(output, student, config.student or config.teacher[0])
    windows = inputs.prepare(config, student, config.train_file, "train", ranks)
    validation = inputs.load_validation(config, student, ranks)
    taught = inputs.find_targets(config, windows, student, device, precision, ranks)
    if config.stage == "layers":
        taught_by = [layers.find_teacher(config, student)]
    else:
        taught_by = taught and taught.weights
    keys = resume.keys_of(config, student, windows, taught_by, taught and taught.key)
    ranks.assert_same_on_all_ranks(keys)
    environment = resume.environment_of(ranks)
    identity = {**settings, **keys, "circumstances": environment}
    if resumed:
        resumed.check(keys)
    teacher_logits = inputs.teacher_logits(config, taught, windows, device, ranks)

    model = student.model.to(device)
    if device.type == "cpu" and not config.torch_compile:  # it compiles its own dropout
        speed_up_dropout(model)
    learner, kind_of_step = layers.make_learner(config, model, device, precision)
    scaler = None
    if precision == "fp16":
        scaler = torch.amp.GradScaler(device.type, kind_of_step.INITIAL_SCALE)
    updater = Updater(
        learner, make_optimizer(learner, config.weight_decay), scaler, config.max_grad_norm
    )
    chosen = inputs.trained_windows(config, windows, ranks)
    order = TrainingOrder(chosen, config.train_batch_size, config.seed)
    total = total_steps(config, order)
    progress = checkpoint.Progress()
    if resumed:
        progress = resumed.restore(output, model, updater, validation and validation.key)
        for note in resumed.notes(environment, progress.steps):
            ranks.log(note)
    progress.starts.append(progress.steps)

    forward = model.compiled() if config.torch_compile else learner
    multiple = load.COMPILED_WIDTH if config.torch_compile else 1
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    work = micro_batches.count_work(model)
    if config.stage == "layers":
        work = work.with_teacher(micro_batches.count_work(learner.teacher))
    if progress.policy is None:
        policy = ""
        if ranks.is_first:  # what memory it finds holds for all
            probe = micro_batches.MemoryProbe(learner, forward, device, AUTOCAST[precision])
            policy = json.dumps(asdict(micro_batches.choose_policy(config, work, probe)))
        progress.policy = MicroBatchPolicy(**json.loads(ranks.share(policy)))
    loader = make_loader(windows, teacher_logits, device, multiple)
    stepper = kind_of_step(
        config,
        model,
        forward,
        updater,
        loader,
        windows.lengths,
        progress.policy,
        device,
        precision,
        total,
        multiple,
        ranks,
        stop,
    )
    if config.check_invariance:
        return invariance.report(stepper, order.step(0), ranks)
    if config.overwrite and ranks.is_first:  # not before all that the run needs has proved good
        remove_run(output)
    matmul_rate = micro_batches.matmul_rate(device, AUTOCAST[precision] or torch.float32)
    stop.can_resume = stop.can_resume or bool(checkpoint.list_checkpoints(output))
    results = Results(
        config,
        output,
        student,
        updater,
        progress,
        total,
        identity,
        validation,
        Clock(work, matmul_rate, progress.clock),
        device,
        precision,
        ranks,
        stop,
    )
    nonfinite = NonfiniteSteps(stepper, windows)
    ranks.log(f"{total} steps of {config.train_batch_size} windows.")
    bar = training_bar(progress.steps, total, ranks.is_first)
    with bar, stop.deferred(), results.telling_where():
        while not stop.agreed:
            is_last = progress.steps >= total
            if is_last:
                results.place_student()
            if results.must_evaluate():
                bar.refresh()  # or it would show an earlier step as long as this takes
                if figures := results.evaluate():
                    ranks.log(figures)
            if stop.agreed:
                break
            if results.must_save():
                results.save()
                stop.can_resume = True
            if is_last:
                break
            indices = order.step(progress.steps)
            upcoming = order.step(progress.steps + 1) if progress.steps + 1 < total else None
            report = stepper.run(progress.steps, indices, upcoming)
            if stepper.policy != progress.policy:
                ranks.log(f"Out of memory: steps are now cut by {stepper.policy}.")
                progress.policy = stepper.policy
            if report is not None:
                speed = results.step(report, windows.lengths[indices])
                if skipped := nonfinite.check(report):
                    ranks.log(skipped)
                line = progress_line(report, speed)
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                if bar.disable and progress.steps % max(1, total // 10) == 0:
                    ranks.log(f"step {progress.steps} of {total}: {line}")
        if stop.agreed:
            results.save()
            ranks.barrier()
            where = f"after step {progress.steps}, in a checkpoint"
            ranks.log(f"Stopped {where if progress.steps else 'before the first step'}.")
            raise Stopped(stop.number or signal.SIGTERM, can_resume=progress.steps > 0)
    if updater.updates < progress.steps:
        ranks.log(f"{progress.steps - updater.updates} of {progress.steps} steps were skipped.")
    with results.telling_where():
        results.finish()

    record = {
        "config": asdict(config),
        "precision": precision,
        "ranks": ranks.count,
        **describe_machine(device),
        "student_parameters": sum(each.numel() for each in model.parameters()),
        "train_windows": len(chosen),
        "questions": inputs.question_counts(windows, chosen),
        "teacher_cache": taught and taught.key,
        "layers_stage": stages.earlier(config),
        "local_paths": local_paths(config),
        "matmul_flops_per_second": matmul_rate,
        **results.figures(),
    }
    if ranks.is_first:
        with results.telling_where():
            write_run(output, record)
    ranks.barrier()
    what = "student" if taught or config.stage == "layers" else "model"
    ranks.log(f"The {what} is in {output}; run.json there holds settings, versions and figures.")
    if ranks.is_first and config.stage == "predictions":
        with results.telling_where():
            publish(CardConfig.of_run(config), ranks.log)
    return record


def total_steps(config: TrainConfig, order: TrainingOrder) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, round(config.num_train_epochs * order.steps_per_epoch))


def say_config(config: TrainConfig, device: torch.device, precision: str, ranks: Ranks) -> None:
    """Print the settings that the run uses, a line each."""
    of = f", one of {ranks.count} ranks" if ranks.count > 1 else ""
    ranks.log(f"kdfast.train on {device}, precision {precision}{of}")
    for name, value in asdict(config).items():
        if value is not None and value is not False:
            ranks.log(f"  {name}: {value}")
    if config.recipe is not None:
        for line in recipes.load(config.recipe).lines():
            ranks.log(f"  {line}")


def main(argv: list[str] | None = None) -> int:
    """The program, called from Python; see `program.run` for the exit status it returns."""
    return program.run(parse, "kdfast.train:start", argv)
