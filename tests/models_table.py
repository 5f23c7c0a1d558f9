"""The table of docs/models.md: each cell says what a small model of the type has just done.

`python -m tests.models_table` writes the table there again.
"""

import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from kdfast.common.precision import works_in
from kdfast.common.run import Run
from kdfast.models.packing import PACKS, PackedWindows
from kdfast.models.span_model import SpanModel
from kdfast.models.structure import layer_stack
from kdfast.teachers.layers import LayerLosses
from tests import published, readers
from tests.gpu.card import PretendedCard
from tests.gpu.trials import Small
from tests.pretended.device import pretended
from tests.pretended.process import run_pretended
from tests.programs import World, log_of
from tests.steppers import Steps

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def names_of(model_type: str) -> list[str]:
    """The published models of that type, as tests.published names them."""
    return [name for name, each in published.MODELS.items() if each.model_type == model_type]


@cache
def trained_and_taught(name: str, precision: str) -> bool:
    """Whether small models like `name` learn for two steps and teach; False: it is refused.

    Teacher and student are both like `name`. Raises AssertionError where either does not work,
    or where the precision is refused against the table of kdfast.common.precision.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        # Neither asks for the type of the model, and both take longer than the steps.
        mock.patch("kdfast.train.write_card"),
        mock.patch("kdfast.training.results.matmul_rate", return_value=1e12),
    ):
        world = World(Path(folder))
        teacher = readers.save(world.path / "its teacher", name, seed=1)
        student = readers.save(world.path / "its student", name, seed=2)
        models = {"teacher": teacher, "student": student, "mixed_precision": precision}
        status = world.run(max_steps=2, train_batch_size=4, validation_file=None, **models)
        if not works_in(published.MODELS[name].model_type, precision):
            assert status == 2, f"{name} ended with {status} in {precision}, and is to be refused"
            return False
        assert status == 0, f"{name} ended with {status} in {precision}"
        _check_steps(log_of(world.output), Path(student), world.output)
        record = json.loads((world.output / "run.json").read_text())
        (header,) = world.path.joinpath("cache").rglob(f"{record['teacher_cache']}/header.json")
        assert json.loads(header.read_text())["precision"] == precision == record["precision"]
    return True


def _check_steps(steps: list[dict], before: Path, after: Path) -> None:
    """The two steps had finite losses, of teacher and gold answers, and moved every matrix."""
    parts = torch.tensor([[step["loss"], step["soft"], step["hard"]] for step in steps])
    assert parts.shape == (2, 3) and parts.isfinite().all() and (parts > 0).all()
    old, new = (load_file(each / "model.safetensors") for each in (before, after))
    still = [key for key, value in old.items() if value.dim() > 1 and value.equal(new[key])]
    assert not still, f"the steps have not changed {still}"


def _does(precision: str) -> Callable[[str], str]:
    def cell(model_type: str) -> str:
        done = {trained_and_taught(name, precision) for name in names_of(model_type)}
        assert len(done) == 1
        return "yes" if done.pop() else "no"

    return cell


def _packs(model_type: str) -> str:
    """Whether packed windows have the logits of padded ones, to 1e-10 in fp64."""
    lengths = np.array([17, 40, 9])
    packed = PackedWindows.of(lengths, torch.from_numpy(lengths), 40)
    if model_type not in PACKS:
        return "no"
    for name in names_of(model_type):
        reader, _ = readers.make(name)
        model = SpanModel(reader).double()
        ids, mask = readers.ids_of(reader, lengths.tolist())
        with torch.no_grad():
            padded = model(ids, mask)
            model.enable_packing()
            found = model(packed.pack(ids), packed=packed)
        assert (found - padded)[mask].abs().max() < 1e-10, name
    return "yes"


def _layers_stage(model_type: str) -> str:
    """Whether a student's hidden states learn from a teacher of twice its layers, into each layer.

    `embeddings` and what each layer makes of them: of ModernBERT the last after its final norm.
    """
    for name in names_of(model_type):
        student, teacher = (SpanModel(readers.make(name, seed=n, layers=2 * n)[0]) for n in (1, 2))
        ids, mask = readers.ids_of(student.reader)
        LayerLosses(student, teacher, "none", 0)(ids, mask).sum().backward()
        learned = [
            key
            for key, each in student.reader.base_model.named_parameters()
            if each.dim() > 1 and each.grad is not None and each.grad.abs().max() > 0
        ]
        stack = layer_stack(student.reader)
        layers = {0, 1} if stack is not None else {0}  # ALBERT's are one
        found = {int(number) for key in learned for number in re.findall(r"\.(\d+)\.", key)[:1]}
        assert layers <= found, f"{name}: {found} of its layers learn"
    return "yes"


def _compiles(model_type: str) -> str:
    """Whether what torch.compile has traced gives eager mode's logits, in three widths at once.

    It runs as it was traced: to generate code for it would take minutes.
    """
    done = set()
    for name in names_of(model_type):
        model = SpanModel(readers.make(name)[0])
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled, counts = model.compiled(counter), set()
        for lengths in ((24, 16), (40, 32), (56, 48)):
            ids, mask = readers.ids_of(model.reader, lengths)
            torch.testing.assert_close(compiled(ids, mask)[mask], model(ids, mask)[mask])
            counts.add(counter.frame_count)
        done.add("yes" if len(counts) == 1 else "again for other widths")
    (cell,) = done
    return cell


def _host_reads(model_type: str) -> str:
    """How often the host waits for the pretended device in a micro-batch: by difference."""
    found = {run_pretended(_reads_in_a_micro_batch, name) for name in names_of(model_type)}
    return " or ".join(map(str, sorted(found)))


def _reads_in_a_micro_batch(name: str) -> int:
    counts = []
    with tempfile.TemporaryDirectory() as folder, pretended() as device:
        card = PretendedCard(device)
        small = Small(card, Path(folder), name)
        everything = np.arange(len(small.windows))
        for parts in (1, 4):
            training = small.training(Run(card.device), gradient_accumulation_steps=parts)
            step = Steps(training)
            step(0, everything)
            device.clear()
            assert step(1, everything).micro_batches == parts
            counts.append(sum(device.reads.values()))
    assert counts[0] >= 1
    return (counts[1] - counts[0]) // 3


# Column -> what its cell says of a type.
COLUMNS: dict[str, Callable[[str], str]] = {
    "configurations": lambda model_type: ", ".join(names_of(model_type)),
    "trains": _does("no"),
    "teaches": _does("no"),
    "fp16": _does("fp16"),
    "bf16": _does("bf16"),
    "layers stage": _layers_stage,
    "packs": _packs,
    "compiles": _compiles,
    "host reads": _host_reads,
}


def in_document() -> dict[str, dict[str, str]]:
    """The table in the document: type -> column -> cell."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *rows = rows
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def write() -> None:
    """Compute the table, and put it in the place of the document's."""
    lines = ["| type | " + " | ".join(COLUMNS) + " |", "|:--" * (len(COLUMNS) + 1) + "|"]
    for each in published.TYPES:
        lines.append(f"| {each} | " + " | ".join(cell(each) for cell in COLUMNS.values()) + " |")
    table = "\n".join(lines)
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(re.sub(r"(^\|.*\n?)+", lambda _: table + "\n", text, flags=re.M))


if __name__ == "__main__":
    from tests import models_table  # by its name, which another process finds

    models_table.write()
