"""What the command lines of the examples share: an error is one line, with status 2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage.

    Args:
        prog: the name of the program.
        description: what ``--help`` prints, line by line as it is.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Prints the first line of a message, and exits with status 2."""
        self.exit(2, f"{self.prog}: {message.partition(chr(10))[0]}\n")

    def add_training(self, directory: str, sizes: dict[str, tuple[int, str]]) -> None:
        """Adds the options of a training.

        Args:
            directory: where its checkpoints are by default.
            sizes: for each further option its default and what it is; all are at least 1.
        """
        group = self.add_argument_group("training")
        group.add_argument(
            "--checkpoints",
            type=Path,
            default=Path(directory),
            help="directory of the training (default: %(default)s)",
        )
        sizes = {**sizes, "--save-every": (100, "steps from one checkpoint to the next")}
        for flag, (default, what) in sizes.items():
            group.add_argument(
                flag, type=at_least_1, default=default, help=f"{what} (default: %(default)s)"
            )


def at_least_1(text: str) -> int:
    """Reads a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
