"""llmopt: formulate, evaluate and provision LLM-serving policies with mathematical programs.

Everything public is imported from here, and only when it is used:

    from llmopt import compare
    print(compare("quickstart", ["max-margin", "jsq"]).table())
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt.api import compare, plan
    from llmopt.assess import assess
    from llmopt.errors import Infeasible, LLMOptError, PolicyError, ScenarioError, SolveError
    from llmopt.evaluate.fluid import evaluate_fluid
    from llmopt.evaluate.simulate import simulate
    from llmopt.plan import Plan, Router, index_router, split_router
    from llmopt.policy import Optimized
    from llmopt.reading import load_scenario
    from llmopt.registry import get_policy, policy_names
    from llmopt.scenario import Scenario
    from llmopt.solution import SolveOptions
    from llmopt.solve import solve
    from llmopt.traces import read_trace

__version__ = "0.1.0"

_HOME = {
    "Infeasible": "llmopt.errors",
    "LLMOptError": "llmopt.errors",
    "Optimized": "llmopt.policy",
    "Plan": "llmopt.plan",
    "PolicyError": "llmopt.errors",
    "Router": "llmopt.plan",
    "Scenario": "llmopt.scenario",
    "ScenarioError": "llmopt.errors",
    "SolveError": "llmopt.errors",
    "SolveOptions": "llmopt.solution",
    "assess": "llmopt.assess",
    "compare": "llmopt.api",
    "evaluate_fluid": "llmopt.evaluate.fluid",
    "get_policy": "llmopt.registry",
    "index_router": "llmopt.plan",
    "load_scenario": "llmopt.reading",
    "plan": "llmopt.api",
    "policy_names": "llmopt.registry",
    "read_trace": "llmopt.traces",
    "simulate": "llmopt.evaluate.simulate",
    "solve": "llmopt.solve",
    "split_router": "llmopt.plan",
}

__all__ = [
    "Infeasible",
    "LLMOptError",
    "Optimized",
    "Plan",
    "PolicyError",
    "Router",
    "Scenario",
    "ScenarioError",
    "SolveError",
    "SolveOptions",
    "assess",
    "compare",
    "evaluate_fluid",
    "get_policy",
    "index_router",
    "load_scenario",
    "plan",
    "policy_names",
    "read_trace",
    "simulate",
    "solve",
    "split_router",
]


class _Lazy(ModuleType):
    """Keeps `import llmopt.plan` from hiding the verb `llmopt.plan`: submodules stay out of the public names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Lazy
