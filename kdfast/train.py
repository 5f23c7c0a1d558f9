"""`python -m kdfast.train`: distil a small reader from a large one.

Without any argument it runs the embedded demo. The training loop is `train_loop`.
"""

import sys

from kdfast.command_line import parse
from kdfast.common import program

if __name__ == "__main__":  # flags come first: what is imported below takes seconds
    sys.exit(program.run(parse, "kdfast.train:start"))

import signal
from functools import partial
from typing import Any

import torch

from kdfast import recipes
from kdfast.card import CardConfig, upload, write_card
from kdfast.common.device import as_current, pick_device
from kdfast.common.machine import code_key, describe_machine
from kdfast.common.precision import enable_determinism, resolve
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.common.signals import Stopped, StopSignals
from kdfast.config import TrainConfig
from kdfast.config_checks import check
from kdfast.demo import demo
from kdfast.models.save import rehearse_saving
from kdfast.teachers import layers
from kdfast.training import inputs, resume, stages
from kdfast.training.assemble import Training, TrainingData, assemble
from kdfast.training.checkpoint import list_checkpoints
from kdfast.training.optimizer import learning_rate
from kdfast.training.results import Results
from kdfast.training.run_folder import (
    check_shared,
    local_paths,
    open_output,
    sole_run,
    write_run,
)
from kdfast.training.step import Callback, StepSums, read_step, seed_generators
from kdfast.training.train_files import TrainFiles


def train_loop(training: Training, callback: Callback, steps: int | None = None) -> None:
    """The recipe: the steps of a run, up to the last one or until all ranks agree to stop.

    A step is a pure function of its number, the seed, the data and the settings: nothing draws
    from a generator that outlives a micro-batch, and no cut depends on a clock.

    Args:
        training: Model, optimizer, data and all else that a step needs.
        callback: What happens around the steps, such as `Results`.
        steps: How many to do at most. Default: all that are left.
    """
    run, settings, optimizer = training.run, training.settings, training.optimizer
    progress, cuts, objective = training.progress, training.cuts, training.objective
    end = training.total_steps if steps is None else progress.steps + steps
    output = row_loss = row_parts = loss = batch = None
    # What a resumed run owes: its checkpoint may stand before an evaluation, or at the last step.
    callback.place_student_if_last()
    callback.evaluate_if_due()
    callback.save_if_due()
    while progress.steps < end and not training.is_over and not run.stop.agreed:
        step, indices = progress.steps, training.order.step(progress.steps)
        training.model.train()
        for micro_batches in cuts.until_they_fit(indices, optimizer):
            sums = StepSums(run, len(indices))
            # One autocast for all: it forgets its half-precision weights at its end.
            with cuts.catching_out_of_memory(), run.autocast():
                for number, batch in enumerate(training.load(step, micro_batches)):
                    if sums.must_drop(number, len(micro_batches)):
                        break
                    seed_generators(run.device, settings.seed, step, run.ranks.rank, number)
                    output = training.forward(**batch.inputs)
                    with run.full_precision():
                        row_loss, row_parts = objective.loss(output, batch)
                        loss = row_loss.sum() / len(indices)
                        optimizer.scale(loss).backward()
                    sums.add(loss, row_parts)
            output = row_loss = row_parts = loss = batch = None  # or what did not fit would stay

        totals = training.totals(sums, micro_batches)
        totals.values = run.ranks.sum_gradients(optimizer.parameters, totals.values)
        loss_scale = optimizer.loss_scale()
        optimizer.unscale()
        grad_norm = optimizer.clip(settings.max_grad_norm)
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(totals["loss"])
        skipped = ~is_finite | (totals["drops"] > 0)
        lr = learning_rate(
            settings.learning_rate, optimizer.updates, training.total_steps, settings.warmup_ratio
        )
        optimizer.step(lr, skipped)

        numbers = read_step(totals, grad_norm=grad_norm, skipped=skipped, loss_scale=loss_scale)
        report = training.finish_step(numbers, indices, lr)
        if report is None:  # dropped, because a rank must stop before it would have ended
            break
        callback.log_step(report, indices)
        callback.check_finite(report, micro_batches)
        callback.place_student_if_last()
        callback.evaluate_if_due()
        callback.save_if_due()


def start(config: TrainConfig | None) -> None:
    """The work of the program. config: None runs the embedded demo."""
    program.refuse_windows("train")
    with StopSignals() as stop:
        if config is None:
            demo.run(train)
            return
        with Ranks.join() as ranks:
            train(config, ranks, stop)


def train(
    config: TrainConfig, ranks: Ranks | None = None, stop: StopSignals | None = None
) -> dict[str, Any]:
    """From files to a finished student; returns what run.json holds, of the last stage.

    Raises:
        UserError: For a mistake of the user.
        Stopped: Where `stop` ended it at a checkpoint.
    """
    ranks, stop = ranks or Ranks(), stop or StopSignals()
    check(config)
    inputs.validation_sets(config)  # a metric that lacks its language is refused at once
    card = CardConfig.of_run(config)
    card.check()
    if ranks.is_first:
        card.check_access()
    if config.model.stage != "both":
        return train_stage(config, ranks, stop)
    with stages.held(config, ranks) as (layers_run, predictions_run):
        train_stage(layers_run, ranks, stop)
        return train_stage(predictions_run, ranks, stop)


def train_stage(config: TrainConfig, ranks: Ranks, stop: StopSignals) -> dict[str, Any]:
    """One stage in its own output folder, from the start or from a checkpoint."""
    run = start_run(config, ranks, stop)
    settings = resume.settings_of(config, run.precision)
    if ranks.is_first:
        config = resume.restarted(config, ranks)
        open_output(config)
    check_shared(run.output, ranks, "--output_dir")
    with as_current(run.device), sole_run(run.output, ranks):
        resumed = resume.Resumed.find(config, run.output, ranks)
        if resumed:
            resumed.check(settings)
        log_config(config, run)
        return distil(config, run, settings, resumed)


def start_run(config: TrainConfig, ranks: Ranks, stop: StopSignals) -> Run:
    """Device and precision of this process, equal settings on all ranks, one cache for all."""
    stop.grace_seconds, stop.is_first = config.output.grace_seconds, ranks.is_first
    device = pick_device(ranks.local_rank)
    types = inputs.trained_types(config)
    precision = resolve(config.speed.mixed_precision, device, types, ranks.log)
    if config.speed.deterministic:
        enable_determinism(device)
    ranks.assert_same_on_all_ranks(
        {"settings": config, "code": code_key(), "torch": torch.__version__}
    )
    check_shared(config.data.cache_path, ranks, "--cache_dir")
    return Run(device, precision, ranks, stop, config.output.folder)


def distil(
    config: TrainConfig, run: Run, settings: dict[str, Any], resumed: resume.Resumed | None
) -> dict[str, Any]:
    """Data and models, the loop, the student: a run whose output folder is its own."""
    ranks, output = run.ranks, run.output
    student = inputs.load_student(config, ranks)
    if ranks.is_first:
        rehearse_saving(output, student, config.model.student_source)
    files = TrainFiles.prepare_for(config, student, ranks)
    validation = files.load_validation(config, student, ranks)
    targets = files.find_targets(config, student.tokenizer, run)
    taught_by = targets.weights if targets else None
    if config.model.stage == "layers":
        taught_by = [layers.layer_teacher_key(config, student)]
    cache_key = targets.key if targets else None
    keys = resume.keys_of(config, student, files.key, taught_by, cache_key)
    ranks.assert_same_on_all_ranks(keys)
    if resumed:
        resumed.check(keys)
    logits = files.teacher_logits(config, targets, run)
    made = targets.logits_sum(config) if targets else None
    environment = resume.environment_of(run, made)
    identity = {**settings, **keys, "circumstances": environment}
    data = TrainingData(files.windows, logits, files.shares(config, ranks))

    set_key = validation.key if validation else None
    restore = partial(resumed.restore, set_key) if resumed else None
    training = assemble(config, run, student.model, data, restore)
    progress, total = training.progress, training.total_steps
    if resumed:
        notes = resumed.notes(environment, progress.steps)
        for note in notes + (resumed.set_aside_others(output, progress) if ranks.is_first else []):
            ranks.log(note)
    progress.starts.append(progress.steps)
    if ranks.is_first:
        resume.begin(config, progress.steps)
    run.stop.can_resume = run.stop.can_resume or bool(list_checkpoints(output))
    results = Results(config, training, student, data.windows, validation, identity)
    ranks.log(f"{total} steps of {config.optimization.train_batch_size} windows.")
    with results.bar, run.stop.deferred(), results.telling_where():
        train_loop(training, results)
        if run.stop.agreed:
            results.save()
            ranks.barrier()
            where = f"after step {progress.steps}, in a checkpoint"
            ranks.log(f"Stopped {where if progress.steps else 'before the first step'}.")
            raise Stopped(run.stop.number or signal.SIGTERM, can_resume=progress.steps > 0)
    skipped = progress.steps - training.optimizer.updates
    if skipped:
        ranks.log(f"{skipped} of {progress.steps} steps were skipped.")
    with results.telling_where():
        results.finish()

    record = {
        "config": config.flat(),
        "precision": run.precision,
        "ranks": ranks.count,
        **describe_machine(run.device),
        "student_parameters": sum(each.numel() for each in training.student.parameters()),
        "train_windows": sum(len(share.windows) for share in data.shares),
        "questions": files.counts(data.shares),
        "teacher_cache": cache_key,
        "layers_stage": stages.earlier(config),
        "local_paths": local_paths(config),
        "matmul_flops_per_second": results.matmul_rate,
        **results.figures(),
    }
    if ranks.is_first:
        with results.telling_where():
            write_run(output, record)
    ranks.barrier()
    what = "student" if targets or config.model.stage == "layers" else "model"
    ranks.log(f"The {what} is in {output}; run.json there holds settings, versions and figures.")
    if ranks.is_first and config.model.stage == "predictions":
        with results.telling_where():
            card = write_card(CardConfig.of_run(config), ranks.log)
        upload(card, config.output.push_to_hub, ranks.log)
    return record


def log_config(config: TrainConfig, run: Run) -> None:
    """Print the settings that the run uses, a line each."""
    of = f", one of {run.ranks.count} ranks" if run.ranks.count > 1 else ""
    run.ranks.log(f"kdfast.train on {run.device}, precision {run.precision}{of}")
    for name, value in config.flat().items():
        if value is not None and value is not False:
            run.ranks.log(f"  {name}: {value}")
    if config.model.recipe:
        for line in recipes.load(config.model.recipe).lines():
            run.ranks.log(f"  {line}")


def main(argv: list[str] | None = None) -> int:
    """The program, called from Python; see `program.run` for the exit status it returns."""
    return program.run(parse, "kdfast.train:start", argv)
