"""A source that changes while its windows are made."""

from pathlib import Path

import pytest

from kdfast.common.errors import UserError
from kdfast.data import features
from kdfast.data.chunks import WHOLE, ChunkFolder
from kdfast.data.prepare import prepare_windows
from tests.data.made_up import SMALL, random_examples, write_source
from tests.small_tokenizers import of_family


def test_a_source_replaced_while_it_is_read_leaves_no_cache(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source.json", random_examples(7))
    other = Path(write_source(tmp_path / "other.json", random_examples(8))).read_bytes()
    tokenizer, first = of_family("roberta"), Path(source).read_bytes()
    read = features.iter_examples

    def replaced(*args, **options):
        Path(source).write_bytes(other)
        return read(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(features, "iter_examples", replaced)
        with pytest.raises(UserError, match="was changed while it was read"):
            prepare_windows(source, tokenizer, SMALL, cache_dir=tmp_path)
        Path(source).write_bytes(first)
        made = features.Features.of(source, tokenizer, SMALL, None)
        chunks = ChunkFolder.of(tmp_path / "features" / made.key)
        with pytest.raises(UserError, match="was changed while it was read"):
            made.encode(chunks, WHOLE, None)
    assert not chunks.path.exists()
    assert [each.suffix for each in (tmp_path / "features").iterdir()] == [".lock"]
