"""What benchmarks/ makes of a GPU's figures. The benchmarks have gates of their own."""

import os
import subprocess
import sys

import pytest

from benchmarks import card_table, gpu, records
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
