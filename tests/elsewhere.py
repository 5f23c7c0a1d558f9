"""A stand-in for macOS and Windows: python -m tests.elsewhere PLATFORM READER.

Libraries are loaded before it is pretended, so that it says nothing of them. It shows which names
of Linux kdfast needs, and nothing of how the other systems behave.
"""

import os
import signal
import sys

import datasets  # noqa: F401
import huggingface_hub  # noqa: F401
import psutil  # noqa: F401
import torch
import torch.distributed as dist
from transformers import (  # noqa: F401
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.hf_argparser import HfArgumentParser  # noqa: F401

POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "triton"}
CALLS = ("fork", "O_NONBLOCK", "O_NOFOLLOW", "uname", "mkfifo", "geteuid", "sched_getaffinity")
SIGNALS = ("SIGHUP", "SIGKILL", "SIGPIPE", "SIGALRM", "SIGUSR1", "SIGCHLD", "SIGQUIT")


class Absent:
    """Finds none of the modules that the other system lacks."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in POSIX:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def pretend(platform):
    for name in [each for each in sys.modules if each.partition(".")[0] in POSIX]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent())
    del os.posix_fallocate
    if platform == "win32":
        for owner, names in ((os, CALLS), (signal, SIGNALS)):
            for name in names:
                delattr(owner, name)
    for name in ("Store", "PrefixStore", "DistError", "DistBackendError", "DistNetworkError"):
        delattr(dist, name)  # of a torch that is built without it
    sys.platform = platform


def main(platform, folder):
    pretend(platform)
    import kdfast

    z, at = torch.zeros(2, 5, 2, requires_grad=True), torch.tensor([1, 2])
    kdfast.fused_kd_loss(z, torch.ones(2, 5, 2), at, at).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    assert kdfast.Reader(folder)(question="who?", context="Ada wrote it.")["answer"]
    from kdfast import predict, prepare, train

    asked = ["--model", folder, "--question", "who?", "--context", "Ada wrote it."]
    assert predict.main(asked) == 0
    asked = ["--student", folder, "--train_file", "none.json"]
    for program in train, prepare:
        assert program.main(asked) == 2


if __name__ == "__main__":
    main(*sys.argv[1:])
