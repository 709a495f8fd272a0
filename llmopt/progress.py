"""Progress on standard error: a bar on a terminal, plain lines without one, nothing when asked to be quiet."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Display:
    """Called with (jobs done, jobs in all, what starts now), as `llmopt.evaluate.jobs.Progress` says."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.shown: set[str] = set()
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal and not self.quiet:
            columns = (SpinnerColumn(), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)
            self.bar.add_task("", total=None)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that `what` starts; without a terminal, one line for each policy."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=what)
        elif not self.quiet and done < total and what.split(":")[0] not in self.shown:
            self.shown.add(what.split(":")[0])
            print(f"[{done}/{total}] {what.split(':')[0]}", file=sys.stderr, flush=True)
