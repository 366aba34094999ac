"""The parser of the commands besides Lightning's: mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dcl_lightning.cli.suggestions import cut

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage, and an option without its value is one."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; refuse ``--`` as a value, of which Python before 3.13 makes an empty list."""
        found, more = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found, more

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with code 2."""
        print(f"error: {cut(f'{self.prog}: {message}')}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)
