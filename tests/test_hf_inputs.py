"""KDTrainer takes datasets, collators and models as users have them, or refuses them."""

import pickle
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset
from transformers import AutoTokenizer, DataCollatorWithPadding

from kdfast.common.errors import UserError
from kdfast.hf import KDCollator, KDDataset, KDTrainer
from tests.hf_runs import arguments, settings_and_rows, student

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")


@pytest.fixture
def data(world):
    return settings_and_rows(world)


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.student)


def trained(world, config, rows, model=None, **changes):
    """The weights after two steps."""
    own = {k: changes.pop(k) for k in ("data_collator", "processing_class") if k in changes}
    model = model or student(world)
    args = arguments(world, **changes)
    KDTrainer(model=model, args=args, train_dataset=rows, kd=config, **own).train()
    return torch.cat([each.detach().flatten() for each in model.parameters()])


class Wrapper(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        return self.dataset[number]


def test_every_way_to_the_same_rows_trains_alike(world, data, tokenizer):
    config, rows = data
    # Forked workers would see the arrays without pickling.
    spawned = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    expected = trained(world, config, rows)
    halves = [Subset(rows, range(6)), Subset(rows, range(6, 12))]
    ways = {
        "ConcatDataset": (ConcatDataset(halves), {}),
        "Subset of a Subset": (Subset(Subset(rows, range(12)), range(12)), {}),
        "a wrapper": (Wrapper(rows), {}),
        "a list": (list(rows), {}),
        "datasets.Dataset": (Dataset.from_list(list(rows)), {}),
        "spawned workers": (rows, spawned),
        "columns kept": (rows, {"remove_unused_columns": False}),
        "padding to 16": (
            rows,
            {"data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16)},
        ),
        "max_length": (
            rows,
            {"data_collator": DataCollatorWithPadding(tokenizer, "max_length", max_length=256)},
        ),
        "a collator of its own": (rows, {"data_collator": KDCollator(rows.pad_token_id)}),
        "a collator that takes the teacher's column": (rows, {"data_collator": own_collator}),
        "a tokenizer that pads on the left": (rows, {"processing_class": left_padding(world)}),
    }
    for name, (dataset, changes) in ways.items():
        torch.testing.assert_close(trained(world, config, dataset, **changes), expected, msg=name)


def left_padding(world):
    return AutoTokenizer.from_pretrained(world.student, padding_side="left")


def own_collator(rows):
    width = max(len(row["input_ids"]) for row in rows)
    logits = torch.zeros(len(rows), width, 2, dtype=torch.float16)
    for number, row in enumerate(rows):
        logits[number, : len(row["input_ids"])] = torch.as_tensor(row["teacher_logits"])
    plain = [{k: v for k, v in row.items() if not k.startswith("teacher")} for row in rows]
    return {**KDCollator(0)(plain), "teacher_logits": logits}


def test_collators_that_misplace_the_teacher_are_refused(world, data, tokenizer):
    config, rows = data
    collators = {
        "left": DataCollatorWithPadding(left_padding(world)),
        "cut": lambda given: KDCollator(0)(
            [row | {"input_ids": row["input_ids"][:-1]} for row in given]
        ),
        "turned": lambda given: KDCollator(0)(given[::-1]),
        "packed": lambda given: {
            "input_ids": torch.cat([torch.as_tensor(r["input_ids"]) for r in given])
        },
    }
    for name, collator in collators.items():
        with pytest.raises(UserError, match="The data_collator moves, cuts or changes input_ids"):
            trained(world, config, rows, data_collator=collator)
            pytest.fail(name)


class OwnHead(torch.nn.Module):
    """A reader whose forward knows no answers."""

    def __init__(self, reader, returned):
        super().__init__()
        self.reader, self.returned = reader, returned

    def forward(self, input_ids, attention_mask=None):
        out = self.reader(input_ids=input_ids, attention_mask=attention_mask)
        start, end = out.start_logits, out.end_logits
        return {
            "dict": {"end_logits": end, "start_logits": start},
            "tuple": (start, end),
            "tensor": torch.stack([start, end], 2),
            "logits": {"logits": start},
        }[self.returned]


@pytest.mark.parametrize("returned", ["dict", "tuple"])
def test_a_model_with_a_head_of_its_own(world, data, returned):
    config, rows = data
    model = OwnHead(student(world), returned)
    without = [{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows]
    expected = trained(world, config, without)
    torch.testing.assert_close(trained(world, config, rows, model), expected)
    trainer = KDTrainer(model=model, args=arguments(world), kd=config)
    predicted = trainer.predict(rows)
    assert [each.shape[0] for each in predicted.predictions] == [12, 12]
    np.testing.assert_array_equal(predicted.label_ids[0], [row["start_positions"] for row in rows])
    unlabelled = [{k: v for k, v in row.items() if "positions" not in k} for row in rows]
    again = trainer.predict(unlabelled)
    assert again.label_ids is None
    for one, other in zip(again.predictions, predicted.predictions, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("returned", ["tensor", "logits"])
def test_a_model_that_returns_something_else_is_refused(world, data, returned):
    config, rows = data
    with pytest.raises(UserError, match="expected start_logits and end_logits"):
        trained(world, config, rows, OwnHead(student(world), returned))


def test_what_has_no_part_in_the_loss_is_refused(world, data):
    config, rows = data
    with pytest.raises(UserError, match=re.escape("label_smoothing_factor is 0.1")):
        trained(world, config, rows, label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="leave compute_loss_func out"):
        KDTrainer(
            model=student(world),
            args=arguments(world),
            compute_loss_func=lambda *given, **named: 0,
            kd=config,
        )
    other = KDDataset(rows.windows.with_token_types(True), rows.chosen, rows.teacher_logits)
    other.pad_token_id = 7
    with pytest.raises(UserError, match="make them for one student"):
        trained(world, config, ConcatDataset([rows, other]))
    averaged = KDDataset(rows.windows, rows.chosen, rows.teacher_logits, temperature=1.0)
    with pytest.raises(UserError, match="at temperature 1: give KDTrainer that temperature"):
        trained(world, config, Subset(averaged, range(4)))


def test_a_pickled_dataset_holds_paths(world, data):
    _, part = data
    rows = KDDataset(part.windows, np.arange(len(part.windows)), part.teacher_logits)
    held = pickle.dumps(rows)
    assert len(held) - len(pickle.dumps(part)) < 100
    assert str(world.path / "cache").encode() in held
    for each in (
        rows,
        part,
        KDDataset(part.windows, np.array([5, 3, 4, 9, 9]), part.teacher_logits),
    ):
        again = pickle.loads(pickle.dumps(each))
        np.testing.assert_array_equal(again.chosen, each.chosen)
        assert again.windows.question_ids[0] == each.windows.question_ids[0]
        for one, other in zip(again, each, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_an_array_that_is_part_of_a_file_is_pickled_itself(data):
    _, rows = data
    for chosen in (rows.teacher_logits[1:], rows.teacher_logits[::2], rows.teacher_logits[:, :1]):
        part = KDDataset(rows.windows, rows.chosen[:1], chosen)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(part)).teacher_logits, chosen)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential", "batch_rebalance"])
def test_sampling_strategies(world, data, strategy):
    config, rows = data
    before = torch.cat([each.detach().flatten() for each in student(world).parameters()])
    assert not torch.equal(trained(world, config, rows, train_sampling_strategy=strategy), before)


def test_a_run_goes_on_from_a_checkpoint(world, data):
    config, rows = data
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(world, config, rows, **saving)
    model = student(world)
    trainer = KDTrainer(model=model, args=arguments(world, **saving), train_dataset=rows, kd=config)
    trainer.train(resume_from_checkpoint=str(world.path / "hf" / "checkpoint-2"))
    found = torch.cat([each.detach().flatten() for each in model.parameters()])
    torch.testing.assert_close(found, whole)
