"""What all commands share: the --json option, and how answers reach the terminal and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 200
"""Columns of a table without a terminal; sentences are not wrapped there at all."""

json_option = click.option(
    "--json", "json_file", metavar="F", help="Write the answer as JSON to F; - for standard output, and nothing else."
)


def deliver(json_file: str | None, data: Callable[[], Any]) -> bool:
    """Write `data` as JSON if asked to; whether a table is wanted on standard output as well."""
    if json_file is not None:
        from llmopt.output import to_json, write

        text = to_json(data())
        if json_file == "-":
            click.echo(text, nl=False)
        else:
            write(json_file, text)
            say_written([Path(json_file)])
    return json_file != "-"


def show(parts: Iterable[RenderableType]) -> None:
    """Print to standard output, as wide as the terminal, or as the tables need without one."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    from llmopt.tables import fitted

    for part in (piece for whole in parts for piece in fitted(whole, console.width)):
        console.print(part, soft_wrap=not console.is_terminal and isinstance(part, str | Text))


def say_written(paths: Sequence[Path]) -> None:
    """Name written files on standard error, so that standard output stays the answer."""
    if len(paths) > 3:
        click.echo(f"wrote {len(paths)} files into {paths[-1].parent}; open {paths[-1]}", err=True)
    else:
        for path in paths:
            click.echo(f"wrote {path}", err=True)
