"""Features that several processes make: the same files, counts and messages as of one."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.data import windowing
from kdfast.data.cache import HEADER, cache_folder
from kdfast.data.chunks import ChunkFolder, Shard
from kdfast.data.features import Features
from kdfast.data.prepare import prepare_shard, prepare_windows
from kdfast.data.tally import Tally
from tests import forks
from tests.corpora import shared
from tests.data.made_up import SMALL, random_examples
from tests.small_tokenizers import of_family


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 8)


def made_up(folder):
    """JSONL in which a context comes back far away, and every kind of fault comes several times."""
    examples = random_examples(7) + [replace(e, id=f"{e.id}-again") for e in random_examples(7, 9)]
    rows = [
        {
            "id": e.id,
            "question": e.question,
            "context": e.context,
            "answers": [{"text": a.text, "answer_start": a.start} for a in e.answers],
        }
        for e in examples
    ]
    for row in rows[::11]:
        row["answers"] = [{"text": "never said", "answer_start": 3}]
    for row in rows[1::13]:
        del row["answers"]
    for row in rows[2::17]:
        row["question"] = "who " * 40
    for row in rows[3::19]:
        row["id"] = "same"
    for number in range(0, 60, 5):
        rows.insert(number, {"id": f"bad{number}", "question": "who?"})
    path = folder / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return made_up(tmp_path)


def files_of(cache_dir):
    """Name -> bytes of everything below a folder, but for empty locks."""
    paths = [path for path in cache_dir.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(cache_dir)): path.read_bytes()
        for path in paths
        if path.suffix != ".lock"
    }


def alone(folder, source, settings=SMALL):
    """The files that one process makes."""
    prepare_windows(source, of_family("roberta"), settings, cache_dir=folder / "alone")
    return files_of(folder / "alone")


def of_ranks(count, folder, source, settings=SMALL):
    """The files that so many ranks make."""
    folder = folder / str(count)

    def rank(number):
        with Ranks.join() as ranks:
            windows = prepare_windows(
                source, of_family("roberta"), settings, cache_dir=folder, ranks=ranks
            )
            return windows.notes()

    notes = forks.run(count, rank)
    assert notes == notes[:1] * count
    return files_of(folder)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_makes_the_same_files(tmp_path, source, count):
    files = alone(tmp_path, source)
    (header,) = (json.loads(text) for name, text in files.items() if name.endswith(HEADER))
    met = {what for what, many in header["counts"].items() if many > 3}
    assert met >= {"no_context", "absent", "same_id", "unlabelled", "truncated_questions"}
    assert header["counts"]["questions"] > 10 * 8
    assert {len(header["first"][what]) for what in met & header["first"].keys()} == {3}
    assert of_ranks(count, tmp_path, source) == files


def test_so_on_real_data(tmp_path, monkeypatch):
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 50)
    source = str(shared("squad2_dev.json"))
    files = alone(tmp_path, source, replace(SMALL, max_seq_length=384, doc_stride=128))
    assert len(files) == 21
    for count in (2, 3):
        assert (
            of_ranks(count, tmp_path, source, replace(SMALL, max_seq_length=384, doc_stride=128))
            == files
        )


@pytest.fixture
def shards(tmp_path, source):
    """shards(text): makes a share, as --shard names it, in the folder `shared`; its chunks."""

    class Shards:
        cache = tmp_path / "shared"
        features = Features.of(source, of_family("roberta"), SMALL, None)
        chunks = ChunkFolder.of(cache_folder(cache, features.key))

        def __call__(self, text):
            number, count = map(int, text.split("/"))
            features = Features.of(source, of_family("roberta"), SMALL, None)
            return prepare_shard(self.cache, features, Shard(number, count), Ranks())

        def names(self):
            return sorted(path.name for path in self.chunks.path.glob("*.npz"))

    return Shards()


def test_shares_made_in_any_order_are_joined_by_the_last(tmp_path, source, shards):
    files = alone(tmp_path, source)
    assert shards.chunks.missing_shards() is None
    assert shards("2/3") is None
    assert shards.chunks.missing_shards() == ["0/3", "1/3"]
    assert shards("0/3") is None
    before = {path: path.stat().st_mtime_ns for path in shards.chunks.path.glob("*.npz")}
    assert shards("0/3") is None  # started twice: it makes nothing
    assert before == {path: path.stat().st_mtime_ns for path in shards.chunks.path.glob("*.npz")}
    windows = shards("1/3")
    assert files_of(shards.cache) == files
    assert len(shards("1/3")) == len(windows)


def test_shares_of_another_number_go_together(tmp_path, source, shards):
    files = alone(tmp_path, source)
    assert shards("1/2") is None and shards("0/4") is None
    assert shards.chunks.missing_shards() == ["2/4"]
    assert shards("2/4") is not None
    assert files_of(shards.cache) == files


def test_who_trains_makes_what_is_missing(tmp_path, source, shards, monkeypatch):
    files = alone(tmp_path, source)
    shards("1/2")
    made = []
    save = ChunkFolder.save
    monkeypatch.setattr(
        ChunkFolder,
        "save",
        lambda self, number, chunk: (made.append(number), save(self, number, chunk)),
    )
    prepare_windows(source, of_family("roberta"), SMALL, cache_dir=shards.cache)
    assert made and all(number % 2 == 0 for number in made)
    assert files_of(shards.cache) == files


@pytest.mark.parametrize(
    "place",
    [(Features, "encode"), (ChunkFolder, "save"), (ChunkFolder, "finish")],
    ids=lambda place: place[1],
)
@pytest.mark.parametrize("share", ["0/1", "1/2"])
def test_another_process_joins_the_shares_meanwhile(
    tmp_path, source, shards, monkeypatch, place, share
):
    files = alone(tmp_path, source)
    shards("0/2")
    owner, name = place
    function, met = getattr(owner, name), []

    def wrapped(*arguments):
        met.append(name)
        if len(met) == 1:
            prepare_windows(source, of_family("roberta"), SMALL, cache_dir=shards.cache)
        return function(*arguments)

    monkeypatch.setattr(owner, name, wrapped)
    assert shards(share) is not None and met
    assert files_of(shards.cache) == files
    assert not shards.chunks.path.exists()


def test_shares_that_are_joined_while_they_are_counted(shards, monkeypatch):
    shards("0/2")
    missing = ChunkFolder.missing

    def then_joined(self):
        found = missing(self)
        shutil.rmtree(self.path)
        return found

    monkeypatch.setattr(ChunkFolder, "missing", then_joined)
    assert shards.chunks.missing_shards() == ["1/2"]


def test_a_killed_share_leaves_whole_chunks_and_goes_on(tmp_path, source, shards, monkeypatch):
    files = alone(tmp_path, source)
    replace_, done = os.replace, []

    class Killed(BaseException):
        pass

    def killed(*paths):
        if len(done) == 3:
            raise Killed
        done.append(paths)
        replace_(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            shards("0/2")
    assert len(shards.names()) == 3 and shards.chunks.missing_shards() is None
    assert shards("1/2") is None
    assert shards.chunks.missing_shards() == ["0/2"]
    assert shards("0/2") is not None
    assert files_of(shards.cache) == files


def test_a_fault_in_the_source_is_the_same_for_all(tmp_path, source):
    lines = Path(source).read_text().splitlines()
    lines[70] = lines[70][:-5]
    Path(source).write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 71") as caught:
        prepare_windows(source, of_family("roberta"), SMALL, cache_dir=tmp_path / "alone")
    features = Features.of(source, of_family("roberta"), SMALL, None)
    for number in range(2):
        with pytest.raises(UserError) as of_share:
            prepare_shard(tmp_path / "shared", features, Shard(number, 2), Ranks())
        assert str(of_share.value) == str(caught.value)

    def rank(number):
        try:
            with Ranks.join() as ranks:
                prepare_windows(
                    source, of_family("roberta"), SMALL, cache_dir=tmp_path / "ranks", ranks=ranks
                )
        except UserError as error:
            return str(error)

    assert forks.run(2, rank) == [str(caught.value)] * 2
    assert not cache_folder(tmp_path / "ranks", features.key).is_dir()


def test_a_rank_that_cannot_write_ends_all(tmp_path, source, monkeypatch):
    save = ChunkFolder.save

    def rank(number):
        def full(self, *arguments):
            if number == 1:
                raise OSError(28, "No space left on device")
            save(self, *arguments)

        monkeypatch.setattr(ChunkFolder, "save", full)
        try:
            with Ranks.join() as ranks:
                prepare_windows(
                    source, of_family("roberta"), SMALL, cache_dir=tmp_path / "ranks", ranks=ranks
                )
        except UserError as error:
            return str(error)

    first, second = forks.run(2, rank)
    assert second.startswith(f"--cache_dir {tmp_path}") and "No space left on device" in second
    assert first.startswith("Rank 0 stops, because rank 1 failed: --cache_dir")


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "other cut"])
def test_a_damaged_chunk_is_named(tmp_path, shards, monkeypatch, damage):
    shards("0/2")
    path = shards.chunks.file(2)
    content = path.read_bytes()
    if damage == "other cut":
        monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 9)
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"short": content[:-9], "flipped": flipped, "empty": b""}[damage])
    why = "made by another version" if damage == "other cut" else "a damaged part of features"
    with pytest.raises(UserError, match=why) as caught:
        shards("1/2")
    assert damage == "other cut" or str(path) in str(caught.value)


def test_shares_may_end_at_the_same_time(tmp_path):
    chunks = ChunkFolder(tmp_path)

    def rank(number):
        for _ in range(50):
            chunks.finish(7, Tally({"read": 9}), 4)

    assert forks.run(4, rank) == [None] * 4
    assert chunks.missing() == list(range(7))
    assert [path.name for path in tmp_path.iterdir()] == ["source.npz"]


def test_a_share_of_a_share_is_a_share():
    whole = set(range(40))
    parts = [
        {number for number in whole if Shard(i, 3).split(j, 2).has(number)}
        for i in range(3)
        for j in range(2)
    ]
    assert sorted(np.concatenate([sorted(part) for part in parts])) == sorted(whole)
    assert all(Shard(1, 3).has(number) for number in whole if Shard(1, 3).split(1, 2).has(number))
