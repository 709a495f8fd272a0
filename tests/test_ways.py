"""Colocated, prefill/decode-disaggregated and AFD serving: brute force, limits in closed form, accounts, simulation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from math import inf, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llmopt import api
from llmopt.barrier import barrier_cycle
from llmopt.bundle import BUDGET, Bundle
from llmopt.drawing import draw
from llmopt.errors import ScenarioError
from llmopt.evaluate.ratio_comparison import RatioComparison
from llmopt.evaluate.ways import check_ways, prefill_seconds
from llmopt.page import html_report
from llmopt.plot_ratio import ratio_pictures
from llmopt.plot_ways import ways_figure, winners
from llmopt.scenario import Scenario
from llmopt.slots import slot_load
from llmopt.text import comparison_view
from llmopt.text_ways import ways_view
from llmopt.ways import Engine, best_shape, candidates, costs, cycles, demand, engines, most_batch, serial
from llmopt.ways_report import WaysComparison, compare_ways, missing, value_under
from llmopt.ways_served import serve

PIPELINES = ("ideal", "non-blocking", "attention-blocking", "blocking")
ATTENTION = {"base": 50e-6, "decode": 2e-8, "kv": 1.3e-9, "prefill": 2.5e-7, "pairs": 5e-11}
FFN = {"base": 900e-6, "decode": 4e-7, "prefill": 4e-7}
HOP = {"base": 15e-6, "decode": 1e-8, "prefill": 1e-8}
CONSTANT = {"prompt": {"law": "constant", "value": 1000}, "output": {"law": "constant", "value": 400}}
SPREAD: dict[str, Any] = {
    "prompt": {"law": "lognormal", "mean": 1000.0, "cv": 1.0, "max": 8000},
    "output": {"law": "geometric", "mean": 400.0, "max": 4000},
}


def ask_for(lengths: dict[str, Any] | None = None, fleet: dict[str, Any] | None = None, **of: Any) -> Scenario:
    """One class on a bundle whose colocated devices hold a sixth of the KV tokens of an Attention worker."""
    tpot = of.pop("tpot", None)
    bundle = {
        "attention": [ATTENTION],
        "transfer": [HOP],
        "ffn": [FFN],
        "layers": 48,
        "batch": 8,
        "micro_batches": 3,
        "kv_capacity": 600_000,
        "colocated": {"kv_capacity": 100_000},
        **of,
    }
    data = {
        "name": "t",
        "problem": "af-ratio",
        "workload": {"rate": 1.0, "classes": [{"name": "c", "share": 1.0, **(lengths or CONSTANT)} | {"tpot": tpot}]},
        "pools": [{"name": "b", "bundle": bundle}],
        "fleet": {"most_attention": 4, "most_ffn": 2, **(fleet or {})},
    }
    return Scenario.checked(data, "t")


def three(scenario: Scenario, context: float = 1.0) -> tuple[Engine, ...]:
    return engines(scenario, demand(scenario, context))


# Demand and cycles


def test_demand_is_the_load_of_a_slot() -> None:
    known = ask_for(SPREAD)
    ask, load = demand(known), slot_load(known.workload.classes, known.workload.rates, 1)
    assert (ask.theta, ask.deviation) == pytest.approx((load.theta, load.deviation))
    assert (ask.prompt, ask.decode) == pytest.approx((load.mean_prompt, load.mean_decode))


def test_longer_prompts_are_those_of_a_class_with_longer_prompts() -> None:
    longer = {"prompt": {"law": "constant", "value": 3000}, "output": {"law": "geometric", "mean": 90.0, "max": 900}}
    short = {**longer, "prompt": {"law": "constant", "value": 1000}}
    assert demand(ask_for(short), 3.0) == demand(ask_for(longer))
    assert demand(ask_for(longer)).pairs == pytest.approx(3000**2 / 2)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("micro_batches", "x", "y"), [(1, 3, 1), (2, 5, 2), (3, 12, 1)])
def test_cycles_are_those_of_the_barrier(pipeline: str, micro_batches: int, x: int, y: int) -> None:
    """The barrier's own integral treats two of its maxima as independent; here they are at equal quantiles."""
    known = ask_for(SPREAD, pipeline=pipeline, micro_batches=micro_batches, kv_capacity=10**7)
    ask, engine = demand(known), three(known)[2]
    for batch in (10, 100, 400):
        mine = cycles(engine, ask, x, y, np.array([float(batch)]))[0]
        theirs = barrier_cycle(known.bundle.sized(x, y, batch), ask.load, x, y)
        assert mine == pytest.approx(theirs, rel=0.01)
        assert mine <= theirs * (1 + 1e-4)


# An independent search over everything, for loads that hardly spread: 20 steps behind prompts of 1000 tokens


def by_hand(scenario: Scenario, way: str, limit: float) -> Iterator[tuple[float, tuple[int, int, int, int]]]:
    """Device-seconds of a decoded token for every M, x, y and B that memory and the limit allow."""
    b, p, d = scenario.bundle, 1000, 20
    theta = p + (d - 1) / 2
    group = b.colocated
    assert group is not None
    layers = b.layers
    whole_prompts = BUDGET / p
    prefill = layers * (50e-6 + 900e-6 + (2.5e-7 + 4e-7) * BUDGET + 5e-11 * whole_prompts * p * p / 2) / whole_prompts
    mixed, afd = way == "colocated", way == "AFD"
    room = b.kv_capacity if afd else group.kv_capacity
    for m in range(1, 4 if afd else 2):
        for x in range(1, 5 if afd else 2):
            for y in range(1, 3 if afd else 2):
                for batch in range(1, 800):
                    if m * batch * (theta + (p / d if mixed else 0)) > room:
                        break
                    tokens = batch * p / d if mixed else 0.0
                    a = 50e-6 + 2e-8 * batch + 1.3e-9 * batch * theta + 2.5e-7 * tokens + 5e-11 * batch / d * p * p / 2
                    a = a if mixed else 50e-6 + 2e-8 * batch + 1.3e-9 * batch * theta
                    f = 900e-6 + 4e-7 * (batch + tokens) * x / y
                    c = 15e-6 + 1e-8 * batch if afd else 0.0
                    tau = max(a, f, (a + f + 2 * c) / m)
                    if m * layers * tau <= limit:
                        devices = x + y if afd else 1
                        yield devices * layers * tau / (x * batch) + (0 if mixed else prefill / d), (m, x, y, batch)


@pytest.mark.parametrize("limit", [0.04, 0.055, 0.08, 0.1, 0.15, inf])
def test_every_way_is_at_the_best_of_all_batches_and_shapes(limit: float) -> None:
    steady = {"prompt": {"law": "constant", "value": 1000}, "output": {"law": "constant", "value": 21}}
    known = ask_for(steady, fleet={"kv_sigmas": 0.0})
    ask = demand(known)
    for engine in three(known):
        found = best_shape(engine, ask, limit)
        every = list(by_hand(known, engine.way, limit))
        assert (found is None) == (not every)
        if found is None:
            assert costs(engine, ask, np.array([limit]))[0] == inf
            continue
        bundle, cycle = found
        tokens = bundle.attention_workers * bundle.batch / (bundle.layers * cycle)
        mine = float(engine.cost(ask, bundle.attention_workers, bundle.ffn_servers, tokens))
        assert mine == pytest.approx(min(every)[0], rel=2e-3)
        real = costs(engine, ask, np.array([limit]))[0]
        assert mine * 0.9 <= real <= mine * (1 + 2e-3)


def test_more_time_or_more_memory_never_costs_more() -> None:
    limits = np.geomspace(0.03, 0.4, 30)
    less = value_under(ask_for(SPREAD), 1.0, limits, False)
    assert (np.diff(less, axis=1) >= -1e-9 * less[:, 1:]).all()
    more = value_under(ask_for(SPREAD, kv_capacity=900_000, colocated={"kv_capacity": 150_000}), 1.0, limits, False)
    assert (more >= less * (1 - 1e-3)).all()
    assert (more[:, -1] > less[:, -1] * 1.1).all()


def test_memory_holds_the_mean_and_its_margin() -> None:
    known = ask_for(SPREAD)
    ask, engine = demand(known), three(known)[2]
    n = 3 * most_batch(engine, ask)
    assert n * ask.theta + 3 * sqrt(n) * ask.deviation == pytest.approx(600_000)


# Limits in closed form


def test_without_prefill_work_colocated_and_pd_are_one() -> None:
    """Prompts that cost nothing and hold nothing leave nothing to tell the two apart."""
    light = {
        "attention": [{**ATTENTION, "prefill": 1e-16, "pairs": 0.0}],
        "ffn": [{**FFN, "prefill": 1e-16, "base": 1e-9}],
    }
    short = {"prompt": {"law": "constant", "value": 1}, "output": {"law": "constant", "value": 20_000}}
    known = ask_for(short, **light)
    ask = demand(known)
    same = [costs(engine, ask, np.array([0.05, inf])) for engine in three(known)[:2]]
    assert same[0] == pytest.approx(same[1], rel=1e-4)


def test_one_micro_batch_on_one_worker_and_one_server_costs_two_devices() -> None:
    """Without hops and with equal memory the roles only take turns."""
    known = ask_for(SPREAD, transfer=[{}], micro_batches=1, colocated={"kv_capacity": 600_000}, fleet=ONE)
    ask = demand(known)
    _, pd, afd = (serve(engine, ask) for engine in three(known))
    assert pd.bundle is not None and afd.bundle is not None
    assert afd.bundle.batch == pd.bundle.batch
    assert afd.tokens == pytest.approx(pd.tokens)
    assert afd.devices - afd.prefill == pytest.approx(2 * (pd.devices - pd.prefill))


ONE = {"most_attention": 1, "most_ffn": 1}


def test_with_memory_without_end_ways_cost_their_work() -> None:
    """Bases vanish per token; A = 4 F per token, so that four workers keep one server busy and neither waits."""
    theta = 1000 + 398 / 2
    attention = {**ATTENTION, "decode": 1.6e-6 - 1.3e-9 * theta}
    room = {"kv_capacity": 10**10, "colocated": {"kv_capacity": 10**10}, "transfer": [{}]}
    known = ask_for(attention=[attention], **room)
    ask = demand(known)
    _, pd, afd = three(known)
    work = 48 * (1.6e-6 + 4e-7)
    for engine in (pd, afd):
        spent = costs(engine, ask, np.array([inf]))[0] - engine.prefill / ask.decode
        assert spent == pytest.approx(work, rel=1e-3)


def stage(base: float, token: float) -> dict[str, float]:
    return {"base": base, "decode": token, "prefill": token}


positive = st.floats(0.1, 10.0)


@settings(max_examples=40, deadline=None)
@given(positive, positive, positive, positive, st.integers(50, 4000), st.floats(1.0, 20.0))
def test_afd_wins_exactly_if_weight_reads_save_more_than_roles_idle(
    a0: float, a: float, f0: float, f: float, group: int, more: float
) -> None:
    """alpha_0 (1/b - 1/B) + phi_0 (1/b - 1/(r B)) > (tau - A) / B + (tau - F) / (r B), by figures made by hand."""
    attention, ffn = stage(1e-4 * a0, 1e-6 * a), stage(1e-4 * f0, 1e-6 * f)
    short = {"prompt": {"law": "constant", "value": 1}, "output": {"law": "constant", "value": 3}}
    known = ask_for(
        short, attention=[attention], ffn=[ffn], transfer=[{}], pipeline="ideal", micro_batches=2, batch=1,
        kv_capacity=int(3 * group * more), colocated={"kv_capacity": 3 * group}, fleet={"most_attention": 9},
    )  # fmt: skip
    _, pd, afd = (serve(engine, demand(known)) for engine in three(known))
    assert pd.bundle is not None and afd.bundle is not None and pd.spent is not None and afd.spent is not None
    b, n, r = pd.bundle.batch, afd.bundle.batch, afd.bundle.ratio
    tau_a, tau_f = attention["base"] + attention["decode"] * n, ffn["base"] + ffn["decode"] * r * n
    tau = max(tau_a, tau_f)
    saved = attention["base"] * (1 / b - 1 / n) + ffn["base"] * (1 / b - 1 / (r * n))
    idle = (tau - tau_a) / n + (tau - tau_f) / (r * n)
    gain = 1 / pd.per_device - 1 / afd.per_device
    assert gain == pytest.approx(48 * (saved - idle), rel=1e-6, abs=1e-12)
    assert pd.spent.fixed - afd.spent.fixed == pytest.approx(48 * saved, rel=1e-6, abs=1e-12)
    assert afd.spent.waiting - pd.spent.waiting == pytest.approx(48 * idle, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("a0", "a", "f0", "f"), [(2, 5, 60, 0.5), (60, 5, 2, 0.5), (30, 2, 30, 2), (5, 40, 90, 1)])
@pytest.mark.parametrize("limit", [0.4, 2.0])
def test_with_memory_to_spare_the_limit_decides_by_a_closed_form(
    a0: float, a: float, f0: float, f: float, limit: float
) -> None:
    """Per layer PD costs (a + f) / (1 - (a0 + f0) / s), AFD a / (1 - M a0 / s) + f / (1 - M f0 / s), s = T / L.

    To first order AFD wins if M (a a0 + f f0) < (a + f) (a0 + f0): if the role with the large base has little work.
    """
    attention, ffn = stage(1e-5 * a0, 1e-6 * a), stage(1e-5 * f0, 1e-6 * f)
    short = {"prompt": {"law": "constant", "value": 1}, "output": {"law": "constant", "value": 3}}
    room = {"kv_capacity": 10**9, "colocated": {"kv_capacity": 10**9}}
    fleet = {"most_attention": 60, "most_ffn": 60} if f > a else {"most_attention": 200, "most_ffn": 3}
    known = ask_for(
        short, attention=[attention], ffn=[ffn], transfer=[{}], pipeline="ideal", micro_batches=2, fleet=fleet, **room
    )
    ask = demand(known)
    _, pd, afd = three(known)
    cost = [costs(e, ask, np.array([limit]))[0] - e.prefill / ask.decode for e in (pd, afd)]
    s, (a0, a, f0, f) = limit / 48, (1e-5 * a0, 1e-6 * a, 1e-5 * f0, 1e-6 * f)
    assert cost[0] == pytest.approx(48 * (a + f) / (1 - (a0 + f0) / s), rel=2e-3)
    closed = 48 * (a / (1 - 2 * a0 / s) + f / (1 - 2 * f0 / s))
    assert closed * (1 - 2e-3) <= cost[1] <= closed * 1.02  # only whole workers and servers
    first_order = (a + f) * (a0 + f0) - 2 * (a * a0 + f * f0)
    if abs(closed / cost[0] - 1) > 0.03:
        assert (cost[1] < cost[0]) == (first_order > 0)


# Accounts, whole devices, simulation


@pytest.fixture(scope="module")
def compared() -> WaysComparison:
    prices = {"attention_price": 1.4, "ffn_price": 2.8}
    ways = compare_ways(ask_for(SPREAD, fleet={"devices": 24, "most_attention": 8}, tpot=0.12, **prices))
    assert ways is not None
    return ways


def test_the_account_adds_up_to_the_device_time_of_a_token(compared: WaysComparison) -> None:
    for way in compared.served:
        assert way.spent is not None
        assert way.spent.total == pytest.approx(1 / way.per_device)
        assert min(way.spent.fixed, way.spent.work, way.spent.prefill) > 0
        assert way.spent.waiting > -1e-12
    assert compared.served[2].spent is not None and compared.served[2].spent.waiting > 0


def test_prices_decide_where_there_are_some(compared: WaysComparison) -> None:
    assert compared.priced
    by_device = compare_ways(compared.scenario, priced=False)
    assert by_device is not None and not by_device.priced
    for cheap, few in zip(compared.served, by_device.served, strict=True):
        assert cheap.per_dollar >= few.per_dollar * (1 - 1e-12)
        assert few.per_device >= cheap.per_device * (1 - 1e-12)
    pd = compared.served[1]
    assert pd.dollars == pytest.approx(1.4 * pd.devices)


def test_whole_devices_are_the_best_of_all_divisions(compared: WaysComparison) -> None:
    for engine, found in zip(three(compared.scenario), compared.whole, strict=True):
        makes = [0.0]
        for bundle, cycle in candidates(engine, compared.ask, compared.limit):
            each = bundle.attention_workers * bundle.batch / (48 * cycle)
            unit = bundle.attention_workers + bundle.ffn_servers if engine.way == "AFD" else 1
            for units in range(24 // unit + 1):
                for groups in range(24 - units * unit + 1):
                    prefill = groups * compared.ask.decode / engine.prefill if engine.prefill else inf
                    makes.append(min(units * each, prefill))
        assert found.tokens == pytest.approx(max(makes))
        assert found.devices <= 24
    assert compared.whole[2].bundle is not None


def test_the_simulated_ways_meet_the_theory(compared: WaysComparison) -> None:
    checked = check_ways(compared, 3)
    for way, check in zip(checked.served, checked.checks, strict=True):
        near = 0.04 if way.way == "colocated" else 0.015
        assert check.per_device == pytest.approx(way.per_device, rel=near)
        assert check.tpot == pytest.approx(way.tpot, rel=0.02)
    engine = three(compared.scenario)[1]
    assert prefill_seconds(compared, 3) == pytest.approx(engine.prefill, rel=0.03)


def test_a_group_of_several_workers_waits_for_the_fullest() -> None:
    """Eight workers share an FFN of eight devices; the theory's barrier is that of a bundle of one micro-batch."""
    spread = {"kv_capacity": 100_000, "exchange": True}
    known = ask_for(SPREAD, ffn_devices=8, colocated=spread, fleet=ONE)
    ask, (_, pd, _) = demand(known), three(known)
    group = serial(known.bundle).sized(8, 1, 20)
    assert pd.shapes == ((8, 1),) and group.transfer == known.bundle.transfer
    mine = cycles(pd, ask, 8, 1, np.array([20.0]))[0]
    assert mine == pytest.approx(barrier_cycle(group, ask.load, 8, 1), rel=1e-3)
    served = serve(pd, ask)
    assert served.devices - served.prefill == pytest.approx(8)


# What is said


def test_what_is_missing_is_said() -> None:
    bare = ask_for(colocated=None)
    assert "needs [pools.bundle.colocated]" in missing(bare)
    assert compare_ways(bare) is None
    mute = ask_for(ffn=[{"base": 1e-3}])
    assert "needs prefill coefficients" in missing(mute)
    own = {"kv_capacity": 9000, "ffn": [FFN]}
    assert missing(ask_for(ffn=[{"base": 1e-3}], colocated=own)) == ""


def test_a_way_that_cannot_hold_a_request_is_out() -> None:
    ways = compare_ways(ask_for(colocated={"kv_capacity": 1300}, fleet=ONE))
    assert ways is not None
    assert [way.limit for way in ways.served][:2] == ["the largest request exceeds its KV memory"] * 2
    assert ways.served[2].bundle is not None
    assert "nothing by" in ways.sentences()[0]
    tight = compare_ways(ask_for(tpot=0.01, fleet=ONE))
    assert tight is not None
    assert ways.ranked[0].way == "AFD" and "None of the ways serves" in tight.sentences()[0]


def test_groups_need_ffn_times_of_their_size() -> None:
    with pytest.raises(ScenarioError, match=r"give colocated\.ffn"):
        ask_for(colocated={"kv_capacity": 9000, "workers": 2})
    assert ask_for(colocated={"kv_capacity": 9000, "workers": 2, "ffn": [FFN]}).bundle.group_workers == 2


def test_groups_exchange_by_their_own_hops_or_none() -> None:
    own = {"kv_capacity": 9000, "exchange": True, "transfer": [{"base": 1e-6}]}
    assert serial(ask_for(colocated=own).bundle).transfer[0].base == 1e-6
    assert serial(ask_for(colocated={**own, "transfer": []}).bundle).transfer[0].base == HOP["base"]
    assert serial(ask_for(colocated={"kv_capacity": 9000}).bundle).transfer[0].base == 0
    with pytest.raises(ScenarioError, match=r"set colocated\.exchange = true"):
        ask_for(colocated={**own, "exchange": False})


def test_tables_name_ways_figures_and_reasons(compared: WaysComparison) -> None:
    console = Console(file=io.StringIO(), width=250)
    for part in ways_view(check_ways(compared, 1)):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("colocated", "PD", "AFD", "KV memory", "waiting", "tokens/s", "in 24 devices"))
    best = compared.ranked[0]
    assert f"{best.way} makes" in text and "per token AFD spends" in text
    data = compared.as_dict()
    assert [row["way"] for row in data["ways"]] == ["colocated", "PD", "AFD"]


def test_comparisons_of_ratios_carry_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ask_for(fleet={"most_attention": 2, "most_ffn": 1}).replace(**{"evaluation.requests": 20})
    found, again = (api.compare(known, ["afd-one"], seeds=1) for _ in range(2))
    assert isinstance(found, RatioComparison) and isinstance(again, RatioComparison)
    assert isinstance(found.ways, WaysComparison) and isinstance(again.ways, WaysComparison)
    assert len(found.ways.checks) == 3 and found.ways.checks == again.ways.checks
    monkeypatch.setattr("llmopt.plot_ratio.draw", lambda build, *data, kind: f"<svg>{build.__name__}</svg>".encode())
    pictures = ratio_pictures(found)
    assert pictures["ways"] == b"<svg>ways_figure</svg>"
    page = unescape(html_report(found, pictures))
    assert all(word in page for word in ("Three ways of serving", found.ways.sentences()[0], "ways_figure"))
    assert found.as_dict()["ways"]["ways"][2]["way"] == "AFD"


def test_comparisons_say_why_there_are_no_ways(capsys: pytest.CaptureFixture[str]) -> None:
    bare = ask_for(colocated=None, fleet=ONE).replace(**{"evaluation.requests": 20})
    found = api.compare(bare, ["afd-one"], seeds=1)
    console = Console(width=250)
    for part in comparison_view(found):
        console.print(part)
    assert missing(bare) in capsys.readouterr().out
    assert found.as_dict()["ways"] == missing(bare)


def test_map_tells_ties_from_leads_and_from_nothing(compared: WaysComparison) -> None:
    value = np.zeros((3, 1, 4))
    value[:, 0, 1] = (0.0, 0.0, 5.0)
    value[:, 0, 2] = (100.0, 99.5, 50.0)
    value[:, 0, 3] = (100.0, 150.0, 120.0)
    lead, tied, won = winners(replace(compared, value=value))
    assert won.tolist() == [[-1, 2, 0, 1]]
    assert tied.tolist() == [[False, False, True, False]]
    assert lead[0, 1] == inf and lead[0, 3] == pytest.approx(0.25)


def test_picture_has_regions_and_is_the_same_each_time(compared: WaysComparison) -> None:
    svg = draw(ways_figure, compared)
    assert svg == draw(ways_figure, compared)
    assert all(word in svg.decode() for word in ("colocated", "AFD", "TPOT limit (ms)", "prompts, times"))


def test_a_measured_ffn_table_is_used_as_it_is() -> None:
    table = {"tokens": [1, 100, 1000], "seconds": [9e-4, 9.4e-4, 1.3e-3]}
    like = {"ffn": [], "ffn_table": table, "transfer": [{}]}
    known, plain = ask_for(**like), ask_for(transfer=[{}])
    assert isinstance(known.bundle, Bundle) and missing(known) == ""
    pairs = zip(three(known), three(plain), strict=True)
    for mine, other in pairs:
        ask, limits = demand(known), np.array([0.08, inf])
        assert costs(mine, ask, limits) == pytest.approx(costs(other, ask, limits), rel=2e-3)


def test_groups_with_a_measured_table_are_simulated_by_it_and_not_by_its_hull() -> None:
    """Experts that few tokens visit make a concave table, whose convex hull is a quarter of it at 40 tokens."""
    table = {"tokens": [1, 10, 50, 100, 200, 1000, 10_000], "seconds": [7e-5, 3e-4, 6.5e-4, 8e-4, 1e-3, 1.4e-3, 7e-3]}
    compared = compare_ways(ask_for(ffn=[], ffn_table=table))
    assert compared is not None
    colocated, pd, _ = compared.served
    assert pd.bundle is not None and pd.bundle.table_hull[0].base < 1e-4
    checked = check_ways(compared, 3).checks
    assert checked[0].per_device == pytest.approx(colocated.per_device, rel=0.06)
    assert checked[1].per_device == pytest.approx(pd.per_device, rel=0.015)


def test_no_looser_limit_makes_less_where_a_measured_table_leaps() -> None:
    """Between 60 and 61 tokens a step gets half as long again, so that 60 are better than any more that fit."""
    table = {"tokens": [1, 60, 61, 1000], "seconds": [9e-4, 1e-3, 1.5e-3, 9e-3]}
    known = ask_for(ffn=[], ffn_table=table, transfer=[{}])
    ask, (_, pd, _) = demand(known), three(known)
    most = int(most_batch(pd, ask))
    made = [b / cycles(pd, ask, 1, 1, np.array([float(b)]))[0] for b in range(1, most + 1)]
    chosen = best_shape(pd, ask)
    assert chosen is not None and chosen[0].batch == int(np.argmax(made)) + 1 == 60 < most
    assert serve(pd, ask).limit == "FFN times"
    for engine in three(known):
        under = costs(engine, ask, np.linspace(0.05, 0.3, 200))
        assert (np.diff(under[np.isfinite(under)]) <= 1e-12).all()
