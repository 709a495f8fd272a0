"""KV capacity, roofline and floor against measurements, closed forms, and programs written a second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmopt.arrays import Floats
from llmopt.assess import assess
from llmopt.catalog import catalog_entry, catalog_names
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.limits import pool_physics
from llmopt.machines import (
    accelerator,
    accelerator_names,
    floor,
    kv_capacity,
    model_names,
    model_shape,
    roofline,
    violations,
)
from llmopt.machines.physics import TOLERANCE, describe, probe
from llmopt.reading import load_scenario
from llmopt.scenario import Pool
from tests.factories import pool, scenario

SPLITWISE = {"A100": ({128: 81, 1024: 377, 4096: 1485}, 54.8), "H100": ({128: 48, 1024: 158, 4096: 643}, 37.4)}
"""Llama-2-70B on two GPUs, ms by prompt tokens and of a decode step: medians of splitwise-sim's perf_model.csv."""
LENT = {"expert_parallel": 2}
MEASURED = [
    # KV tokens of one engine: vLLM 0.19, then three of vLLM 0.28 (casys-kaist/LLMServingSim, bench: meta.json).
    ("Llama-3.1-8B", "RTX 4090", 25_250_627_584, {"utilisation": 0.9, "max_batch": 256}, 41_408),
    ("Llama-3.1-8B", "RTX PRO 6000", 101_976_440_832, {"utilisation": 0.92, "max_batch": 128}, 574_608),
    (
        "Qwen3-32B",
        "RTX PRO 6000",
        101_976_440_832,
        {"utilisation": 0.92, "max_batch": 128, "tensor_parallel": 2},
        462_144,
    ),
    ("Qwen3-30B-A3B", "RTX PRO 6000", 101_976_440_832, {"utilisation": 0.92, "max_batch": 128, **LENT}, 605_104),
    # vLLM 0.6: 54.93 GiB for the cache of a GPU of 79.14 GiB.
    ("Llama-3.1-8B", "H100", 79.14 * 2**30, {"utilisation": 0.9, "max_batch": 256}, 54.93 * 2**30 / 131_072),
]


def features(*rows: tuple[float, float, float, float]) -> Floats:
    return np.array(rows, dtype=float)


@pytest.mark.parametrize(("model", "gpu", "memory", "settings", "tokens"), MEASURED)
def test_kv_capacity_is_what_engines_report(
    model: str, gpu: str, memory: float, settings: dict[str, float], tokens: int
) -> None:
    """Within 2.5 %: the engines' own estimates of graphs and sampling differ by more than that between versions."""
    found = kv_capacity(model_shape(model), accelerator(gpu), memory_bytes=memory, **settings)  # type: ignore[arg-type]
    assert found.tokens == pytest.approx(tokens, rel=0.025)


def test_kv_capacity_is_what_another_engine_reports(shared: Path) -> None:
    """DistServe's engine on A100 80GB, all three OPT sizes: its file does not state the utilisation; 0.945 fits all."""
    rows = [line.split(",") for line in (shared / "data/distserve/max_num_tokens.csv").read_text().splitlines()[1:]]
    for model, tp, pp, tokens in rows:
        if pp == "1":
            found = kv_capacity(model_shape(model), accelerator("A100"), tensor_parallel=int(tp), utilisation=0.945)
            assert found.tokens == pytest.approx(int(tokens), rel=0.03)


def test_the_sum_of_kv_capacity_is_the_capacity() -> None:
    """By hand: 0.9 x 25.25 GB - 16.06 GB - (38 x 256 x 128256 + 2048 x 4096 x 2) - 80 MB, at 131072 bytes a token."""
    found = kv_capacity(model_shape("Llama-3.1-8B"), accelerator("RTX 4090"))
    left = 0.9 * 25_250_627_584 - 2 * 8_030_261_248 - 38 * 256 * 128_256 - 2048 * 4096 * 2 - 80e6
    assert found.cache_bytes == pytest.approx(left)
    assert found.tokens == int(left / 131_072) // 16 * 16
    text = "\n".join(found.lines())
    assert "14.958 GiB  weights: 8,030,261,248 parameters in bf16" in text
    assert "CUDA graphs are not subtracted" in text


def test_a_wide_layer_counts_where_it_is_larger_than_sampling() -> None:
    """16384 tokens through 3 x 14336 numbers and two residuals, for a batch of 8."""
    found = kv_capacity(model_shape("Llama-3.1-8B"), accelerator("H100"), token_budget=16_384, max_batch=8)
    activations = next(part for part in found.parts if part.name == "activations")
    assert -activations.bytes == 16_384 * 2 * (3 * 14_336 + 2 * 4096)
    assert "widest layer" in activations.source


def test_latent_attention_is_not_divided_among_gpus() -> None:
    found = kv_capacity(model_shape("DeepSeek-V3"), accelerator("H200"), tensor_parallel=8)
    assert found.bytes_per_token == 70_272
    grouped = kv_capacity(model_shape("Qwen3-30B-A3B"), accelerator("H200"), tensor_parallel=8)
    assert grouped.bytes_per_token == 48 * 2 * 128 * 2, "4 KV heads on 8 GPUs: one each"


@given(st.sampled_from(model_names()), st.sampled_from(accelerator_names()), st.sampled_from([1, 2, 4, 8]))
def test_more_memory_or_less_precision_never_holds_fewer_tokens(model: str, gpu: str, tp: int) -> None:
    shape, chip = model_shape(model), accelerator(gpu)
    try:
        found = kv_capacity(shape, chip, tensor_parallel=tp).tokens
    except ScenarioError as error:
        assert "leaves no KV memory" in str(error) or shape.heads % tp
        return
    assert found % 16 == 0
    assert kv_capacity(shape, chip, tensor_parallel=tp, utilisation=0.95).tokens >= found
    assert kv_capacity(shape, chip, tensor_parallel=tp, kv_precision="fp8").tokens >= 2 * found
    assert kv_capacity(shape, chip, tensor_parallel=tp, max_batch=512).tokens <= found


def test_a_model_too_large_is_refused_with_figures() -> None:
    with pytest.raises(
        ScenarioError, match=r"Llama-2-70B leaves no KV memory on 1 x H100 SXM: .* of 71.3 GiB of each; raise"
    ):
        kv_capacity(model_shape("Llama-2-70B"), accelerator("H100"))


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_roofline_gives_the_constants_derived_by_hand(gpu: str) -> None:
    """The catalog's entries for Llama-3.1-8B, derived from the same peaks at 0.6 and 0.8, and what they leave out.

    That is 10 kernels a layer, and norms (8 x 4096 numbers), rotary embedding (2 x 5120) and activation (3 x 14336).
    """
    kernels, elementwise = 32 * 10 * 3e-6, 32 * 2 * (8 * 4096 + 2 * 5120 + 3 * 14336)
    entry = catalog_entry(f"{gpu}-llama31-8b").pool
    chip = accelerator(entry["accelerator"])
    pieces = roofline(model_shape(entry["model"]), chip, compute_efficiency=0.6, bandwidth_efficiency=0.8)
    moved = elementwise / (0.8 * chip.bandwidth)
    left_out = {"base": kernels, "prefill": moved, "decode": moved}
    for piece, given_ in zip(pieces, entry["step_time"], strict=True):
        for key in ("base", "prefill", "decode", "kv", "pairs"):
            found = getattr(piece, key) - left_out.get(key, 0.0)
            assert found == pytest.approx(given_.get(key, 0.0), rel=4e-3, abs=1e-12)


def test_tensor_parallelism_divides_work_and_adds_two_reduces_a_layer() -> None:
    shape, chip = model_shape("Llama-2-70B"), accelerator("A100")
    (one, _), (four, _) = (roofline(shape, chip, tensor_parallel=n, link_efficiency=1.0) for n in (1, 4))
    kernels, norms = 80 * 10 * 3e-6, 80 * 2 * 8 * 8192 / (0.75 * 2.039e12)
    assert four.base == pytest.approx((one.base - kernels) / 4 + kernels + 2 * 80 * 1e-5)
    assert four.kv == pytest.approx(one.kv / 4)
    reduces = 2 * 80 * (2 * 3 / 4) * 8192 * 2 / 300e9
    assert four.prefill == pytest.approx((one.prefill - norms) / 4 + norms + reduces)


def test_experts_of_a_batch_never_read_more_than_the_roofline_says() -> None:
    """Tokens draw 8 of 128 experts at random; the weights that they touch lie between floor and roofline."""
    shape, chip, rng = model_shape("Qwen3-30B-A3B"), accelerator("H100"), np.random.default_rng(1)
    least = floor(shape, chip).step_time.coefficients[0, 0] * chip.bandwidth
    kernels = 48 * 14 * 3e-6
    most = (roofline(shape, chip, bandwidth_efficiency=1.0)[0].base - kernels) * chip.bandwidth
    for tokens in (1, 4, 48, 200):
        usual = (roofline(shape, chip, bandwidth_efficiency=1.0, tokens=tokens)[0].base - kernels) * chip.bandwidth
        touched = len(np.unique([rng.choice(128, 8, replace=False) for _ in range(tokens)]))
        read = shape.step_bytes(experts=touched)
        assert least <= read <= most
        assert usual == pytest.approx(read, rel=0.1)
        if tokens == 1:
            assert read == least
        if tokens == 200:
            assert read == pytest.approx(most, rel=0.01)


STEPS = st.tuples(st.integers(0, 8192), st.integers(0, 512), st.floats(1, 8192), st.floats(0, 8192))


@given(st.sampled_from(model_names()), st.sampled_from(accelerator_names()), st.sampled_from([1, 2, 8]), STEPS)
def test_no_roofline_is_below_the_floor(model: str, gpu: str, tp: int, step: tuple[int, int, float, float]) -> None:
    shape, chip = model_shape(model), accelerator(gpu)
    assume(shape.heads % tp == 0)
    prefill, decode, context, cached = step
    row = features((prefill, decode, decode * context, prefill * (cached + prefill / 2)))
    guess = StepTime.from_pieces(roofline(shape, chip, tensor_parallel=tp))
    limit = floor(shape, chip, tensor_parallel=tp)
    assert guess.many(row)[0] >= limit.many(row)[0]
    assert not violations(guess, limit, row)


def test_the_floor_is_the_work_of_a_step_counted_product_by_product() -> None:
    """A second program: every product of a step of Llama-3.1-8B as loops over sequences, layers and operands."""
    prompts, contexts = [(300, 0), (100, 512)], [700, 1500, 64]
    tokens = sum(new for new, _ in prompts) + len(contexts)
    operations = read = 0.0
    for _layer in range(32):
        for inner, outer in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)):
            operations += 2 * tokens * inner * outer
            read += 2 * inner * outer
        for new, cached in prompts:
            operations += 2 * 32 * 2 * 128 * new * (cached + new / 2)
        for context in contexts:
            operations += 2 * 32 * 2 * 128 * context
            read += 2 * 2 * 8 * 128 * context
    operations += 2 * len(contexts) * 4096 * 128_256
    read += 2 * 4096 * 128_256 + 2 * 65 * 4096
    chip = accelerator("H100")
    row = features((400, 3, sum(contexts), sum(new * (cached + new / 2) for new, cached in prompts)))
    expected = max(operations / chip.flops["bf16"], read / chip.bandwidth)
    assert floor(model_shape("Llama-3.1-8B"), chip).many(row)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gpu", SPLITWISE)
def test_the_floor_is_below_what_was_measured(gpu: str) -> None:
    """Efficiencies of 42 to 63 % of the peaks: real engines cannot be caught."""
    limit = floor(model_shape("Llama-2-70B"), accelerator(gpu), tensor_parallel=2)
    prompts, decode = SPLITWISE[gpu]
    for tokens, measured in prompts.items():
        assert 0.4 < limit.many(features((tokens, 0, 0, tokens**2 / 2)))[0] * 1e3 / measured < 0.65
    assert 0.5 < limit.many(features((0, 1, 1024, 0)))[0] * 1e3 / decode < 0.65


def test_a_simulator_at_six_times_the_peak_is_caught_with_the_figure() -> None:
    """137 GFLOP a token of Llama-2-70B at six times 312 TFLOP/s."""
    limit = floor(model_shape("Llama-2-70B"), accelerator("A100"))
    fast = StepTime(
        np.array([[0.07, 0.0, 0.0, 0.0, 0.0], [0.0, 136.9e9 / (6 * 312e12), 0.0, 0.0, 2.63e6 / (6 * 312e12)]])
    )
    found = violations(fast, limit, features((64, 0, 0, 2048), (2048, 0, 0, 2048**2 / 2)))
    assert (found.count, found.worst) == (1, pytest.approx(6, rel=0.01))
    assert found.sentence == (
        "prefill of 2048 tokens takes 153 ms, 6 times faster than the 916 ms "
        "that the 312 TFLOP/s of A100 SXM 80GB allow"
    )
    slow = StepTime(fast.coefficients * 6.0)
    assert not violations(slow, limit, found.features)


def test_a_step_that_reads_faster_than_memory_is_caught() -> None:
    limit = floor(model_shape("Llama-3.1-8B"), accelerator("RTX 4090"))
    found = violations(StepTime(np.array([[1e-3, 0, 0, 0, 0.0]])), limit, features((0, 8, 8000, 0)))
    assert found.sentence.startswith("decode of 8 sequences with 1000 KV tokens each takes 1 ms, 16 times faster")
    assert "1.008 TB/s of RTX 4090" in found.sentence
    free = violations(StepTime(np.array([[0, 1e-3, 0, 0, 0.0]])), limit, features((0, 8, 8000, 0)))
    assert free.worst == np.inf
    assert "takes no time" in free.sentence


def test_the_tolerance_is_for_clocks_not_for_wishes() -> None:
    limit = floor(model_shape("Llama-3.1-8B"), accelerator("RTX 4090"))
    row = features((0, 8, 8000, 0))
    for factor, caught in ((1 / 1.04, False), (1 / 1.06, True)):
        assert bool(violations(StepTime(limit.step_time.coefficients * factor), limit, row)) is caught
    assert 1 < TOLERANCE < 1.1


def test_steps_in_words() -> None:
    assert describe(np.array([1.0, 0, 0, 0.5])) == "prefill of 1 token"
    assert (
        describe(np.array([512.0, 2, 300, 0]))
        == "prefill of 512 tokens and decode of 2 sequences with 150 KV tokens each"
    )
    assert describe(np.zeros(4)) == "an empty step"


@given(st.integers(1, 10**8), st.integers(1, 10**6), st.integers(1, 10**8), st.integers(1, 10**6) | st.none())
def test_probes_stay_within_the_pool(budget: int, batch: int, capacity: int, chunk: int | None) -> None:
    steps = probe(budget, batch, capacity, chunk)
    assert 0 < len(steps) < 1000
    assert (steps[:, 0] + steps[:, 1] <= budget).all()
    assert (steps[:, 1] <= batch).all()
    assert (steps[:, 2] <= capacity).all()


@pytest.mark.parametrize("name", [name for name in catalog_names() if not name.startswith("afd-")])
def test_catalog_entries_respect_physics_but_for_a_constant_batch_time(name: str) -> None:
    checked = pool_physics(Pool.model_validate({"name": "p", "replicas": 1, **catalog_entry(name).pool}))
    assert checked is not None
    if name == "nie-a100-llama3-8b":
        assert checked.impossible
        assert "the same for every batch, a mean as in queueing models" in checked.sentence
    else:
        assert not checked.impossible
        assert "the fastest need" in checked.sentence


def test_pools_of_unknown_machines_are_left_alone() -> None:
    assert pool_physics(Pool.model_validate(pool())) is None
    assert pool_physics(Pool.model_validate(pool(model="Llama-3.1-8B", accelerator="quantum"))) is None


def test_the_stability_report_says_what_physics_says() -> None:
    """10 ms for any step: a prefill of 4096 tokens of an 8B model needs 58 ms on an H100."""
    told = scenario([pool(model="Llama-3.1-8B", accelerator="H100"), pool("free")])
    report = assess(told)
    fast, unknown = report.pools
    assert unknown.physics is None
    assert fast.physics is not None
    assert fast.physics.impossible
    assert fast.physics.sentence in report.sentences
    assert fast.physics.sentence in fast.caveats
    assert report.as_dict()["pools"][0]["physics"]["worst"] > 5


GUESSED = """
[workload]
rate = 3.0
[[workload.classes]]
name = "chat"
share = 1.0
prompt = { law = "constant", value = 1000 }
output = { law = "constant", value = 200 }
[[pools]]
name = "new"
replicas = 1
accelerator = "H100 SXM"
model = "Qwen3-32B"
"""


def test_a_pool_without_profile_gets_roofline_and_capacity(tmp_path: Path) -> None:
    path = tmp_path / "guess.toml"
    path.write_text(GUESSED + "tensor_parallel = 2\nmax_batch = 64\n")
    (found,) = load_scenario(path).pools
    shape, chip = model_shape("Qwen3-32B"), accelerator("H100 SXM")
    assert found.step_time == roofline(shape, chip, tensor_parallel=2)
    assert found.kv_capacity == kv_capacity(shape, chip, tensor_parallel=2, max_batch=64).tokens
    assert "roofline of 2 x H100 SXM" in found.source
    assert "not measured" in found.source
    path.write_text(GUESSED + "tensor_parallel = 2\nkv_capacity = 50000\n")
    assert load_scenario(path).pools[0].kv_capacity == 50_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            GUESSED.replace("Qwen3-32B", "Qwen3-33B"),
            r"pools\[0\]: model 'Qwen3-33B' is not in the catalog.*kv_capacity and step_time",
        ),
        (GUESSED.replace("H100 SXM", "H1000"), r"accelerator 'H1000' is not in the catalog"),
        (GUESSED.replace("H100 SXM", "RTX 4090"), "leaves no KV memory on 1 x RTX 4090"),
        (GUESSED + "tensor_parallel = 0\n", r"tensor_parallel = 0 must be at least 1"),
        (GUESSED.replace('model = "Qwen3-32B"\n', ""), r"pools\[0\].step_time is missing"),
    ],
)
def test_what_cannot_be_guessed_is_refused_in_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "guess.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        load_scenario(path)
