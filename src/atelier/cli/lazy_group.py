"""A group of commands that are imported when they are called, not when they are listed.

Used by ``__main__``. Also the place where an error becomes a line for people (or JSON) and an exit status.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from atelier.cli.output import print_error
from atelier.model.errors import AtelierError

EXIT_FAILURE = 1
JSON_OUTPUT = "atelier.json"
"""Key in ``click.Context.meta``: whether the command was asked for JSON."""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """``location`` is ``module:attribute``; ``summary`` is the line in the list of commands."""

    location: str
    summary: str


class LazyGroup(click.Group):
    """Lists its commands from a table alone."""

    def __init__(self, *args: Any, lazy_commands: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy_commands = dict(lazy_commands)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self._lazy_commands.get(cmd_name)
        if found is None:
            return None
        module_name, _, attribute = found.location.partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The original asks every command for its help text, and so would import them all.
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.summary) for name, each in self._lazy_commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AtelierError as error:
            print_error(error, as_json=bool(ctx.meta.get(JSON_OUTPUT)))
            ctx.exit(EXIT_FAILURE)
