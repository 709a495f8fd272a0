"""Every fenced block of the documentation runs: files are written, Python executed, commands run, TOML loaded.

Conventions of the documents: a block is a file if the line before it ends with `` `name`: ``; a console block shows
commands after ``$ `` and, below each, lines that it prints, in any order. Numbers may differ by a fifth; gaps and
wall-clock seconds are not compared; three dots stand for lines left out.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmopt.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "formulations" / "README.md"]
FENCE = re.compile(r"^(?P<before>[^\n]*)\n+```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[~*%]?(-?[\d,]*\.?\d+(?:e-?\d+)?)[*%]?")
DIGEST = re.compile(r"\[[0-9a-f]{12}\]:?")
SHARED = ROOT.parent / "shared" / "data"
DATA = {
    "AzureLLMInferenceTrace_conv.csv": SHARED / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv",
    "vllm-runs/RTX4090_Llama-3.1-8B": SHARED / "vllm-runs" / "RTX4090_Llama-3.1-8B",
    "vllm-runs/profiles": SHARED / "vllm-runs" / "profiles",
}
"""Public data that commands of the documents name; a command is left out where its data are absent."""


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    file: str | None


def blocks(document: Path) -> Iterator[Block]:
    for match in FENCE.finditer(document.read_text()):
        named = re.search(r"`([\w./-]+)`:$", match["before"].rstrip())
        yield Block(match["kind"], match["body"], named[1] if named else None)


def commands(body: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines it is said to print."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        first, *rest = part.splitlines()
        yield first, [line for line in rest if line.strip()]


def same(said: str, printed: str) -> bool:
    """Whether a printed line has the same words, and numbers within a fifth."""
    ours, theirs = said.split(), printed.split()
    return len(ours) == len(theirs) and all(map(close, ours, theirs))


def close(said: str, printed: str) -> bool:
    if DIGEST.fullmatch(said):
        return DIGEST.fullmatch(printed) is not None
    a, b = (NUMBER.fullmatch(word.strip("(),;")) for word in (said, printed))
    if a is None or b is None:
        return said == printed
    x, y = (float(m[1].replace(",", "")) for m in (a, b))
    return abs(x - y) <= 0.2 * max(abs(x), abs(y)) + 1e-9


def found(said: str, printed: list[str]) -> bool:
    """Whether a line is among those printed; gap and seconds depend on the machine."""
    if said.startswith("seconds "):
        return any(line.startswith("seconds ") for line in printed)
    timed = any("plan (s)" in line for line in printed)
    return any(same(said, line) or (timed and same(untimed(said), untimed(line))) for line in printed)


def untimed(line: str) -> str:
    """A row of a comparison without the columns that depend on the machine: gap (rounding) and seconds."""
    return " ".join(line.split()[:-3])


def runnable(command: str) -> bool:
    """Whether a command is ours and its data are at hand."""
    return command.split()[0] == "llmopt" and at_hand(command)


def at_hand(text: str) -> bool:
    """Whether all public data that a command or a program names are here."""
    return all(source.exists() for name, source in DATA.items() if name in text)


def provide(folder: Path) -> None:
    """Copy the public data that are at hand to where the commands look for them."""
    for name, source in DATA.items():
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copy(source, folder / name)


def check(command: str, said: list[str]) -> None:
    """Run `command` if it can run and look for every line it is said to print."""
    if not runnable(command):
        return
    words = command.split()
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    printed = [line for line in result.stdout.splitlines() if line.strip()]
    missing = [line for line in said if line.strip() != "..." and not found(line, printed)]
    assert not missing, f"{command} does not print\n" + "\n".join(missing) + "\nbut\n" + "\n".join(printed)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.exists()], ids=lambda d: d.relative_to(ROOT).as_posix())
def test_documents_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    provide(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(document):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.body)
        if block.kind == "toml":
            tomllib.loads(block.body)
        elif block.kind == "python" and block.file is None and at_hand(block.body):
            exec(compile(block.body, str(document), "exec"), names)
        elif block.kind == "console":
            for command, said in commands(block.body):
                check(command, said)


def test_every_link_and_picture_exists() -> None:
    for document in (d for d in DOCUMENTS if d.exists()):
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"
