"""Comparisons of A/F ratios: rows as points of shared curves, regret by brute force, failures, files, traces."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llmopt import Plan
from llmopt.cli import main
from llmopt.errors import Infeasible, PolicyError
from llmopt.evaluate.bundle_run import simulate_bundle
from llmopt.evaluate.compare import compare
from llmopt.evaluate.ratio_comparison import RatioComparison
from llmopt.evaluate.ratio_curve import Curve, published_verdict, simulated_optimum
from llmopt.page import write_report
from llmopt.reading import load_scenario
from llmopt.registry import get_policy
from llmopt.scenario import Scenario
from llmopt.text_ratio import bar, listed, shown_ratios

SMALL = """
name = "small"
problem = "af-ratio"
question = "How many workers?"
[workload]
rate = 1.0
[[workload.classes]]
name = "chat"
share = 1.0
prompt = { law = "uniform", low = 20, high = 180 }
output = { law = "geometric", mean = 40.0, max = 1000 }
[[pools]]
name = "bundle"
first_token = "decode"
[pools.bundle]
batch = 32
attention = [{ base = 50e-6, kv = 40e-9 }]
transfer = [{ base = 20e-6, decode = 0.1e-6 }]
ffn = [{ base = 60e-6, decode = 1e-6 }]
micro_batches = 2
pipeline = "non-blocking"
layers = 3
kv_capacity = 20000
[fleet]
most_attention = 9
most_ffn = 2
[evaluation]
requests = 300
seeds = [4, 9]
"""


@dataclass(frozen=True)
class Sized:
    """A policy that always decides the same, or raises."""

    name: str
    workers: int = 3
    servers: int | None = None
    batch: int | None = None
    error: Exception | None = None
    more: int = 0

    def plan(self, scenario: Scenario) -> Plan:
        if self.error:
            raise self.error
        bundle = scenario.bundle.sized(self.workers, self.servers, self.batch)
        others = ((scenario.bundle.sized(2), self.more),) if self.more else ()
        return Plan(self.name, bundle=bundle, bundles=2, figures={"ratio": self.workers + 0.25}, others=others)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def played(path: Path, *policies: Sized, **changes: Any) -> RatioComparison:
    comparison = compare(load_scenario(path).replace(**changes), policies)
    assert isinstance(comparison, RatioComparison)
    return comparison


def llmopt(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: str | Path) -> str:
    result = llmopt(*arguments)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert result.exit_code == 2 and result.stdout == "" and len(lines) == 1, result.output
    return lines[0]


def test_rows_are_points_of_simulations_with_the_same_loads(small: Path) -> None:
    """Each row's figures are those of a simulation of its bundle alone, seed by seed."""
    comparison = played(small, Sized("three"), Sized("two-servers", 5, 2), Sized("small-batch", 4, batch=16))
    scenario = load_scenario(small)
    assert [(c.bundle.batch, c.bundle.ffn_servers) for c in comparison.curves] == [(32, 1), (16, 1), (32, 2)]
    for outcome in comparison.outcomes:
        bundle = outcome.bundle
        assert bundle is not None and outcome.ok
        runs = [simulate_bundle(scenario, seed, bundle) for seed in (4, 9)]
        for metric in ("throughput", "idle_attention", "idle_ffn", "tpot", "tpot_p99"):
            each = [getattr(run, metric)[bundle.attention_workers - 1] for run in runs]
            assert outcome.at(metric).mean == pytest.approx(np.mean(each), rel=1e-12)
            spread = 12.706 * abs(each[0] - each[1]) / 2  # Student's t of one degree of freedom
            assert outcome.at(metric).half == pytest.approx(spread, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize("prices", [(0.0, 0.0), (1.0, 6.0)])
def test_regret_is_what_the_best_ratio_makes_more_per_unit_of_weight(small: Path, prices: tuple[float, float]) -> None:
    keys = dict(zip(("pools.0.bundle.attention_price", "pools.0.bundle.ffn_price"), prices, strict=True))
    comparison = played(small, *(Sized(f"p{x}", x) for x in range(1, 10)), **keys)
    weights = prices if all(prices) else (1.0, 1.0)
    worth = []
    for outcome in comparison.outcomes:
        bundle = outcome.bundle
        assert bundle is not None
        tokens = outcome.at("throughput").mean * (bundle.attention_workers + 1)
        worth.append(tokens / (bundle.attention_workers * weights[0] + weights[1]))
        usd = (bundle.attention_workers * prices[0] + prices[1]) / 3600 / tokens * 1e6
        assert outcome.cost == pytest.approx(usd, rel=1e-12) if all(prices) else np.isnan(outcome.cost)
    losses = [outcome.loss for outcome in comparison.outcomes]
    assert losses == pytest.approx([1 - w / max(worth) for w in worth], abs=1e-12)
    (curve,) = comparison.curves
    assert curve.best == int(np.argmax(worth)) + 1
    first, last = curve.plateau
    assert all(loss <= 0.01 for loss in losses[first - 1 : last]) and first <= curve.best <= last
    assert all(losses[k] > 0.01 for k in (first - 2, last) if 0 <= k < 9)


def test_prices_move_the_best_ratio_up_where_servers_are_dear(small: Path) -> None:
    cheap, dear = (
        played(small, Sized("a"), **{"pools.0.bundle.attention_price": 1.0, "pools.0.bundle.ffn_price": price})
        for price in (0.3, 10.0)
    )
    assert cheap.curves[0].best < dear.curves[0].best


def test_a_failing_policy_keeps_its_row_with_the_reason(small: Path) -> None:
    comparison = played(
        small,
        Sized("good"),
        Sized("lost", error=RuntimeError("out of ideas")),
        Sized("narrow", error=Infeasible("nothing fits")),
        Sized("greedy", 10),
    )
    said = {outcome.policy: outcome.status for outcome in comparison.outcomes}
    assert said["good"] == "ok" and comparison.served
    assert said["lost"] == "raised RuntimeError: out of ideas"
    assert said["narrow"] == "infeasible: nothing fits"
    assert "exceed the fleet's most_attention = 9" in said["greedy"]
    rows = comparison.as_dict()["policies"]
    assert [row["policy"] for row in rows] == list(said)
    assert rows[1]["loss"] is None and rows[0]["loss"] is not None
    assert list(comparison.table().index) == list(said)


def test_policies_of_one_name_and_none_at_all_are_refused(small: Path) -> None:
    with pytest.raises(PolicyError, match="different names"):
        played(small, Sized("a"), Sized("a"))
    with pytest.raises(PolicyError, match="at least one"):
        played(small)


def test_a_fleet_of_several_shapes_counts_all_its_tokens(small: Path) -> None:
    mixed = played(small, Sized("mixed", 6, more=3))["mixed"]
    (curve,) = {id(c): c for c in (mixed.curve, *mixed.others)}.values()
    assert curve is not None
    per = curve.mean("throughput")
    assert mixed.tokens == pytest.approx(2 * 7 * per[5] + 3 * 3 * per[1], rel=1e-12)


def test_equal_input_gives_equal_bytes_and_the_curves_are_complete(small: Path) -> None:
    one, two = (played(small, Sized("three"), Sized("five", 5)) for _ in range(2))
    assert one.to_json(timings=False) == two.to_json(timings=False)
    (curve,) = json.loads(one.to_json())["curves"]
    assert [point["attention_workers"] for point in curve["points"]] == list(range(1, 10))
    assert min(point["loss"] for point in curve["points"]) == 0
    assert curve["theory"]["published"].keys() == {"r_attention", "r_transfer", "r_peak", "ratio"}


def test_a_report_holds_tables_pictures_and_the_page(small: Path, tmp_path: Path) -> None:
    comparison = played(small, Sized("three"), Sized("wide", 5, 2))
    names = {path.name for path in write_report(comparison, tmp_path / "a")}
    pictures = {f"{name}.{kind}" for name in ("ratio", "idle", "gantt") for kind in ("svg", "png")}
    assert pictures | {"results.json", "results.csv", "timings.json", "report.html"} <= names
    write_report(comparison, tmp_path / "b")
    for name in names - {"timings.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<svg") == 3 and "three" in page and "$" not in page


def test_a_report_of_failures_alone_draws_nothing(small: Path, tmp_path: Path) -> None:
    comparison = played(small, Sized("lost", error=RuntimeError("out of ideas")))
    assert not comparison.served
    names = {path.name for path in write_report(comparison, tmp_path)}
    assert "report.html" in names and not any(name.endswith("png") for name in names)


def test_two_micro_batches_are_named_as_where_the_published_rule_fails() -> None:
    """Few requests of the bundled scenario: the rule's ratio loses a few percent against 7 workers."""
    scenario = load_scenario("afd-two-micro-batches").replace(
        **{"evaluation.requests": 150, "evaluation.start": "stationary", "pools.0.bundle.layers": 2}
    )
    comparison = compare(scenario, [Sized("seven", 7)])
    assert isinstance(comparison, RatioComparison)
    (curve,) = comparison.curves
    assert 6 <= curve.best <= 8
    said = published_verdict(curve)
    assert said in comparison.sentences
    found = re.search(r"fails here: .* 9\.55, at best (9|10)A-1F, loses (\d\.\d)%; right is (\d)A-1F", said)
    assert found and 1.5 < float(found[2]) < 6 and int(found[3]) == curve.best


def curve_of(small: Path, loss: list[float], rule: float = 2.4) -> Curve:
    """A curve with these losses, for what depends on nothing else."""
    curve = played(small, Sized("a")).curves[0]
    runs = tuple(replace(run, per_weight=1000 * (1 - np.array(loss))) for run in curve.runs)
    return replace(curve, runs=runs, rule=rule)


def test_plateaus_end_at_the_first_ratio_that_loses_more(small: Path) -> None:
    curve = curve_of(small, [0.2, 0.005, 0.009, 0.0, 0.008, 0.02, 0.001, 0.3, 0.4])
    assert (curve.best, curve.plateau) == (4, (2, 5))


def test_the_published_rule_is_judged_by_its_better_neighbour(small: Path) -> None:
    loss = [0.2, 0.05, 0.03, 0.0, 0.01, 0.02, 0.1, 0.3, 0.4]
    assert "2.40, at best 3A-1F, loses 3.0%; right is 4A-1F" in published_verdict(curve_of(small, loss))
    assert "40.00, at best 9A-1F, loses 40.0%" in published_verdict(curve_of(small, loss, 40.0))
    assert "4.90, at best 4A-1F, loses 0.00%" in published_verdict(curve_of(small, loss, 4.9))


def test_where_lengths_are_not_geometric_the_verdict_is_on_the_ratio_that_the_policy_takes(small: Path) -> None:
    """Constant lengths: theta is half an output below what means alone tell, and the rule knows means alone."""
    scenario = load_scenario(small).replace(**{"workload.classes.0.output": {"law": "constant", "value": 40}})
    comparison = compare(scenario, [get_policy("afd-published")])
    assert isinstance(comparison, RatioComparison)
    by_means = ((40e-9 * 32 * (100 + 39) + 50e-6) - 60e-6) / (1e-6 * 32)
    assert comparison.curves[0].rule == pytest.approx(by_means, rel=1e-9)
    assert f"{comparison['afd-published'].ratio:.2f}, at best" in published_verdict(comparison.curves[0])


def test_long_curves_show_landmarks_and_what_is_wanted() -> None:
    assert shown_ratios(9, [4]) == list(range(1, 10))
    shown = shown_ratios(40, [13, 39])
    assert {1, 13, 32, 39, 40} <= set(shown) and len(shown) < 20
    assert all(a < b for a, b in pairwise(shown))


def test_bars_are_in_proportion() -> None:
    assert bar(1.0, 4) == "████" and bar(0.5, 4) == "██" and bar(0.0) == "" and bar(float("nan")) == ""
    assert bar(17 / 32, 4) == "██▏"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"


OWN = """
from llmopt import Plan

class Own:
    name = "own"

    def plan(self, scenario):
        return Plan(self.name, bundle=scenario.bundle.sized(4))
"""


def test_a_users_policy_gets_row_plan_view_and_json(small: Path) -> None:
    Path("own_ratio.py").write_text(OWN)
    result = llmopt("compare", small, "--policies", "own_ratio.py:Own", "--seeds", "4")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith("own"))
    assert row.split()[:4] == ["own", "4A-1F", "32", "4.00"]
    for words in ("How many workers?", "What a wrong ratio costs", "optimum", "Simulated, ", "published rule"):
        assert words in result.stdout
    said = llmopt("plan", small, "--policy", "own_ratio.py:Own").stdout
    for words in ("4A-1F", "this plan", "optimum", "regime", "TPOT", "non-blocking", "theta"):
        assert words in said
    shown = llmopt("plan", small, "--policy", "own_ratio.py:Own", "--json", "-")
    data = json.loads(shown.stdout)
    assert (data["bundle"]["attention_workers"], data["bundles"], data["solve"]) == (4, 1, None)
    assert data["theory"]["ratio"] == 4.0 and len(data["theory"]["curve"]) == 9


def test_the_default_plan_carries_its_proof(small: Path) -> None:
    said = llmopt("plan", small).stdout
    assert "afd-fleet" in said and "proven bound" in said and "HiGHS" in said


def test_a_trace_gives_the_joint_lengths(small: Path) -> None:
    """Long prompts only with long outputs: theta by hand, larger than that of the same lengths unpaired."""
    rows = [(10, 5)] * 30 + [(150, 60)] * 10
    lines = "".join(f"{0.5 * i},{p},{o}\n" for i, (p, o) in enumerate(rows))
    Path("log.csv").write_text("arrival,prompt,output\n" + lines)
    result = llmopt("compare", small, "--trace", "log.csv", "--policies", "afd-mean-field,afd-one", "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    theta = sum(p * o + o * (o - 1) / 2 for p, o in rows) / sum(o for _, o in rows)
    assert data["load"]["theta"] == pytest.approx(theta, rel=1e-12) and data["load"]["error"] > 0
    low, high = (data["policies"][0][key] for key in ("ratio_low", "ratio_high"))
    assert low < data["policies"][0]["ratio"] < high
    assert any("40 requests" in text for text in data["sentences"])
    assert "interval" in llmopt("compare", small, "--trace", "log.csv", "--policies", "afd-one", "--seeds", "1").stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch = 32", "batch = 0", ("pools[0].bundle.batch", "at least 1")),
        ("base = 50e-6", "base = -50e-6", ("attention[0].base", "at least 0")),
        ("decode = 1e-6", "decode = -1e-6", ("ffn[0].decode", "at least 0")),
        ("kv_capacity = 20000", "kv_capacity = 3000", ("kv_capacity = 3000", "on average", "lower batch")),
        (
            "ffn = [{ base = 60e-6, decode = 1e-6 }]",
            "ffn = { base = 60e-6 }",
            ("bundle.ffn = ", "a list; put it into [ ]"),
        ),
        (
            "ffn = [{ base = 60e-6, decode = 1e-6 }]",
            "ffn_table = { tokens = [1, 64], seconds = [90, 200] }",
            ("seconds[0] = 90 must be at most 10; times are in seconds, not milliseconds",),
        ),
        ('problem = "af-ratio"', 'problem = "af-rate"', ("did you mean 'af-ratio'",)),
    ],
)
def test_a_bad_bundle_is_refused_in_one_sentence(small: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    small.write_text(SMALL.replace(old, new, 1))
    for message in (refused("compare", small), refused("plan", small)):
        assert all(word in message for word in ("small.toml", *words)), message


def test_a_pool_without_a_bundle_is_told_to_have_one(small: Path) -> None:
    head, rest = SMALL.split("[[pools]]")
    tail = rest[rest.index("[evaluation]") :]
    for pool in ('name = "b"\n', 'name = "b"\ncatalog = "a100-llama31-8b"\n'):
        small.write_text(f"{head}[[pools]]\n{pool}{tail}")
        message = refused("plan", small)
        assert 'is missing; problem = "af-ratio" asks for a bundle: add [pools.bundle]' in message


def test_where_both_prices_are_given_tables_show_what_tokens_cost(small: Path) -> None:
    """A scarce fleet and prices: the plan prints what one more device is worth, figures with units, and USD."""
    price = "attention_price = 2.0\nffn_price = 30.0\nkv_capacity = 20000"
    small.write_text(SMALL.replace("kv_capacity = 20000", price, 1))
    whole = llmopt("plan", small, "--policy", "afd-fleet")
    assert whole.exit_code == 0 and "USD/M tokens" in whole.stdout and " tokens" in whole.stdout
    assert re.search(r"cycle \(s in a layer\) .*\n.*tpot \(s\)", whole.stdout)
    comparison = compare(load_scenario(small), [get_policy("afd-fleet")])
    assert isinstance(comparison, RatioComparison)
    curve = comparison.curves[0]
    assert f"{curve.best}A-1F is best per dollar with" in simulated_optimum(curve)
    said = llmopt("compare", small, "--policies", "afd-fleet").stdout
    cost = [float(m[1]) for m in re.finditer(r"^\d+A-1F .*?(\d*\.\d+) +\d+\.\d\d%", said, re.M)]
    assert len(cost) == curve.workers and cost.index(min(cost)) == curve.best - 1


def test_the_plan_of_a_limited_fleet_says_what_one_more_device_is_worth(small: Path) -> None:
    small.write_text(with_devices(SMALL, 12))
    said = llmopt("plan", small)
    assert said.exit_code == 0 and re.search(r"one more +is worth, tokens/s *\naccelerator +[\d,.]+", said.stdout)
    small.write_text(with_devices(SMALL.replace("layers = 3", "layers = 3\nffn_devices = 4"), 3))
    message = llmopt("plan", small).output
    assert "at most fleet.devices = 3 accelerators, but the smallest bundle has 5; raise fleet.devices" in message


def test_a_batch_beyond_the_kv_memory_is_refused(small: Path) -> None:
    comparison = played(small, Sized("full", 4, batch=2000), Sized("good"))
    assert "batch = 2000 makes a worker hold" in comparison["full"].status
    assert "more than its kv_capacity = 20000; choose a smaller batch" in comparison["full"].status


def test_neighbours_that_lose_more_say_nothing_of_ratios_farther_away(small: Path) -> None:
    loss = [0.2, 0.05, 0.03, 0.0, 0.05, 0.008, 0.1, 0.3, 0.4]
    assert "both neighbours lose more than 1%" in simulated_optimum(curve_of(small, loss))


def with_devices(text: str, devices: int) -> str:
    """The scenario with a limited fleet."""
    limit = f"[fleet]\ndevices = {devices}\n"
    return (
        text.replace("[fleet]\n", limit, 1)
        if "[fleet]" in text
        else text.replace("[evaluation]", f"{limit}\n[evaluation]", 1)
    )


def test_empty_traces_predictions_and_strange_policies_are_refused(small: Path) -> None:
    Path("empty.csv").write_text("")
    Path("head.csv").write_text("arrival,prompt,output\n")
    assert "is empty" in refused("compare", small, "--trace", "empty.csv")
    assert "no usable request" in refused("plan", small, "--trace", "head.csv")
    assert "slots are always full" in refused("compare", small, "--predictions", "none")
    assert "the plan has no bundle" in refused("plan", small, "--policy", "jsq")
    alone = llmopt("compare", small, "--policies", "jsq")
    assert alone.exit_code == 2 and "jsq: policy 'jsq': the plan has no bundle" in alone.stdout


def test_check_asks_for_a_policy_that_works(small: Path) -> None:
    assert llmopt("compare", small, "--policies", "afd-one", "--seeds", "1", "--check").exit_code == 0


def test_policies_beyond_the_limits_are_named_with_what_they_exceed(small: Path) -> None:
    scenario = load_scenario(small)
    keys = {"fleet.devices": 3, "workload.classes.0.tpot": 1.4e-3}
    policies = [Sized("three", 3), Sized("also", 3), Sized("one", 1)]
    played = compare(scenario.replace(**keys), policies)
    tpot = 1e3 * played["three"].at("tpot").mean
    assert tpot > 1.4 > 1e3 * played["one"].at("tpot").mean
    assert f"Beyond the limits: three, also, 3A-1F: TPOT {tpot:.4g} ms of 1.4, 8 devices of 3." in played.sentences
    assert "Beyond the limits: one, 1A-1F: 4 devices of 3." in played.sentences, "two bundles of two devices each"
    assert not any(text.startswith("Beyond") for text in compare(scenario, policies).sentences)


def test_seeds_that_disagree_leave_the_best_in_doubt(small: Path) -> None:
    scenario = load_scenario(small)
    curve = compare(scenario, [Sized("three", 3)]).curves[0]
    worth = curve.values("per_weight")
    for x in range(1, curve.workers + 1):
        less = worth[:, curve.best - 1] - worth[:, x - 1]
        spread = 12.706 * less.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
        near = curve.plateau[0] - 1 <= x <= curve.plateau[1] + 1
        assert (x in curve.alike) == (near and less.mean() <= spread)
    one = compare(scenario, [Sized("three", 3)], seeds=[4]).curves[0]
    assert "of one seed, so that nothing is known of the error." in simulated_optimum(one)
