"""A long run of a tiny model: memory and open files stay flat."""

import os
from pathlib import Path

from kdfast.training.results import Results

STEPS = (300, 4000)
SAVES = 5
# What a run may grow by between its first third and its end. A leak of one micro-batch's arrays,
# 10 kB, would be 8 MB in the short run; the allocator's own unrest is 1 MB or 2.
GROWTH = 4 * 2**20


def test_memory_and_open_files_stay_flat(world, monkeypatch, long):
    seen = []
    log_step = Results.log_step

    def watched(self, *arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        return log_step(self, *arguments)

    monkeypatch.setattr(Results, "log_step", watched)
    steps = STEPS[long]
    every = steps // SAVES
    flags = {"max_steps": steps, "save_steps": every, "eval_steps": every, "learning_rate": 1e-4}
    assert world.run(**flags, report_to="tensorboard", max_tokens_per_micro_batch=250) == 0
    memory, handles = zip(*seen, strict=True)
    third = steps // 3
    assert max(handles[third:]) <= max(handles[:third])
    print([round(each / 2**20, 1) for each in memory[:: steps // 20]])
    assert max(memory[third:]) - max(memory[:third]) < GROWTH
