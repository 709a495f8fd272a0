"""The benchmark runs; its figures are for people."""

from __future__ import annotations

import pytest

from benchmarks import simulator


def test_the_benchmark_measures_both_cores_and_the_oracle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "FEW", 20)
    scenario = simulator.on_replicas(6, None)
    requests = scenario.workload.sample(120.0, 1).head(100)
    report = simulator.Report()
    simulator.speed(report, scenario, requests, 1)
    simulator.engines(report, scenario, requests, 1)
    simulator.scaling(report, requests, None, 20_000)
    lines = capsys.readouterr().out.splitlines()
    assert sum("requests/s" in line for line in lines) == 8
    assert sum("times the plain pool" in line for line in lines) == 3
    assert any("20000 requests on 8 replicas" in line for line in lines)
