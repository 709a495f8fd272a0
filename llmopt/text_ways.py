"""What is printed of the three ways of serving: one row each, where device time goes, and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, nan

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmopt.tables import grid, number
from llmopt.ways_report import Check, WaysComparison
from llmopt.ways_served import Served

COLUMNS = ("batch", "tokens/s per device", "tokens per USD", "TPOT (ms)", "simulated", "TPOT (ms)")


def ways_view(ways: WaysComparison) -> Iterator[RenderableType]:
    """The ways at the scenario's TPOT limit, the account of their device time, and sentences."""
    limit = f"at most {number(1e3 * ways.limit)} ms" if isfinite(ways.limit) else "not limited"
    yield Text(f"Three ways of serving the same load, each at its best batch; TPOT {limit}", style="italic")
    yield _figures(ways)
    yield _account(ways)
    for sentence in ways.sentences():
        yield Text(sentence)


def devices_of(way: Served) -> str:
    """Accelerators by role of one bundle or group, such as `15A + 4F + 3.2P`."""
    if way.bundle is None:
        return "–"
    b = way.bundle
    group = b.attention_workers * b.attention_devices
    decode = f"{group}A + {b.ffn_servers * b.ffn_devices}F" if way.way == "AFD" else f"{group}"
    prefill = way.devices - (b.devices if way.way == "AFD" else group)
    return f"{decode} + {number(prefill)}P" if prefill > 1e-9 else decode


def _figures(ways: WaysComparison) -> Table:
    whole = [f"in {ways.scenario.fleet.devices} devices"] if ways.whole else []
    table = grid("way", "devices", "limited by", right=(*COLUMNS, *whole))
    checks = {check.way: check for check in ways.checks}
    for k, way in enumerate(ways.served):
        table.add_row(*_row(way, checks.get(way.way)), *(_whole(ways, k) for _ in whole))
    return table


def _row(way: Served, check: Check | None) -> list[str]:
    if way.bundle is None:
        return [way.way, "–", way.limit, *["–"] * len(COLUMNS)]
    bundle = way.bundle
    batch = f"{bundle.micro_batches} x {bundle.batch}" if way.way == "AFD" else str(bundle.batch)
    binds = f"{way.limit}; {way.regime}" if way.way == "AFD" else way.limit
    found = ["–", "–"]
    if check is not None:
        off = check.per_device / way.per_device - 1
        found = [f"{number(check.per_device, 4)} ({off:+.1%})", number(1e3 * check.tpot)]
    figures = [number(way.per_device, 4), number(way.per_dollar, 4), number(1e3 * way.tpot)]
    return [way.way, devices_of(way), binds, batch, *figures, *found]


def _whole(ways: WaysComparison, k: int) -> str:
    """Bundles or groups and prefill groups, and their tokens/s, such as `5 x 7A-2F + 16P: 103,198`."""
    found, bundle = ways.whole[k], ways.whole[k].bundle
    if bundle is None:
        return "none"
    shape = f" x {bundle.attention_workers}A-{bundle.ffn_servers}F" if ways.served[k].way == "AFD" else ""
    prefill = f" + {found.prefill}P" if found.prefill else ""
    return f"{found.units}{shape}{prefill}: {number(found.tokens)} tokens/s"


def _account(ways: WaysComparison) -> Table:
    """Device time of one output token, in microseconds."""
    table = grid("device time of a token (us)", right=("fixed", "decode work", "prefill", "waiting", "in all"))
    for way in ways.served:
        spent = way.spent
        parts = (spent.fixed, spent.work, spent.prefill, spent.waiting, spent.total) if spent else (nan,) * 5
        table.add_row(way.way, *(number(1e6 * max(part, 0.0)) if part > 5e-10 else "0" for part in parts))
    return table
