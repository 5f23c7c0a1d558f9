"""`python -m kdfast.augment`: copies of a data set in which words are replaced by similar ones.

A word's replacements come from the first of these that knows it: a masked language model, for words
that are one of its tokens; word vectors; the input embeddings of any model. Each copy of a context
has one of them in place of each word with --probability. The copies are written as JSONL that
kdfast.train reads, the originals are not. A run that was stopped goes on when it is started again.
"""

import sys
from pathlib import Path

from kdfast.common import program
from kdfast.common.progress import passing_bar, print_line
from kdfast.data.chunks import WHOLE, parse_shard
from kdfast.data.tally import Tally
from kdfast.synthetic.settings import AugmentConfig


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns."""
    return program.run(parse, start, argv)


def parse(argv: list[str]) -> AugmentConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(AugmentConfig, "augment", __doc__), argv)


def start(config: AugmentConfig) -> None:
    """The work of the program."""
    config.check()
    shard = parse_shard(config.shard) if config.shard else WHOLE
    from kdfast.synthetic.copies import TOGETHER, Copier, grouped, key_of
    from kdfast.synthetic.lines import Lines

    lines = Lines(Path(config.output).expanduser(), key_of(config))
    tally = Tally()
    with lines.held(), passing_bar("augment", "paragraph", None) as bar:
        first = lines.next_part()
        if first:
            print_line(f"{lines.part} is there: going on at paragraph {first * TOGETHER}.")
        copier = Copier(config)
        for part, paragraphs in enumerate(grouped(config.data, tally)):
            if part >= first and shard.has(part):
                lines.add(part, copier.copies(paragraphs))
            bar.update(len(paragraphs))
        lines.finish()
    for note in [*tally.notes({}, training=False), copier.told()]:
        print_line(note)
    print_line(f"The copies are in {config.output}.")


if __name__ == "__main__":
    sys.exit(main())
