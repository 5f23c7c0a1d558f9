"""KDTrainer evaluates as a Trainer does: the figures that a user's own functions make of it."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    default_data_collator,
)

from kdfast import fused_kd_loss
from kdfast.data.read import read_examples
from kdfast.evaluation import metrics
from kdfast.hf import KDCollator, KDMixin, KDTrainer
from tests.corpora import shared
from tests.hf_runs import arguments, settings_and_rows, student

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")
QUESTIONS = 12


@pytest.fixture
def data(world):
    return settings_and_rows(world)


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.student)


@pytest.fixture
def examples(world):
    """Some real questions, as {"id", "question", "context", "answers"}."""
    path = Path(world.path / "real.json")
    path.write_text(shared("newwiki_dev.json").read_text(encoding="utf-8"), encoding="utf-8")
    return list(read_examples(str(path)))[:QUESTIONS]


def features_of(examples, tokenizer, *, labelled, padding):
    """Validation features with the columns that run_qa.py gives them."""
    rows = []
    for example in examples:
        windows = tokenizer(
            example.question,
            example.context,
            truncation="only_second",
            max_length=200,
            stride=64,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=padding,
        )
        for number, offsets in enumerate(windows["offset_mapping"]):
            of_context = [each == 1 for each in windows.sequence_ids(number)]
            names = ("input_ids", "attention_mask", "token_type_ids")
            row = {name: windows[name][number] for name in names if name in windows}
            row["example_id"] = example.id
            row["offset_mapping"] = [
                place if is_in else None for place, is_in in zip(offsets, of_context, strict=True)
            ]
            if labelled:
                row["start_positions"] = row["end_positions"] = of_context.index(True)
            rows.append(row)
    return Dataset.from_list(rows)


def spans_of(features, start_logits, end_logits, contexts):
    """Question id -> text of the best span of at most 30 tokens."""
    best = {}
    for feature, start, end in zip(features, start_logits, end_logits, strict=True):
        places = feature["offset_mapping"]
        for first, place in enumerate(places):
            for last in range(first, min(first + 30, len(places))):
                if place is None or places[last] is None:
                    continue
                score = float(start[first] + end[last])
                text = contexts[feature["example_id"]][place[0] : places[last][1]]
                best[feature["example_id"]] = max(
                    best.get(feature["example_id"], (score, text)), (score, text)
                )
    return {name: text for name, (_, text) in best.items()}


@pytest.mark.sample(3)
@pytest.mark.parametrize("collate", ["none", "padding to 8", "default"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("return_dict", [True, False])
def test_evaluate_and_predict_give_what_a_trainer_gives(
    world, data, examples, tokenizer, collate, labelled, return_dict
):
    config, _ = data
    padding = "max_length" if collate == "default" else False
    features = features_of(examples, tokenizer, labelled=labelled, padding=padding)
    collators = {
        "none": None,
        "padding to 8": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        "default": default_data_collator,
    }
    found = []
    for kind, own in ((Trainer, {}), (KDTrainer, {"kd": config})):
        seen = []
        trainer = kind(
            model=student(world, return_dict=return_dict),
            args=arguments(world, include_for_metrics=["inputs"]),
            processing_class=tokenizer,
            data_collator=collators[collate],
            eval_dataset=features,
            compute_metrics=lambda given, seen=seen: seen.append(given) or {"rows": 1.0},
            **own,
        )
        evaluated = trainer.evaluate()
        predicted = trainer.predict(features, metric_key_prefix="best")
        keys = {k for k in (evaluated | predicted.metrics) if not k.endswith(("_second", "time"))}
        given = [(each.predictions, each.inputs, each.label_ids) for each in seen]
        found.append((keys, (predicted.predictions, None, predicted.label_ids), *given))
    (keys, *ours), (expected_keys, *expected) = found[1], found[0]
    assert keys == expected_keys
    assert len(ours) == len(expected) == (3 if labelled else 1)
    for actual, wanted in zip(ours, expected, strict=True):
        for one, other in zip(actual, wanted, strict=True):
            assert type(one) is type(other)
            assert isinstance(one, tuple) is isinstance(other, tuple)
            if one is not None:
                np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loss_without_a_teacher_is_that_of_the_answers(world, data):
    config, rows = data
    plain = [{k: v for k, v in row.items() if not k.startswith("teacher")} for row in rows]
    trainer = KDTrainer(
        model=student(world),
        args=arguments(world, per_device_eval_batch_size=12),
        train_dataset=rows,
        eval_dataset={"plain": plain, "taught": rows},
        kd=config,
    )
    found = trainer.evaluate()
    batch = KDCollator(rows.pad_token_id)(list(rows))
    teacher, start, end = (
        batch.pop(each) for each in ("teacher_logits", "start_positions", "end_positions")
    )
    outputs = trainer.model(**batch)
    for name, weight in (("plain", 0.0), ("taught", config.loss.distillation_loss_weight)):
        expected = fused_kd_loss(
            (outputs.start_logits, outputs.end_logits),
            teacher,
            start,
            end,
            temperature=config.loss.temperature,
            distillation_loss_weight=weight,
            mask=batch["attention_mask"].bool(),
        )
        assert found[f"eval_{name}_loss"] == pytest.approx(expected.item(), rel=1e-5)


class QuestionAnsweringTrainer(Trainer):
    """Scores answers as trainer_qa.py of the examples does: after the loop, outside of it."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(
                self.get_eval_dataloader(features),
                description="Evaluation",
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self.compute_metrics = compute_metrics
        given = self.post_process_function(self.eval_examples, features, output.predictions)
        figures = {f"{metric_key_prefix}_{k}": v for k, v in compute_metrics(given).items()}
        self.log(figures)
        return figures | output.metrics


class KDQuestionAnsweringTrainer(KDMixin, QuestionAnsweringTrainer):
    pass


def test_a_trainer_of_answers_keeps_its_best_checkpoint(world, data, examples, tokenizer):
    config, rows = data
    contexts = {each.id: each.context for each in examples}

    def post_process(asked, features, predictions):
        texts = spans_of(features, *predictions, contexts)
        return EvalPrediction(predictions=texts, label_ids=asked)

    def figures(given):
        return metrics.score(metrics.gold_answers(given.label_ids), given.predictions)

    trainer = KDQuestionAnsweringTrainer(
        model=student(world),
        args=arguments(
            world,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="f1",
            learning_rate=2.0,
        ),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows,
        eval_dataset=features_of(examples, tokenizer, labelled=False, padding=False),
        eval_examples=examples,
        post_process_function=post_process,
        compute_metrics=figures,
        kd=config,
    )
    trainer.train()
    logged = [line["eval_f1"] for line in trainer.state.log_history if "eval_f1" in line]
    assert len(set(logged)) > 1
    assert trainer.state.best_metric == max(logged) > 0
    assert trainer.evaluate()["eval_f1"] == max(logged)
