"""KDTrainer: the Trainer's own loop with the gradient of the whole step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from kdfast import fused_kd_loss
from kdfast.common.errors import UserError
from kdfast.config import TrainConfig
from kdfast.hf import KDCollator, KDDataset, KDMixin, KDTrainer, kd_dataset
from tests import forks
from tests.hf_runs import settings_and_rows, student

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")


@pytest.fixture
def data(world):
    return settings_and_rows(world)


def weights(model):
    return torch.cat([each.detach().flatten() for each in model.parameters()]).clone()


def moved(world, data, batch, accumulation, kind=KDTrainer, **changes):
    """Minus the gradient that one step of plain SGD took, with rate 1."""
    config, rows = data
    model = student(world)
    before = weights(model)
    arguments = TrainingArguments(
        output_dir=str(world.path / "hf"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )
    kind(model=model, args=arguments, train_dataset=rows, kd=config).train()
    return weights(model).cpu() - before


def whole(world, data):
    """Minus the gradient of all rows as one padded batch, through the public function."""
    config, rows = data
    model = student(world)
    batch = KDCollator(rows.pad_token_id)([rows[number] for number in range(len(rows))])
    teacher, start, end = (
        batch.pop(name) for name in ("teacher_logits", "start_positions", "end_positions")
    )
    outputs = model(**batch)
    fused_kd_loss(
        (outputs.start_logits, outputs.end_logits),
        teacher,
        start,
        end,
        temperature=config.loss.temperature,
        distillation_loss_weight=config.loss.distillation_loss_weight,
        mask=batch["attention_mask"].bool(),
    ).backward()
    return -torch.cat([each.grad.flatten() for each in model.parameters()])


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (3, 4), (5, 3), (1, 12), (7, 2)])
def test_accumulation_has_the_gradient_of_the_whole_batch(world, data, batch, accumulation):
    assert distance(moved(world, data, batch, accumulation), whole(world, data)) < 1e-5


def test_half_precision_comes_near(world, data):
    assert distance(moved(world, data, 5, 3, bf16=True), whole(world, data)) < 0.05


class MeanOfMeans(KDMixin, Trainer):
    """What a Trainer does with a loss that is each batch's mean."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, None)


def test_the_gradient_check_sees_a_mean_of_means(world, data):
    assert distance(moved(world, data, 5, 3, MeanOfMeans), whole(world, data)) > 1e-3


def test_two_devices_have_the_gradient_of_one(world, data):
    def rank(number):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # what the parent found: one process
        return moved(world, data, 2, 3, ddp_backend="gloo").tolist()

    for found in forks.run(2, rank):
        assert not isinstance(found, str), found
        assert distance(torch.tensor(found), whole(world, data)) < 1e-5


def test_rows_hold_the_cache_of_their_own_window(data):
    _, rows = data
    for number in (0, 5, 11):
        row, index = rows[number], rows.chosen[number]
        begin = rows.windows.window_start[index]
        end = begin + rows.windows.lengths[index]
        np.testing.assert_array_equal(row["input_ids"], rows.windows.input_ids[begin:end])
        np.testing.assert_array_equal(row["teacher_logits"], rows.teacher_logits[begin:end])


def test_shuffled_columns_are_refused(data):
    _, rows = data
    collate = KDCollator(rows.pad_token_id)
    one, other = rows[0], rows[1]
    for name in ("teacher_logits", "teacher_window"):
        one[name], other[name] = other[name], one[name]
    with pytest.raises(UserError, match="belong to other input_ids"):
        collate([one, other])


def test_rows_without_a_teacher_are_refused(world, data):
    config, rows = data
    row = rows[0]
    del row["teacher_logits"]
    with pytest.raises(UserError, match="A row has no teacher_logits, which others have"):
        KDCollator(rows.pad_token_id)([rows[1], row])
    trainer = KDTrainer(
        model=student(world),
        args=TrainingArguments(str(world.path / "hf"), use_cpu=True, report_to="none"),
        kd=config,
    )
    with pytest.raises(UserError, match="without teacher_logits"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(UserError, match="without start_positions or end_positions"):
        trainer.compute_loss(trainer.model, {"teacher_logits": torch.ones(1, 4, 2)})
    with pytest.raises(UserError, match="needs a teacher"):
        kd_dataset(TrainConfig(student=world.student, train_file=world.train_file))


def test_averaged_rows_are_refused_at_another_temperature(world, data):
    config, rows = data
    averaged = KDDataset(rows.windows, rows.chosen, rows.teacher_logits, temperature=2.0)

    def trainer(kd):
        args = TrainingArguments(str(world.path / "hf"), use_cpu=True, report_to="none")
        return KDTrainer(model=student(world), args=args, train_dataset=averaged, kd=kd)

    assert trainer(config).train_dataset is averaged
    for change in ({"temperature": 1.0}, {"distillation_loss": "mse"}):
        with pytest.raises(UserError, match="at temperature 2: give KDTrainer that temperature"):
            trainer(config.replace(**change))


def test_the_example_of_the_documents(world, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (code,) = re.findall(
        r"```python\n(import torch\nfrom kdfast\.hf import.*?)```", text, re.DOTALL
    )
    for theirs, ours in (
        ("deepset/roberta-large-squad2", world.teacher),
        ("roberta-base", world.student),
        ("rajpurkar/squad_v2", world.train_file),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("HOME", str(world.path))
    student(world).half().save_pretrained(world.student)  # as many are published
    names = {}
    exec(compile(code, "training.md", "exec"), names)
    assert {each.dtype for each in names["trainer"].model.parameters()} == {torch.float32}
    saved = world.path / "distilled-hf"
    assert (saved / "model.safetensors").is_file()
    read = Path(world.student, "tokenizer.json").read_bytes()
    assert (saved / "tokenizer.json").read_bytes() == read
