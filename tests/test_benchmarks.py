"""What benchmarks/ makes of a GPU's figures. The benchmarks have gates of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import card_table, gpu, quality, records
from tests import corpora, readers
from tests.examples import ROOT

MACHINE = {
    "card": "Tesla V100-SXM2-16GB",
    "capability": "sm_70",
    "memory": "16.0 GB",
    "commit": "abc",
    **dict.fromkeys(("driver", "CUDA", "torch", "triton", "transformers", "command", "date"), "1"),
}
ROW = {
    "model": "roberta-base",
    "candidate": "kdfast, packed",
    "precision": "fp16",
    "batch": 80,
    "windows_per_second": 412.3,
    "tokens_per_second": 78000.0,
    "padding": 0.0,
    "share_of_peak": 0.5,
    "share_of_data_sheet": 0.33,
    "peak_memory": 3 * 2**32,
}


def test_speed_md_holds_the_figures_of_all_records():
    text = gpu.SPEED.read_text(encoding="utf-8")
    assert gpu.BEGIN in text
    assert text == gpu.document(text, gpu.load()), "write it again: see docs/speed.md"


def test_a_cards_figures_stand_next_to_its_paper(tmp_path):
    slower = {**ROW, "candidate": "padded to 384", "tokens_per_second": 39000.0}
    records.add_to_card(MACHINE, {"train_step": [ROW, slower]}, tmp_path)
    records.add_to_card(MACHINE, {"tests": {"passed": 7, "skipped": 1, "failed": ["a"]}}, tmp_path)
    [card] = gpu.load(tmp_path)
    text = gpu.document(f"before{gpu.BEGIN}old{gpu.END}after", [card])
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert "| V100 | packed | 406 | 412 |" in text
    assert "| H100 | packed | 1,920 |  |" in text
    row = "| roberta-base, fp16, 80 | padded to 384 | 412.3 | 0.0 % | 50.0 % | 33.0 % | 12.00 GB |"
    assert f"{row} 2.00 |" in text
    assert "7 passed, 1 failed, 1 skipped" in text
    assert "Nothing has been measured" not in text
    assert gpu.document(text, [card]) == text


def test_a_record_is_of_one_commit(tmp_path):
    records.add_to_card(MACHINE, {"train_step": [ROW]}, tmp_path)
    records.add_to_card(MACHINE | {"commit": "def"}, {"kd_loss": []}, tmp_path)
    [card] = gpu.load(tmp_path)
    assert "train_step" not in card and card["machine"]["commit"] == "def"


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", None),
    ],
)
def test_a_cards_data_sheet(name, teraflops):
    assert card_table.data_sheet(name) == (teraflops and teraflops * 1e12)


def test_make_gpu_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr


def test_the_table_of_students():
    gold = [np.array([[0.0, 20.0], [0.0, 40.0]]), np.array([[100.0, 100.0], [0.0, 0.0]])]
    taught = [each + 10 for each in gold]
    scores = {"": [np.array([[100.0, 100.0], [0.0, 50.0]])], quality.GOLD: gold, "more": taught}
    lines = quality.table(scores, [1, 2])
    assert lines[0] == "2 questions; the teacher has EM 50.0 / F1 75.0."
    assert lines[-2] == "| gold answers alone | 0.0 / 30.0 | 50.0 / 50.0 |  |"
    assert lines[-1] == "| more | 10.0 / 40.0 | 60.0 / 60.0 | +10.0 [10.0, 10.0] |"


@pytest.mark.program
@pytest.mark.slow
def test_a_benchmark_of_students_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "ROWS", {quality.GOLD: quality.ROWS[quality.GOLD]})
    encoder = readers.save(tmp_path / "encoder", "bert", layers=3, head=False)
    flags = [encoder, str(tmp_path / "runs"), "--train_file", corpora.write(tmp_path / "t.json")]
    flags += ["--steps", "2", "--teacher_steps", "2", "--flags=", "--student_layers", "0,2"]
    quality.main([*flags, "--seeds", "1", "--row", "taught", "--teacher {teacher}"])
    again = [*flags, "--seeds", "1", "2", "--row", "taught", "--teacher {teacher}"]
    kept = (tmp_path / "runs" / "student-1-1" / "run.json").read_text()
    capsys.readouterr()
    quality.main(again)
    lines = capsys.readouterr().out.splitlines()
    [head] = [line for line in lines if line.startswith("| the student learns")]
    assert head.count("seed") == 2 and any(line.startswith("| taught | ") for line in lines)
    assert (tmp_path / "runs" / "student-1-1" / "run.json").read_text() == kept
    asked = json.loads((tmp_path / "runs" / "held_out.json").read_text())["data"]
    trained = json.loads((tmp_path / "runs" / "train.json").read_text())["data"]
    assert [each["title"] for each in asked] == ["T8", "T9", "T10", "T11"] and len(trained) == 8
    with pytest.raises(AssertionError, match="is of other flags"):
        quality.main([*again, "--steps", "3"])
