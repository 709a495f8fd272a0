from __future__ import annotations

import sys
from pathlib import Path

import pytest
from factories import pool, scenario

from llmopt import api, registry
from llmopt.errors import PolicyError, ScenarioError
from llmopt.evaluate.fluid import evaluate_fluid
from llmopt.evaluate.simulate import simulate

OWN = '''
"""A policy outside the repository: chat goes to the fastest pool, the rest to the least loaded replica."""

from dataclasses import dataclass

from llmopt import Plan, index_router


@dataclass(frozen=True)
class Cheapest:
    """Least requests, weighted by price."""

    name: str = "cheapest"

    def plan(self, scenario):
        price = [p.price for p in scenario.pools]
        return Plan(self.name, index_router(scenario, waiting=price, running=price))


def make():
    return Cheapest("made")


ready = Cheapest("ready")
needy = lambda x: x
number = 3
shouting = Cheapest("shouting")


class Broken:
    name = "broken"

    def plan(self, scenario):
        return {}["missing"]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_policies.py").write_text(OWN)
    (tmp_path / "bad_policies.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "needs_more.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "wrong_syntax.py").write_text("def plan(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in ("my_policies", "bad_policies", "needs_more", "wrong_syntax"):
        sys.modules.pop(name, None)


def test_bundled_names_are_unique_and_found() -> None:
    names = registry.policy_names()
    assert len(set(names)) == len(names)
    assert {"max-margin", "jsq", "round-robin", "power-of-two"} <= set(names)
    assert all(registry.get_policy(name).name == name for name in names)


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(PolicyError, match=r"no policy is named 'round-robbin'; did you mean .*'?round-robin"):
        registry.get_policy("round-robbin")
    with pytest.raises(PolicyError, match=r"choose one of .*jsq"):
        registry.get_policy("zzzz")


def test_a_duplicate_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import baselines

    monkeypatch.setattr(baselines, "POLICIES", {"routing": baselines.POLICIES["routing"][:1] * 2})
    registry._bundled.cache_clear()
    with pytest.raises(PolicyError, match="two policies are named 'random', one in baselines; rename"):
        registry.policy_names()
    registry._bundled.cache_clear()


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("my_policies:Cheapest", "cheapest"),
        ("my_policies:make", "made"),
        ("my_policies:ready", "ready"),
        ("my_policies.py:ready", "ready"),
    ],
)
def test_own_policies_by_reference(folder: Path, reference: str, name: str) -> None:
    assert registry.get_policy(reference).name == name


def test_own_policy_by_absolute_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert registry.get_policy(f"{folder / 'my_policies.py'}:ready").name == "ready"


def test_own_policy_runs_in_both_evaluators(folder: Path) -> None:
    assert len(OWN.split("def make")[0].strip().splitlines()) < 40
    question = scenario([pool("dear", price=4.0), pool("cheap", price=1.0)])
    plan = api.plan(question, "my_policies:Cheapest")
    fluid = evaluate_fluid(question, plan)
    assert fluid.stable
    assert fluid.fractions[0, 1] == pytest.approx(0.8, abs=0.01)
    assert len(simulate(question, plan, horizon=5.0).finish) > 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("bad_policies:x", r"policy module 'bad_policies' raised ValueError: .*; fix it"),
        ("wrong_syntax:x", r"policy module 'wrong_syntax' raised SyntaxError: .*; fix it"),
        ("needs_more:x", r"policy module 'needs_more' cannot be imported: .*no_such_package_at_all.*; install it"),
        ("nowhere:x", r"no module 'nowhere' in this folder"),
        ("nowhere.py:x", r"there is no Python file 'nowhere.py'; check the path"),
        (":ready", "':ready' names no policy; write it like"),
        ("my_policies:", "'my_policies:' names no policy; write it like"),
        ("my_policies:readyy", r"'my_policies' has no attribute 'readyy'; it has ready"),
        ("my_policies:number", r"'my_policies:number' is of type int; a policy has a name and plan"),
        ("my_policies:needy", r"'my_policies:needy' cannot be made without arguments: TypeError"),
    ],
)
def test_what_is_wrong_with_a_reference_is_said_in_a_sentence(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        registry.get_policy(reference)
    assert "\n" not in str(caught.value)


def test_a_policy_that_raises_is_named(folder: Path) -> None:
    question = scenario([pool()])
    with pytest.raises(PolicyError, match=r"policy 'broken' raised KeyError: 'missing'; fix its plan"):
        api.plan(question, "my_policies:Broken")


def test_errors_of_the_product_pass_through() -> None:
    class Refusing:
        name = "refusing"

        def plan(self, scenario: object) -> object:
            raise ScenarioError("not this one")

    with pytest.raises(ScenarioError, match="not this one"):
        api.plan(scenario([pool()]), Refusing())  # type: ignore[arg-type]


def test_scenarios_may_be_named_too() -> None:
    assert api.plan("quickstart", "jsq").policy == "jsq"
    with pytest.raises(ScenarioError, match="did you mean 'quickstart'"):
        api.plan("quickstarts", "jsq")
