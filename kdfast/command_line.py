"""What the programs have in common: flags from a dataclass of settings, and --help in sections."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser


def parser_of(
    settings: type, program: str, about: str | None, sections: Mapping[str, str] | None = None
) -> HfArgumentParser:
    """The parser of `python -m kdfast.PROGRAM`, whose flags are the fields of `settings`.

    sections: the first flag of each section of --help -> its heading.
    """
    parser = HfArgumentParser(
        settings,
        prog=f"python -m kdfast.{program}",
        usage="%(prog)s [flags]",  # a list of fifty would hide what an error says
        description=about,
    )
    if sections:
        group = None
        for action in list(parser._actions):  # argparse has no other way to move a flag
            if action.dest in sections:
                group = parser.add_argument_group(sections[action.dest])
            if group is not None:
                parser._optionals._group_actions.remove(action)
                group._group_actions.append(action)
    return parser


def parse(parser: HfArgumentParser, argv: Sequence[str] | None) -> Any:
    """The settings that `argv` gives. Unknown flags and values end the program, in argparse's own
    words."""
    settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return settings
