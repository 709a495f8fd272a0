"""docs/machines.md: every table says what the code computes now."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmopt.machines import accelerator, accelerator_names, kv_capacity, model_names, model_shape

TEXT = (Path(__file__).parents[1] / "docs" / "machines.md").read_text()
PERCENT = re.compile(r"([+-]?\d+(?:\.\d+)?) %")
POINTS = 0.02
"""How far a printed share may be from the computed one: a digit of rounding, and a profile read a little otherwise."""


def table(header: str) -> list[list[str]]:
    """Cells of the rows of the table whose first header cell is `header`."""
    lines = iter(TEXT.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            next(lines)
            return [[cell.strip() for cell in row.strip("|").split("|")] for row in _rows(lines)]
    raise AssertionError(header)


def _rows(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def percents(cell: str) -> list[float]:
    return [float(number) / 100 for number in PERCENT.findall(cell)]


def test_the_table_of_models_is_the_catalog() -> None:
    seen = set()
    for names, total, _, active, _, kv, _ in table("model")[: len(model_names())]:
        plain = re.sub(r"\(.*\)", "", names)
        for shape in map(model_shape, plain.split(", ")):
            seen.add(shape.name)
            assert float(total) == pytest.approx(shape.parameters / 1e9, abs=5e-3)
            assert int(kv.replace(",", "")) == shape.kv_bytes_per_token()
            if active:
                counted = shape.active_parameters - (shape.head_weights if "without" in active else 0)
                assert float(active.split()[0]) == pytest.approx(counted / 1e9, abs=5e-3)
            else:
                assert not shape.experts
    assert seen == set(model_names())


def test_the_table_of_accelerators_is_the_catalog() -> None:
    rows = [[cell.split(", ") for cell in row] for row in table("accelerator")]
    seen = set()
    for names, memory, bandwidth, bf16, fp8, link in rows:
        chips = [accelerator(f"A100 SXM {name}" if re.fullmatch(r"\d+GB", name) else name) for name in names]
        for chip, size, rate, width in zip(chips, memory * 2, bandwidth * 2, link * 2, strict=False):
            seen.add(chip.name)
            assert chip.gigabytes == int(size)
            found = [chip.bandwidth / 1e12, chip.flops["bf16"] / 1e12, chip.link_bandwidth / 1e9]
            assert found == pytest.approx([float(rate), float(bf16[0]), float(width)])
            assert chip.flops.get("fp8", 0.0) / 1e12 == pytest.approx(float(fp8[0]) if fp8[0] else 0.0)
    assert seen == set(accelerator_names())


def test_the_table_of_kv_capacities_is_what_is_computed() -> None:
    for _, gpu, model, setting, measured, computed, error in table("engine"):
        utilisation, batch = setting.split(", ")
        known = accelerator("RTX PRO 6000" if "PRO" in gpu else "RTX 4090")
        found = kv_capacity(
            model_shape(model),
            known,
            tensor_parallel=2 if gpu.startswith("2 x") else 1,
            expert_parallel=2 if "experts" in gpu else 1,
            utilisation=float(utilisation),
            max_batch=int(batch),
            memory_bytes=79.14 * 2**30 if "GiB" in gpu else None,
        ).tokens
        assert found == int(computed.replace(",", ""))
        assert found / int(measured.replace(",", "")) - 1 == pytest.approx(percents(error)[0], abs=6e-4)


def test_the_table_of_roofline_errors_is_what_profiles_say(shared: Path) -> None:
    """Every row again, by the command of the document."""
    from benchmarks.roofline_error import DENSE, EXPERTS, case

    rows = table("profile")
    assert len(rows) == len(DENSE) + len(EXPERTS)
    for (name, degree, whole, *regions, over), profile in zip(rows, (*DENSE, *EXPERTS), strict=True):
        one = case(shared / "data", *profile)
        one = one.touching_all if name.endswith("*") else one
        assert (name.rstrip(" *").split(", ")[1], int(degree)) == (one.shape.name, one.degree)
        error = np.abs(one.error)
        assert [np.median(error), np.quantile(error, 0.95)] == pytest.approx(percents(whole), abs=POINTS)
        for region, cell in enumerate(regions):
            part = one.error[one.region == region]
            assert [np.median(np.abs(part)), np.median(part)] == pytest.approx(percents(cell), abs=POINTS)
        assert one.over_floor == pytest.approx(float(over), abs=0.05)
        assert one.over_floor > 1


def test_default_efficiencies_are_nearest_to_the_dense_profiles(shared: Path) -> None:
    from benchmarks.roofline_error import DENSE, best, case
    from llmopt.machines.roofline import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY

    _, compute, bandwidth = best([case(shared / "data", *profile) for profile in DENSE])
    assert (compute, bandwidth) == pytest.approx((COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY), abs=0.026)


def test_engines_that_served_are_as_the_document_says(shared: Path) -> None:
    from benchmarks.roofline_error import served

    points = served(shared / "data/aiconfigurator/silicon_sample.csv")
    engines = {"TensorRT-LLM": "trtllm", "vLLM": "vllm", "SGLang": "sglang"}
    said = table("model | weights")
    for model, weights, engine, count, ratio, errors in said:
        chosen = (points.model == model) & (points.engine == engines[engine])
        group = points[chosen & (points.weights == ("bf16" if "not stated" in weights else weights))]
        assert len(group) == int(count)
        assert group.ratio.median() == pytest.approx(float(ratio), abs=0.02)
        error = (group.ratio - 1).abs()
        assert [error.median(), error.quantile(0.95)] == pytest.approx(percents(errors), abs=POINTS)
    assert len(points) == 780
    assert points.floor.max() == pytest.approx(0.78, abs=0.01), "no engine is faster than physics allows"
