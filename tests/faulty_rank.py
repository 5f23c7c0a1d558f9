"""kdfast.train as torchrun starts it, with one rank that stops or is killed after a step.

    python -m torch.distributed.run … -m tests.faulty_rank FAULT RANK STEP LIMIT FLAGS

FAULT: the name of a signal that rank RANK sends itself after step STEP of a first start. LIMIT:
seconds in place of heartbeat.LIMIT. FLAGS: those of kdfast.train.
"""

import os
import signal
import sys

from kdfast import train
from kdfast.common import heartbeat
from kdfast.training.results import Results


def main() -> int:
    fault, rank, step, limit, *flags = sys.argv[1:]
    heartbeat.LIMIT, heartbeat.POLL = float(limit), float(limit) / 20
    log_step = Results.log_step

    def faulty(self, report, indices):
        log_step(self, report, indices)
        ranks = self.run.ranks
        if (ranks.rank, report.step, ranks.restarts) == (int(rank), int(step), 0):
            print(f"pid {os.getpid()}", flush=True)
            os.kill(os.getpid(), signal.Signals[fault])

    Results.log_step = faulty
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
