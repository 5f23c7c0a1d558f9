"""The frame of every program: flags first, then what is heavy to import, then one way to end.

Imports nothing but the standard library at the top, so that `python -m kdfast.PROGRAM` can set up
its signals before torch is loaded.
"""

import errno
import json
import os
import re
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn, TextIO, cast

from kdfast.common.errors import UserError, of_system, printable
from kdfast.common.flag_hints import explain

MISTAKE = 2
# torch's settings of GPU memory: their name today, and the one that earlier releases go by.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process with status 130 and without a traceback, wherever it is.

    For the seconds in which a program is imported. Leaves a SIGINT alone that is ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> NoReturn:
    os._exit(128 + number)


def run(
    parse: Callable[[list[str]], Any],
    work: Callable[[Any], int | None] | str,
    argv: Sequence[str] | None = None,
    *,
    stdout_is_result: bool = False,
) -> int:
    """A program: `parse` the flags, do the `work` with what it returns.

    work: a function, or "module:function", which is imported after the flags have proved good.
    argv: those of the process if None. stdout_is_result: the program ends where standard output
    cannot be written. Else what cannot be written is dropped, and the program goes on.

    Returns the exit status: 0, what `work` returns, 2 for a user's mistake, which is printed as
    one sentence, or 128 + the number of the signal that ended it (SIGPIPE: the output was closed).
    """
    if not os.environ.keys() & set(ALLOCATOR):
        # torch reads it at its first use of a GPU. Micro-batches differ in size, and segments that
        # grow fit them all; blocks of fixed sizes would break the memory into pieces.
        os.environ |= dict.fromkeys(ALLOCATOR, "expandable_segments:True")
    with _streams(stdout_is_result):
        try:
            settings = parse(list(sys.argv[1:] if argv is None else argv))
            _quiet_libraries()
            function = _function(work)
            with _interrupts():
                status = function(settings) or 0
            sys.stdout.flush()
            return status
        except UserError as error:
            if not error.is_repeated:
                print(f"error: {error}", file=sys.stderr)
            return MISTAKE
        except (OSError, MemoryError) as error:
            print(f"error: {of_system(error)}", file=sys.stderr)
            return MISTAKE
        except Unwritable as error:
            if error.errno == errno.EPIPE:  # its reader has enough
                return 128 + 13  # SIGPIPE, which Windows lacks
            print(f"error: standard output cannot be written ({error}).", file=sys.stderr)
            return MISTAKE
        except KeyboardInterrupt as interrupt:
            if str(interrupt):  # a run of training says how it was stopped
                print(interrupt, file=sys.stderr)
            return 128 + getattr(interrupt, "number", signal.SIGINT)


def refuse_windows(program: str) -> None:
    """Raise UserError on Windows, where nobody has tried whether a killed run can go on."""
    if sys.platform == "win32":
        raise UserError(
            f"kdfast.{program} needs Linux or macOS, as what it writes must outlast a kill: run it "
            "in WSL."
        )


def _function(work: Callable[[Any], int | None] | str) -> Callable[[Any], int | None]:
    if not isinstance(work, str):
        return work
    module, _, name = work.partition(":")
    return getattr(import_module(module), name)


class _RaisesUserError:
    """A parser that does not print its usage first when it ends with an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all flags.")


class _PlainParser(_RaisesUserError, ArgumentParser):
    pass


def parser_of(settings: type | list[type], program: str, about: str | None) -> ArgumentParser:
    """The parser of `python -m kdfast.PROGRAM`, whose flags are the fields of `settings`.

    Of several dataclasses each gives a section of --help.
    """
    from transformers.hf_argparser import DataClassType, HfArgumentParser

    class Parser(_RaisesUserError, HfArgumentParser):
        pass

    parser = Parser(
        cast(DataClassType, settings),
        prog=f"python -m kdfast.{program}",
        usage="%(prog)s [flags]",
        description=about,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.default in (None, "", []):  # says "not given", which help need not repeat
            action.help = f"{action.help or ''}%(default).0s"
    return parser


def plain_parser(program: str, about: str | None) -> ArgumentParser:
    """The parser of a program with few flags, which adds them by itself."""
    name = f"python -m kdfast.{program}"
    return _PlainParser(prog=name, description=about, allow_abbrev=False)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """The settings that `argv` gives: a dataclass, or a list of those that the parser was made of.

    Raises UserError for unknown flags and values.
    """
    if hasattr(parser, "parse_args_into_dataclasses"):
        *found, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        settings = found if len(found) > 1 else found[0]
    else:
        settings, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [action.dest for action in parser._actions]
        raise UserError(explain(unknown, known, parser.prog.split()[-1]))
    return settings


def _quiet_libraries() -> None:
    """Let libraries report only errors and, on a terminal, downloads."""
    try:
        from huggingface_hub import constants, utils
        from transformers.utils import logging
    except ImportError:  # the program that needs them says so
        return
    logging.set_verbosity_error()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # else it is the user's decision
        logging.disable_progress_bar()
        if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            utils.enable_progress_bars()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _interrupts() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt again after `end_at_interrupt`."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not _end
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


class Unwritable(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        self.errno = error.errno


class Stream:
    """A text stream whose reader may go away, or whose disk may be full.

    What a terminal would not print is escaped, line ends apart: this closes what libraries print,
    and results. A progress bar may begin with what moves it. So is what the encoding lacks.

    is_result: Unwritable is raised then; else what cannot be written is dropped.
    """

    MOVES = re.compile(r"\r|(?:[\r\n]|\x1b\[A)+\Z")  # as tqdm writes them

    def __init__(self, stream: TextIO, is_result: bool):
        self._stream, self._is_result = stream, is_result

    def write(self, text: str) -> int:
        moves = self.MOVES.match(text)
        start = moves.end() if moves else 0
        shown = text[:start] + printable(text[start:], kept="\n")
        with self._guarded():
            try:
                self._stream.write(shown)
            except UnicodeEncodeError:
                ascii_text = (c if c.isascii() else json.dumps(c)[1:-1] for c in shown)
                self._stream.write("".join(ascii_text))
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_result:
                raise Unwritable(error) from error


@contextmanager
def _streams(stdout_is_result: bool) -> Iterator[None]:
    """Inside, standard output and standard error are Streams."""
    before = sys.stdout, sys.stderr
    # None where the process was started without them.
    out, err = (each or open(os.devnull, "w") for each in before)  # noqa: SIM115
    sys.stdout, sys.stderr = Stream(out, stdout_is_result), Stream(err, False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            try:
                stream.flush()
            except OSError:  # or the interpreter would try again as it ends, and report it
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
