"""Bring the printed output and the pictures in the documents up to date: `python -m docs.refresh`, then read the diff.

Every console block keeps its commands and as many lines under each as it had; the lines are what the command prints
now. The conventions are those of tests/test_readme.py, which holds the documents to what is printed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from click.testing import CliRunner

from llmopt.cli import main
from tests.test_readme import DOCUMENTS, FENCE, ROOT, blocks, commands, provide, runnable

PICTURES = {
    "backlog.png": ("quickstart", "backlog.png"),
    "afd-ratio.png": ("afd-two-micro-batches", "ratio.png"),
    "afd-ways.png": ("afd-ways", "ways.png"),
}
"""Pictures of the documents: of which bundled scenario's report, and which one in it."""


def refreshed(body: str) -> str:
    """The console block with the lines that its commands print now."""
    lines = (line for command, said in commands(body) for line in [f"$ {command}", *_lines(command, said)])
    return "\n".join(lines) + "\n"


def _lines(command: str, said: list[str]) -> list[str]:
    """As many lines as `said` has; the old ones where the command cannot run here."""
    if not said or not runnable(command):
        return said
    result = CliRunner().invoke(main, command.split()[1:], catch_exceptions=False)
    return [line.rstrip() for line in result.stdout.splitlines() if line.strip()][: len(said)]


def refresh(document: Path) -> None:
    """Rewrite one document."""
    for block in blocks(document):
        if block.file is not None:
            Path(block.file).write_text(block.body)

    def block(match: re.Match[str]) -> str:
        return match[0].replace(match["body"], refreshed(match["body"])) if match["kind"] == "console" else match[0]

    document.write_text(FENCE.sub(block, document.read_text()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        provide(Path(folder))
        for path in DOCUMENTS:
            refresh(path)
        for target, (scenario, picture) in PICTURES.items():
            CliRunner().invoke(main, ["compare", scenario, "--report", scenario], catch_exceptions=False)
            shutil.copy(Path(scenario) / picture, ROOT / "docs" / "img" / target)
