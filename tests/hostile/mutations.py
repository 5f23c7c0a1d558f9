"""Hypothesis strategies that damage JSON values and bytes as an attacker, or a disk, would."""

import copy
import json
import struct
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

AWKWARD = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**15,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../../escape",
    "/escape",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"": None},
)
VALUES = st.one_of(
    st.sampled_from(AWKWARD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def examples(count: int) -> settings:
    """So many examples of a test, times what --hypothesis-profile many asks for."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100))


def places(value, path=()):
    """Paths to every part of a JSON value."""
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    ):
        yield from places(value[key], (*path, key))


@st.composite
def damaged_json(draw, value):
    """The value after one to three of its parts were replaced, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        deed = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if deed == "replace":
            holder[path[-1]] = copy.deepcopy(draw(VALUES))
        elif deed == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
    return value


@st.composite
def damaged_bytes(draw, data):
    """The bytes after some were changed, cut off, put in, or followed by others."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        deed = draw(st.sampled_from(["flip", "flip", "cut", "insert", "zero", "append"]))
        if deed == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif deed == "cut":
            del data[at:]
        elif deed == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif deed == "zero":
            data[at : at + 8] = bytes(len(data[at : at + 8]))
        elif deed == "append":
            data += draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


@st.composite
def damaged_safetensors(draw, data):
    """A safetensors file whose header or bytes were changed; its length field mostly fits."""
    if draw(st.booleans()):
        return draw(damaged_bytes(data))
    size = struct.unpack("<Q", data[:8])[0]
    header = draw(damaged_json(json.loads(data[8 : 8 + size])))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), 10**15, 2**63, 0]))
    return struct.pack("<Q", length) + text + data[8 + size :]


def json_files(value):
    """Bytes of a JSON file that was once `value`."""
    deep = st.integers(1, 200_000).map(lambda n: b"[" * n + b"]" * n)
    return st.one_of(
        damaged_json(value).map(as_bytes),
        damaged_bytes(json.dumps(value).encode()),
        VALUES.map(as_bytes),
        deep,
        deep.map(lambda text: b'{"data": ' + text + b"}"),
    )


def check_sentence(error):
    """A UserError's text is one line that a terminal prints, and not a book."""
    text = str(error)
    assert text and len(text) < 2000 and text.isprintable()


def as_bytes(value) -> bytes:
    # A lone surrogate is written as an escape, which JSON allows.
    return json.dumps(value).encode()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)
