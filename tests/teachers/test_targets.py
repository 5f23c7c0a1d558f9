"""A teacher that changes between its key and its pass."""

import pytest

from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import WindowSettings
from kdfast.data.prepare import prepare_windows
from kdfast.models.load import load_reader
from kdfast.teachers import cache, targets
from tests import corpora, readers


def test_a_teacher_replaced_before_its_pass_is_refused(tmp_path):
    """Its logits would stand in the cache under the key of the earlier one."""
    folder = readers.save(tmp_path / "teacher", seed=1)
    windows = prepare_windows(
        corpora.write(tmp_path / "train.json"),
        load_reader(folder, "--teacher").tokenizer,
        WindowSettings(200),
        cache_dir=tmp_path / "cache",
    )
    source = cache.Source(cache.weights_key(tmp_path / "teacher"), "", windows.key, "no")
    teacher = targets.Teacher(folder, source, windows, 200)
    with targets.loaded_pass(teacher, Run(), "auto"):
        pass
    readers.save(tmp_path / "teacher", seed=2)
    with (
        pytest.raises(UserError, match="was replaced while it was loaded"),
        targets.loaded_pass(teacher, Run(), "auto"),
    ):
        pass
