"""Settings in groups: given flat, read by group, written flat."""

import pytest

from kdfast.common.errors import UserError
from kdfast.config import GROUPS, SETTINGS, TrainConfig
from kdfast.config_checks import check

GIVEN = {"teacher": ["t"], "student": "s", "train_file": "f", "output_dir": "o"}


def test_every_setting_is_in_one_group_and_survives_the_way_through_a_file():
    config = TrainConfig(**GIVEN, temperature=2.0, overwrite=True, max_steps=0, warmup_ratio=0)
    assert set(config.flat()) == set(SETTINGS) and len(GROUPS) == len(set(SETTINGS.values()))
    assert TrainConfig(**config.flat()) == config
    assert config.loss.temperature == 2.0 and config.optimization.warmup_ratio == 0
    assert config.flat()["validation_file"] is None and config.flat()["max_steps"] == 0
    assert config.flat()["overwrite"] is True and config.flat()["report"] is False


def test_an_empty_text_is_kept_where_it_means_something():
    config = TrainConfig(cache_dir="", student="")
    assert config.flat()["cache_dir"] == "" == config.replace(overwrite=True).data.cache_dir
    assert config.flat()["student"] is None


def test_none_stands_for_the_default():
    assert TrainConfig(temperature=None, teacher=None) == TrainConfig()
    config = TrainConfig(temperature=3.0)
    assert config.replace(temperature=None).loss.temperature == TrainConfig().loss.temperature


def test_an_unknown_name_is_refused():
    with pytest.raises(TypeError, match="no setting temprature"):
        TrainConfig(temprature=1.0)


def test_an_empty_teacher_is_not_given():
    assert TrainConfig(teacher="").model.teacher == []
    with pytest.raises(UserError, match="--teacher is given an empty name"):
        check(TrainConfig(**GIVEN | {"teacher": ["t", ""]}))
