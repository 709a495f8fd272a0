"""The shape of the code: who imports whom, what is public, how long things are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmopt

ROOT = Path(llmopt.__file__).resolve().parents[1]
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for package in ("llmopt", "formulations", "baselines")
    for p in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
LAYERS = (
    ("errors", "arrays", "progress"),
    ("model", "explain", "output", "tables", "drawing"),
    ("lengths", "catalog", "solution", "steptable"),
    ("arrivals", "trace_data"),
    ("workload", "rounds", "hardware", "trace_formats"),
    ("machines", "predictions", "stagetable", "renewal"),
    ("bundle", "slots", "slot_law"),
    ("profiles",),
    ("scenario", "trace_files", "trace_summary", "trace_servegen"),
    ("traces", "moments", "batcher", "ratio"),
    ("barrier",),
    ("trace_workload", "stability", "plan", "ways"),
    ("ways_served",),
    ("ways_report",),
    ("reading", "mix", "chunks", "bridge", "ratio_report"),
    ("walk", "bridge_pyomo", "bridge_cvxpy", "cones"),
    ("saturation", "solve"),
    ("waves", "policy"),
    ("latency_kernel",),
    ("latency_work",),
    ("capacity", "limits", "latency_bound"),
    ("assess",),
    ("evaluate",),
    ("calibrate", "runs"),
    ("registry", "validation"),
    ("api", "text", "plot", "text_ratio", "plot_ratio", "text_ways", "plot_ways"),
    ("page", "page_ratio", "page_ways", "describe"),
    ("cli_tools",),
    ("cli_calibrate", "cli_validate"),
    ("cli",),
    ("__main__",),
)
RANK = {f"llmopt.{name}": rank for rank, names in enumerate(LAYERS) for name in names}
POLICIES_MAY = ("errors", "arrays", "lengths", "workload", "hardware", "scenario", "moments", "solution")
POLICIES_MAY += ("plan", "policy", "stability", "capacity", "rounds", "batcher", "predictions")
POLICIES_MAY += ("bundle", "renewal", "slots", "slot_law", "ratio", "barrier", "machines")
HEAVY = ("pandas", "cvxpy", "pyomo", "numba", "matplotlib", "scipy", "highspy")


def imports(tree: ast.AST, lazy: bool) -> Iterator[str]:
    """Modules that `tree` imports; with `lazy` also inside functions, never under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [n if n in FILES else str(node.module) for n in names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, lazy)


GRAPH = {name: {m for m in imports(tree, lazy=True) if m in FILES} for name, tree in TREES.items()}


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    todo = set(GRAPH[name])
    while todo:
        seen |= todo
        todo = {m for s in todo for m in GRAPH[s]} - seen
    return seen


def rank(name: str) -> int | None:
    return RANK.get(".".join(name.split(".")[:2]))


def test_every_module_of_the_core_has_its_layer() -> None:
    assert [n for n in FILES if n.startswith("llmopt.") and rank(n) is None] == []


@pytest.mark.parametrize("name", [n for n in FILES if rank(n) is not None])
def test_a_layer_never_imports_a_higher_one(name: str) -> None:
    higher = {m for m in reachable(name) if (rank(m) or 0) > (rank(name) or 0)}
    assert not higher


def test_no_import_cycles() -> None:
    assert [name for name in GRAPH if name in reachable(name)] == []


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] in ("formulations", "baselines")])
def test_the_judged_never_import_the_judge(name: str) -> None:
    inside = {m.split(".")[1] for m in imports(TREES[name], lazy=True) if m.startswith("llmopt.")}
    assert inside <= set(POLICIES_MAY)


def test_only_the_solver_boundary_imports_highs() -> None:
    users = {name for name, tree in TREES.items() if any(m.startswith("highspy") for m in imports(tree, lazy=True))}
    assert users <= {"llmopt.solve", "llmopt.bridge"}


def test_public_names_are_few_real_and_typed() -> None:
    assert len(llmopt.__all__) <= 25
    assert all(getattr(llmopt, name) is not None for name in llmopt.__all__)
    typed = next(n for n in TREES["llmopt"].body if isinstance(n, ast.If))
    assert {a.name for node in typed.body for a in node.names} == set(llmopt.__all__)
    assert set(llmopt.__all__) <= set(dir(llmopt))


def test_submodules_do_not_hide_public_verbs() -> None:
    import llmopt.plan
    import llmopt.solve

    assert not isinstance(llmopt.plan, type(llmopt))
    assert not isinstance(llmopt.solve, type(llmopt))


@pytest.mark.parametrize(
    "code", ["import llmopt", "from llmopt.cli import main; main(['--help'], standalone_mode=False)"]
)
def test_import_and_help_stay_light(code: str) -> None:
    probe = f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 350
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            lines = (node.end_lineno or 0) - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
            assert lines <= 60, f"{node.name} has {lines} lines"
