"""The ways into the package: make targets, the version, what `--help` loads, and a wheel in an empty folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmopt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("cvxpy", "pyomo", "pandas", "matplotlib", "scipy", "numba", "highspy", "rich")


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **options)


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint"])
def test_make_targets_exist_and_say_what_they_do(target: str):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target}\t" in listed
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_the_checks_run_the_tests_and_then_the_linters():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text()
    assert text.index("make test") < text.index("make lint")


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert version == llmopt.__version__ == importlib.metadata.version("llmopt")
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_declared():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_help_loads_nothing_heavy():
    code = (
        "import sys, click; from llmopt.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )
    assert "compare" in python("-c", code).stdout


def test_the_module_and_the_console_script_are_the_same_program():
    assert PROJECT["project"]["scripts"]["llmopt"] == "llmopt.cli:main"
    assert python("-m", "llmopt", "--version").stdout == f"llmopt, version {llmopt.__version__}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that the tree stays clean; without network."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("llmopt", "formulations", "baselines", "scenarios"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy))
    return next(out.glob("*.whl"))


def test_a_wheel_in_an_empty_folder_compares_a_bundled_scenario(wheel: Path, tmp_path: Path):
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    options = {"cwd": tmp_path / "elsewhere", "env": environment}
    assert str(tmp_path) in python("-c", "import llmopt, formulations; print(llmopt.__file__)", **options).stdout
    # The bundle simulator compiles in a second, the iteration-level one, which others test, in half a minute.
    done = python("-m", "llmopt", "compare", "afd-qwen3-235b-h200", "--policies", "afd-fleet,afd-one", **options)
    assert re.search(r"^afd-fleet +2A-1F", done.stdout, re.M)
    assert "Stable" in python("-m", "llmopt", "stability", "quickstart", **options).stdout
    assert python("-m", "llmopt", "list", **options).stdout.count("quickstart") == 1
