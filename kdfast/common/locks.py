"""Lock files: empty files that a process locks for as long as it writes what they stand for.

They are neither followed, where they are links, nor ever written.
"""

import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import lock_descriptor

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.progress import print_line

# NFS without its lock service, Lustre mounted without -o flock, some of FUSE.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# Both are absent on Windows. Without the second, a pipe made after the look would be waited for.
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, once no other process has it.

    Raises UserError where it is no plain file, and OSError where it cannot be opened.
    """
    with heartbeat.waiting():
        while (handle := _take(path)) is None:  # it may be of another run, which may take hours
            heartbeat.still_waiting()
            time.sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, and delete it at the end; yields False where another holds it.

    Raises as `lock`.
    """
    handle = _take(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with suppress(OSError):  # Windows deletes no open file: an empty one stays
                path.unlink()
            os.close(handle)


def _take(path: Path) -> int | None:
    """The handle of the lock file, which is now locked; None where another process has it."""
    while True:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"Lock file {path} is not a plain file: remove it.")
        handle = os.open(path, FLAGS, 0o666)
        try:
            if not _try_to_lock(handle, path):
                os.close(handle)
                return None
            # Its last holder may have deleted it meanwhile, so that others lock a new one.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), os.fstat(handle)):
                    return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _try_to_lock(handle: int, path: Path) -> bool:
    """Lock the open file. False where another process has it, True where no locks exist."""
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from error
        _say_unprotected(path.parent, error.strerror)
        return True


@cache  # once for each folder
def _say_unprotected(folder: Path, why: str) -> None:
    print_line(
        f"note: {folder} cannot be locked ({why}): start nothing else that writes there before "
        "this has ended, as nothing would stop it.",
        sys.stderr,
    )
