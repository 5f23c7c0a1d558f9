"""The program that prepares, whole and in parts: the same files, and what it says of mistakes."""

import shutil
import sys

import pytest

from kdfast import prepare, train
from kdfast.common.errors import UserError
from kdfast.data import windowing
from kdfast.data.chunks import Shard
from kdfast.teachers import pass_shards, targets, teacher_pass
from tests import corpora, forks, readers
from tests.data.test_chunks import files_of
from tests.programs import log_of

FLAGS = ("teacher", "student", "train_file", "validation_file", "cache_dir", "max_seq_length")


@pytest.fixture
def parts(world, monkeypatch, capfd):
    """Runs the program; caches have several chunks, and passes several micro-batches."""
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 8)
    monkeypatch.setattr(targets, "forward_tokens", lambda *_: 300)

    class Parts:
        path = world.path

        def flags(self, cache, **changes):
            none = {name: None for name in train.TrainConfig().flat() if name not in FLAGS}
            changes = {"teacher": None, "cache_dir": self.path / cache, **changes}
            return world.flags(**{**none, **changes})

        def run(self, cache, **changes):
            assert prepare.main(self.flags(cache, **changes)) == 0
            return capfd.readouterr().out

        def refused(self, cache, **changes):
            """The one line that it says."""
            assert prepare.main(self.flags(cache, **changes)) == 2
            said = capfd.readouterr().err
            assert said.startswith("error: ") and len(said.splitlines()) == 1
            return said

        def files(self, cache):
            return files_of(self.path / cache)

    return Parts()


@pytest.fixture
def whole(parts, world):
    """The files that one process makes."""
    parts.run("whole", teacher=world.teacher)
    return parts.files("whole")


def test_parts_in_any_order_are_what_one_process_makes(parts, world, whole):
    assert sum(name.endswith("SHA256SUMS") for name in whole) == 3
    for number in (2, 0, 1):
        said = parts.run("parts", shard=f"{number}/3")
        assert f"part {number}/3 is there" in said
        assert ("all are in" in said) == (number == 1)
    for number in (1, 2, 0):
        said = parts.run("parts", shard=f"{number}/3", teacher=world.teacher)
        assert f"Logits of {world.teacher}: part {number}/3 is there" in said
        assert (f"Logits of {world.teacher}: all" in said) == (number == 0)
    assert parts.files("parts") == whole
    assert "all are in" in parts.run("parts", join=True, teacher=world.teacher)
    assert parts.files("parts") == whole


def test_more_parts_than_micro_batches(parts, world, whole):
    parts.run("parts")
    for number in range(24):
        parts.run("parts", shard=f"{number}/24", teacher=world.teacher)
    assert parts.files("parts") == whole


def test_ranks_share_a_part(parts, world, whole):
    def rank(number, **changes):
        with (parts.path / f"said{number}").open("w") as sys.stdout:
            sys.stderr = sys.stdout
            return prepare.main(parts.flags("parts", **changes))

    for changes in ({}, {"teacher": world.teacher}):
        for part in ("0/2", "1/2"):
            given = {**changes, "shard": part}
            assert forks.run(2, lambda number, given=given: rank(number, **given)) == [0, 0]
    assert parts.files("parts") == whole


class Killed(BaseException):
    pass


def test_a_killed_part_of_the_pass_goes_on(parts, world, whole, monkeypatch):
    parts.run("parts")
    save, saved, ran = teacher_pass.save_progress, [], []

    def killed(*arguments):
        save(*arguments)
        saved.append(len(arguments[2]))
        if len(saved) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
        patch.setattr(teacher_pass, "save_progress", killed)
        with pytest.raises(Killed):
            parts.run("parts", shard="0/2", teacher=world.teacher)
    said = parts.refused("parts", join=True, teacher=world.teacher)
    assert f"The logits of {world.teacher} with" in said and "lack parts 0/2, 1/2" in said
    parts.run("parts", shard="1/2", teacher=world.teacher)
    assert "lack part 0/2:" in parts.refused("parts", join=True, teacher=world.teacher)

    forward = teacher_pass.forward_windows
    monkeypatch.setattr(
        teacher_pass,
        "forward_windows",
        lambda model, windows, batches, *rest: forward(
            model, windows, ran.extend(batches) or batches, *rest
        ),
    )
    # Another budget would cut otherwise: that of the first part holds.
    monkeypatch.setattr(targets, "forward_tokens", lambda *_: 10_000)
    parts.run("parts", shard="0/2", teacher=world.teacher)
    assert ran and sum(saved) == 2
    assert parts.files("parts") == whole


@pytest.fixture
def before(monkeypatch):
    """before(owner, name, act): `act` is called once, before the first call of owner.name."""

    def patch(owner, name, act):
        function, acts = getattr(owner, name), [act]

        def wrapped(*arguments, **more):
            if acts:
                acts.pop()()
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, wrapped)

    return patch


PLACES = [
    (pass_shards.PassShards, "begin"),
    (teacher_pass, "lock"),
    (pass_shards.PassShards, "has_begun"),
    (teacher_pass, "start_folder"),
    (teacher_pass, "_fill"),
    (pass_shards.PassShards, "missing"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_another_process_makes_the_whole_pass_meanwhile(parts, world, whole, before, place):
    parts.run("parts")
    before(*place, lambda: parts.run("parts", teacher=world.teacher))
    said = parts.run("parts", shard="0/2", teacher=world.teacher)
    assert f"Logits of {world.teacher}: all are in" in said
    assert parts.files("parts") == whole


def test_a_part_started_twice(parts, world, whole, before):
    parts.run("parts")
    given = {"shard": "0/1", "teacher": world.teacher}
    before(teacher_pass, "lock", lambda: parts.run("parts", **given))
    assert f"Logits of {world.teacher}: all are in" in parts.run("parts", **given)
    assert parts.files("parts") == whole


def test_parts_that_are_joined_twice(parts, world, whole, before, monkeypatch):
    parts.run("parts")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "join_shards", lambda *_: None)
        parts.run("parts", shard="0/1", teacher=world.teacher)
    given = {"join": True, "teacher": world.teacher}
    before(pass_shards.PassShards, "missing", lambda: parts.run("parts", **given))
    assert "all are in" in parts.run("parts", **given)
    assert parts.files("parts") == whole


@pytest.mark.parametrize("name", ["lock", "_fill"])
def test_ranks_whose_part_is_joined_meanwhile(parts, world, whole, before, name):
    parts.run("parts")
    made, own = (parts.path / cache / "teacher" for cache in ("whole", "parts"))

    def join():
        shutil.copytree(made, own, dirs_exist_ok=True)
        for path in own.glob("*.shards"):
            shutil.rmtree(path)

    def rank(number):
        if number == 0:
            before(teacher_pass, name, join)
        return prepare.main(parts.flags("parts", shard="0/2", teacher=world.teacher))

    assert forks.run(2, rank) == [0, 0]
    assert parts.files("parts") == whole


def no_pass(*arguments):
    raise AssertionError("a model ran")


def test_training_joins_what_is_there_and_runs_no_pass(parts, world, whole, monkeypatch):
    for number in range(2):
        parts.run("cache", shard=f"{number}/2")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "join_shards", lambda *_: None)  # as if both ended at once
        for number in range(2):
            parts.run("cache", shard=f"{number}/2", teacher=world.teacher)
    assert any(".shards/" in name for name in parts.files("cache"))
    with monkeypatch.context() as patch:
        patch.setattr(targets, "load_reader", no_pass)
        assert world.run(max_steps=2) == 0
    assert parts.files("cache") == whole
    assert len(log_of(world.output)) == 3


def test_training_takes_over_what_some_parts_have_done(parts, world, whole, monkeypatch):
    parts.run("cache")
    parts.run("cache", shard="1/2", teacher=world.teacher)
    ran, forward = [], teacher_pass.forward_windows

    def counted(model, windows, batches, *rest):
        ran.extend(batches)
        return forward(model, windows, batches, *rest)

    monkeypatch.setattr(teacher_pass, "forward_windows", counted)
    monkeypatch.setattr(targets, "forward_tokens", lambda *_: 10_000)
    assert world.run(max_steps=2) == 0
    assert parts.files("cache") == whole
    assert len(ran) > 0 and max(map(len, ran)) < 20


def test_a_teacher_with_another_tokenizer(parts, world):
    other = readers.save(world.path / "other", "roberta", seed=3)
    parts.run("one", teacher=other)
    parts.run("parts")
    for number in range(2):
        parts.run("parts", shard=f"{number}/2", teacher=other)
    assert parts.files("parts") == parts.files("one")


def test_parts_of_other_settings_or_another_number_are_refused(parts, world):
    parts.run("parts", shard="0/2")
    assert "lack part 1/2:" in parts.refused("parts", join=True)
    other = parts.refused("parts", join=True, max_seq_length=220)
    assert "with these settings lack all parts" in other
    needed = parts.refused("parts", shard="0/2", teacher=world.teacher)
    assert "lack part 1/2:" in needed and "without --teacher" in needed
    parts.run("parts", shard="1/2")

    parts.run("parts", shard="0/2", teacher=world.teacher)
    said = parts.refused("parts", shard="1/3", teacher=world.teacher)
    assert "--shard 1/3: this pass was begun in 2 parts" in said
    said = parts.refused("parts", join=True, teacher=world.teacher, mixed_precision="bf16")
    assert "--mixed_precision bf16 lack all parts" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3/2", "give 0/2 to 1/2"),
        ("4/4", "give 0/4 to 3/4"),
        ("0/0", "give 0/1"),
        ("1", "such as 0/8"),
        ("-1/4", "such as 0/8"),
        ("a/b", "such as 0/8"),
        ("1/2/3", "such as 0/8"),
        ("٣/٤", "such as 0/8"),
    ],
)
def test_a_part_that_is_none(text, why):
    with pytest.raises(UserError, match="--shard is") as caught:
        prepare.parse_shard(text)
    assert why in str(caught.value)


def test_parts_count_from_0():
    assert prepare.parse_shard("0/4") == Shard(0, 4) and prepare.parse_shard("3/4") == Shard(3, 4)


def test_mistakes(parts, world):
    assert "--shard and --join exclude" in parts.refused("c", shard="0/2", join=True)
    assert "--student is missing" in parts.refused("c", student=None)
    nothing = {"train_file": None, "validation_file": None}
    assert "--train_file is missing" in parts.refused("c", **nothing)
    assert "--train_file is missing" in parts.refused("c", train_file=None, teacher=world.teacher)
    assert "--max_seq_length is 0" in parts.refused("c", max_seq_length=0)


def test_first_come_first_served(tmp_path):
    """Of many tasks that begin a pass at the same time one decides how it is cut."""
    sources = [pass_shards.Source(str(each), "t", "x", "no") for each in range(100)]

    def task(number):
        found = []
        for source in sources:
            shards = pass_shards.PassShards.of(tmp_path, source)
            begun = shards.begin(10, Shard(number, 4), {"max_tokens": number})
            found.append(begun["max_tokens"])
        return found

    first, *others = forks.run(4, task)
    assert others == [first] * 3
    names = {path.name for path in (tmp_path / "teacher").iterdir()}
    assert names == {f"{source.key}.shards" for source in sources}


def test_every_train_file_is_prepared_for_training(parts, world, monkeypatch):
    """With a pass over each; training on both then finds all that it needs."""
    other = corpora.write(world.path / "other.json", 7)
    both = {"train_file": [world.train_file, other], "teacher": world.teacher}
    for teacher in (None, world.teacher):
        for shard in ("0/2", "1/2"):
            parts.run("parts", **both | {"teacher": teacher}, shard=shard)
    parts.run("one", **both)
    assert parts.files("parts") == parts.files("one")
    assert sum(name.startswith("teacher/") for name in parts.files("one")) == 2 * 3
    monkeypatch.setattr(targets, "load_reader", None)
    monkeypatch.setattr(windowing.WindowBuilder, "chunks", None)
    both["train_weights"] = [1, 0.5]
    assert world.run(**both, cache_dir=world.path / "one", output_dir=world.path / "o") == 0
