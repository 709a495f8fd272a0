"""Profiles of Vidur, Frontier, aiconfigurator and DistServe, on files written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from profile_files import DENSE, decode_us, kernel_attention, kernels, network, prefill_us

from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines import accelerator, model_shape
from llmopt.machines.roofline import BANDWIDTH_EFFICIENCY
from llmopt.profiles import compose, find_profile, load_step_table, operators, read_distserve, read_profile
from llmopt.profiles.grids import behind_context, thinned
from llmopt.profiles.transfers import rising

GPU, MODEL = "A100", "Llama-2-70B"


def vidur(folder: Path, mlp: pd.DataFrame | None = None, attention: pd.DataFrame | None = None) -> Path:
    (kernels() if mlp is None else mlp).to_csv(folder / "a100_Llama-2-70b-hf_mlp.csv", index=False)
    some = kernel_attention() if attention is None else attention
    some.to_csv(folder / "a100_llama2-70b_tp2_attention_2024-05.csv", index=False)
    network().to_csv(folder / "net_a100_dgx_all_reduce.csv", index=False)
    return folder


def step_ms(degree: int, chunk: float, cached: float, batch: float, context: float, reduce_ms: float) -> float:
    """A Llama-2-70B step in closed form: two additions a layer, the last norm as the first, the head by its width."""
    tokens = chunk + batch
    time = {name: (a + b * tokens) / degree for name, (a, b) in DENSE.items()}
    layer = 4 * time["layernorm"]  # two norms, and two additions that take as long
    layer += sum(time[n] for n in ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj"))
    attention = prefill_us(chunk, cached) / degree + 1.0 if chunk else 0.0
    attention += decode_us(batch, context) / degree + 1.0 if batch else 0.0
    a, b = DENSE["gate_up_proj"]
    head = (a + b * (batch + (chunk > 0))) / degree * 32000 / (2 * 28672)
    return 80 * (layer + attention) / 1000 + (time["embedding"] + time["layernorm"] + head) / 1000 + 160 * reduce_ms


def reduce_ms(tokens: float) -> float:
    return 0.02 + tokens * 8192 * 2 / 1.5e11 * 1e3


@pytest.mark.parametrize("layout", ["flat", "native"])
@pytest.mark.parametrize(
    ("chunk", "cached", "batch", "context"), [(1024, 0, 0, 0), (256, 1024, 0, 0), (0, 0, 1, 700), (0, 0, 50, 2000)]
)
def test_a_step_of_vidurs_kernels(
    tmp_path: Path, layout: str, chunk: int, cached: int, batch: int, context: int
) -> None:
    if layout == "flat":
        vidur(tmp_path)
    else:
        home = tmp_path / "compute" / "a100" / "meta-llama" / "Llama-2-70b-hf"
        home.mkdir(parents=True)
        kernels().to_csv(home / "mlp.csv", index=False)
        kernel_attention().to_csv(home / "attention.csv", index=False)
        (tmp_path / "network" / "a100_dgx").mkdir(parents=True)
        network().to_csv(tmp_path / "network" / "a100_dgx" / "allreduce.csv", index=False)
    table = load_step_table(tmp_path, GPU, MODEL, tensor_parallel=2)
    expected = step_ms(2, chunk, cached, batch, context, reduce_ms(chunk + batch)) * 1e-3
    found = table(chunk, batch, batch * context, chunk * (cached + chunk / 2))
    assert found == pytest.approx(expected, rel=2e-3)
    assert not table.separate
    assert any(note.startswith("lm_head: not measured") for note in table.notes)


def test_contexts_that_were_not_measured_behind_long_chunks_follow_those_that_were(tmp_path: Path) -> None:
    profile = find_profile(vidur(tmp_path), GPU, MODEL, tensor_parallel=2)
    assert profile.prefill is not None
    # 2048 tokens behind 4032: only contexts up to 2048 fit into the 4096 tokens that were profiled
    found = profile.prefill(np.array([2048.0]), np.array([4032.0]))[0]
    assert found == pytest.approx(prefill_us(2048, 4032) / 2 * 1e-6 + 1e-6, rel=1e-6)
    assert profile.prefill.extended == pytest.approx(3 / 25)


def test_with_fresh_prompts_only_cached_context_costs_the_same_pair_for_pair() -> None:
    chunk = np.array([16.0, 256, 1024, 4096])
    fresh = 1e-6 * (5.0 + 3e-5 * chunk**2 / 2)
    grid = behind_context((chunk, np.array([0.0])), fresh[:, None])
    assert grid(np.array([512.0]), np.array([2000.0]))[0] - grid(np.array([512.0]), np.array([0.0]))[
        0
    ] == pytest.approx(3e-5 * 512 * 2000 * 1e-6)
    assert grid.limits == (4096.0, 0.0)
    assert grid.extended == 0.5


def test_thinning_keeps_a_percent(tmp_path: Path) -> None:
    profile = find_profile(vidur(tmp_path), GPU, MODEL, tensor_parallel=2)
    assert profile.prefill is not None
    few = thinned(profile.prefill, (25, 25))
    points = [mesh.ravel() for mesh in np.meshgrid(*profile.prefill.axes, indexing="ij")]
    assert few(*points) == pytest.approx(profile.prefill(*points), rel=0.03)
    assert [axis[-1] for axis in few.axes] == [axis[-1] for axis in profile.prefill.axes]


def test_repeated_rows_give_their_median_unless_they_contradict(tmp_path: Path) -> None:
    some = kernels()
    again = some[some.num_tokens == 64].copy()
    column = "time_stats.mlp_up_proj.median"
    profile = find_profile(
        vidur(tmp_path, pd.concat([some, again.assign(**{column: again[column] * 1.2})])), GPU, MODEL
    )
    at = profile.tokens["gate_up_proj"]
    assert at(np.array([64.0]))[0] == pytest.approx(1.1e-6 * (200 + 1.4 * 64))
    vidur(tmp_path, pd.concat([some, again.assign(**{column: again[column] * 4})]))
    with pytest.raises(ScenarioError, match=r"mlp\.csv: line \d+: is a duplicate that contradicts another row"):
        find_profile(tmp_path, GPU, MODEL)


def without(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda d: d.drop(columns=column)


def worth(column: str, value: float, row: int = 3) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda d: d.assign(**{column: d[column].where(np.arange(len(d)) != row, value)})


UP, DECODE, PREFILL = (f"time_stats.{n}.median" for n in ("mlp_up_proj", "attn_decode", "attn_prefill"))
BAD = {
    "negative": ("mlp", worth(UP, -1.0, 11), ["mlp.csv: line 13", f"{UP} = -1.0"]),
    "nan": ("mlp", worth(UP, np.nan, 11), ["mlp.csv: line 13", "no positive time"]),
    "missing operator": ("mlp", without(UP), ["lacks the operator gate_up_proj"]),
    "missing kernel": ("attention", without(DECODE), [f"no column '{DECODE}'"]),
    "zero kernel": ("attention", worth(PREFILL, 0.0, 40), ["attention", "line 42", "no positive time"]),
    "no decode": ("attention", lambda d: d[d.is_prefill], ["no rows of attn_decode"]),
    "no tokens": ("mlp", without("num_tokens"), ["no column 'num_tokens'"]),
    "degree": ("mlp", lambda d: d[d.num_tensor_parallel_workers == 1], ["tensor_parallel = 2 was not profiled"]),
    "several models": ("mlp", worth("n_embd", 4096.0, 9), ["n_embd has several values (4096, 8192)"]),
    "falls": ("mlp", worth(UP, 0.01, 15), ["line 17", "gate_up_proj takes 10 us at 2048 tokens"]),
}


@pytest.mark.parametrize(("kind", "edit", "words"), BAD.values(), ids=BAD)
def test_bad_kernels_are_refused_in_one_sentence(
    tmp_path: Path, kind: str, edit: Callable[[pd.DataFrame], pd.DataFrame], words: list[str]
) -> None:
    frames = {"mlp": kernels(), "attention": kernel_attention()}
    frames[kind] = edit(frames[kind])
    vidur(tmp_path, **frames)
    with pytest.raises(ScenarioError) as error:
        load_step_table(tmp_path, GPU, MODEL, tensor_parallel=2)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_profile_of_other_heads_is_refused(tmp_path: Path) -> None:
    vidur(tmp_path, kernels(kv=64), kernel_attention(kv=64))
    with pytest.raises(ScenarioError, match="measured with kv_heads = 64, but Llama-2-70B has 8"):
        load_step_table(tmp_path, GPU, MODEL, tensor_parallel=2)


def test_without_attention_it_says_so(tmp_path: Path) -> None:
    kernels().to_csv(tmp_path / "h100_Llama-2-70b-hf_mlp.csv", index=False)
    with pytest.raises(ScenarioError, match=r"lacks the operator attention .*h100_Llama-2-70b-hf_mlp\.csv"):
        load_step_table(tmp_path, "H100", MODEL)
    assert find_profile(tmp_path, "H100", MODEL).tokens["o_proj"].at[-1] == 2048


def test_several_degrees_in_a_file_need_a_name(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="degrees in it are 1, 2; name one"):
        read_profile(vidur(tmp_path))
    kernels((4,)).to_csv(tmp_path / "a100_Llama-2-70b-hf_mlp.csv", index=False)
    kernel_attention((4,)).to_csv(tmp_path / "a100_llama2-70b_tp2_attention_2024-05.csv", index=False)
    assert read_profile(tmp_path).tensor_parallel == 4


def test_transfers_never_fall_and_are_those_of_one_node(tmp_path: Path) -> None:
    profile = find_profile(vidur(tmp_path), GPU, MODEL, tensor_parallel=2)
    assert profile.all_reduce is not None
    assert profile.all_reduce(np.array([1e6, 6e7])) == pytest.approx([2e-5 + 1e6 / 1.5e11, 2e-5 + 6e7 / 1.5e11])
    noisy = rising(np.array([1.0, 2, 2, 3, 4]), np.array([5.0, 9, 7, 2, 10]))
    # the least-squares rising sequence through 5, 8, 2, 10: the first three pool to their mean
    assert noisy.seconds == pytest.approx([5.0, 5.0, 5.0, 10.0])


def frontier(folder: Path) -> Path:
    """Frontier's additions: precision, unequal prompts in a batch, true mixed batches, and experts."""
    some = kernel_attention((1, 2), heads=32, kv=4, hidden=2048)
    extra = {"profiling_precision": "BF16", "is_mixed_batch": False, "is_true_mixed_batch": np.nan}
    some = some.assign(**extra, prefill_seq_lens=np.nan, num_decode_seqs=np.nan, decode_avg_kv_cache_size=np.nan)
    some["is_true_mixed_batch"] = some.is_true_mixed_batch.astype(object)
    uneven = some[some.is_prefill].iloc[:3].assign(is_mixed_batch=True, **{PREFILL: 99.0})
    mixed = some[some.is_prefill].iloc[:1].assign(batch_size=2, num_tensor_parallel_workers=2, is_true_mixed_batch=True)
    mixed = mixed.assign(prefill_seq_lens="[1024]", num_decode_seqs=1.0, decode_avg_kv_cache_size=1024.0)
    # twice what both take alone, with what runs around each
    mixed = mixed.assign(**{PREFILL: prefill_us(1024, 0) * 1e-3 + 3e-3, DECODE: decode_us(1, 1024) * 1e-3})
    pd.concat([some, uneven, mixed]).to_csv(folder / "a800_qwen3-a3b-30b-moe_attention.csv", index=False)
    rows = []
    for degree, path in ((1, "standard_fused_topk"), (1, "uniform_topk"), (2, "standard_fused_topk")):
        for t in (1, 16, 256, 4096):
            slow = 1.0 if path == "standard_fused_topk" else 10.0
            gates = [1e-3 * slow * g if degree == 1 else np.nan for g in (10.0, 70.0, 40.0)]
            rows.append((t, degree, 1, path, 0.2 + 1e-3 * t / degree, *gates))
    names = ("moe_grouped_gemm", "moe_gating_linear", "moe_gating_routing_topk", "moe_shuffling")
    columns = ["num_tokens", "num_tensor_parallel_workers", "expert_parallel_size", "routing_runtime_path"]
    frame = pd.DataFrame(rows, columns=[*columns, *(f"time_stats.{name}.median" for name in names)])
    frame.assign(num_experts=128, router_topk=8).to_csv(folder / "a800_qwen3-a3b-30b-moe_moe.csv", index=False)
    return folder


def test_frontiers_experts_and_mixed_batches(tmp_path: Path) -> None:
    profile = find_profile(frontier(tmp_path), "A800", "Qwen/Qwen3-30B-A3B", tensor_parallel=2)
    assert profile.tokens["moe_grouped_gemm"](np.array([256.0]))[0] == pytest.approx(1e-3 * (0.2 + 0.128))
    # the gate was measured on one GPU only, and on the engine's own path
    assert profile.tokens["moe_gating_routing_topk"](np.array([256.0]))[0] == pytest.approx(70e-6)
    assert profile.prefill is not None
    assert profile.prefill.seconds.max() < 1e-2  # uneven batches of 99 ms are no measurement of one request
    note = next(n for n in profile.notes if "mixed" in n)
    assert "1 mixed steps were measured" in note and "0.50 to 0.50" in note
    assert {one.part for one in operators(profile)} == {"attention", "ffn"}


def test_frontiers_precision_and_degrees_are_asked_for(tmp_path: Path) -> None:
    frontier(tmp_path)
    with pytest.raises(ScenarioError, match="not in fp8"):
        find_profile(tmp_path, "A800", "Qwen3-30B-A3B", precision="fp8")
    with pytest.raises(ScenarioError, match="tensor parallel 2 with expert parallel 4 was not profiled"):
        find_profile(tmp_path, "A800", "Qwen3-30B-A3B", tensor_parallel=2, expert_parallel=4)


def test_a_head_width_that_the_profiler_assumed_wrongly_is_refused(tmp_path: Path) -> None:
    profile = find_profile(frontier(tmp_path), "A800", "Qwen3-30B-A3B")
    with pytest.raises(ScenarioError, match="head_dim = 64, but Qwen3-30B-A3B has 128"):
        compose(profile, model_shape("Qwen3-30B-A3B"))


M, N, K = (1, 16, 256, 4096), (32, 1024, 8192, 65536), (32, 1024, 8192, 65536)


def product_ms(m: float, n: float, k: float) -> float:
    """Linear in each of m, n, k, so that interpolation is exact."""
    return 0.005 + 1e-9 * n * k + 2e-12 * m * n * k


def aiconfigurator(folder: Path, heads: tuple[tuple[int, int], ...] = ((32, 4), (32, 8), (64, 8))) -> Path:
    pytest.importorskip("pyarrow")
    gemm = [("bfloat16", m, n, k, product_ms(m, n, k)) for m in M for n in N for k in K]
    gemm += [("fp8", m, n, k, product_ms(m, n, k) / 2) for m in M for n in N for k in K]
    frames: dict[str, Any] = {"gemm": pd.DataFrame(gemm, columns=["gemm_dtype", "m", "n", "k", "latency"])}
    names = ["num_heads", "num_key_value_heads", "batch_size", "isl", "step", "latency"]
    context = [
        (h, v, b, s, 0, b * (0.01 + 1e-9 * h * s * s)) for h, v in heads for b in (1, 2) for s in (16, 256, 4096)
    ]
    token = [
        (h, v, n, 1, s, 0.01 + 1e-7 * v * n * (s + 1)) for h, v in heads for n in (1, 16, 256) for s in (15, 255, 4095)
    ]
    same = {"head_dim": 128, "kv_cache_dtype": "bfloat16", "window_size": 0}
    for name, rows in (("context_attention", context), ("generation_attention", token)):
        whole = pd.DataFrame(rows, columns=names).assign(**same)
        other = whole.assign(kv_cache_dtype="fp8", latency=1e3)
        frames[name] = pd.concat([whole, other, whole.assign(window_size=128, latency=2e3)])
    messages = [(dtype, g, n) for dtype in ("half", "int8") for g in (2, 4) for n in (64, 2**20, 2**26)]
    nccl = [("all_reduce", *key, 0.01 + 1e-8 * key[2] * (2 if key[0] == "half" else 1)) for key in messages]
    frames["nccl"] = pd.DataFrame(nccl, columns=["op_name", "nccl_dtype", "num_gpus", "message_size", "latency"])
    sizes = {"hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128, "moe_ep_size": 1, "moe_tp_size": 1}
    loads = {"power_law_1.01": 1.0, "power_law_1.2": 3.0}
    moe = [(load, t, slower * (0.1 + 1e-3 * t)) for load, slower in loads.items() for t in (1, 4096)]
    experts = pd.DataFrame(moe, columns=["distribution", "num_tokens", "latency"])
    frames["moe"] = experts.assign(moe_dtype="bfloat16", **sizes)
    for name, frame in frames.items():
        frame.to_parquet(folder / f"a100_sxm__{name}__vllm__0.14.0__{name}_perf.parquet", index=False)
    return folder


def test_a_layer_is_composed_of_products_by_the_models_shape(tmp_path: Path) -> None:
    aiconfigurator(tmp_path)
    profile = find_profile(tmp_path, "NVIDIA A100-SXM4-80GB", "Llama-3.1-70B", tensor_parallel=2)
    t = 100.0
    shapes = {
        "qkv_proj": ((32 + 2 * 4) * 128, 8192),
        "o_proj": (8192, 32 * 128),
        "gate_up_proj": (28672, 8192),
        "down_proj": (8192, 14336),
    }
    for name, (n, k) in shapes.items():
        assert profile.tokens[name](np.array([t]))[0] == pytest.approx(product_ms(t, n, k) * 1e-3), name
    assert profile.sequences["lm_head"](np.array([8.0]))[0] == pytest.approx(product_ms(8, 64128, 8192) * 1e-3)
    assert profile.prefill is not None and profile.decode is not None and profile.all_reduce is not None
    assert profile.prefill(np.array([4096.0]), np.array([0.0]))[0] == pytest.approx(1e-5 + 1e-12 * 32 * 4096**2)
    assert profile.decode(np.array([40.0]), np.array([1000.0]))[0] == pytest.approx(1e-5 + 1e-10 * 4 * 40 * 1000)
    # message_size counts numbers of two bytes
    assert profile.all_reduce(np.array([2.0**21]))[0] == pytest.approx(1e-5 + 1e-11 * 2**21)


def test_what_kernel_tables_leave_out_is_estimated_from_the_bandwidth(tmp_path: Path) -> None:
    aiconfigurator(tmp_path)
    table, chip = load_step_table(tmp_path, "A100", "Llama-3.1-8B"), accelerator("A100")
    gemms = [(48 * 128, 4096), (4096, 4096), (2 * 14336, 4096), (4096, 14336)]
    layer = sum(product_ms(16, n, k) for n, k in gemms) * 1e-3 + 1e-5 + 1e-10 * 8 * 16 * 256
    numbers = 2 * 4 * 4096 + 3 * 14336 + 2 * 40 * 128
    layer += 4 * 3e-6 + 16 * 2 * numbers / (BANDWIDTH_EFFICIENCY * chip.bandwidth)
    once = (
        2 * 3e-6
        + 16 * 2 * (2 + 4) * 4096 / (BANDWIDTH_EFFICIENCY * chip.bandwidth)
        + product_ms(16, 128256, 4096) * 1e-3
    )
    assert table(0, 16, 16 * 256) == pytest.approx(32 * layer + once, rel=1e-6)
    assert any("not measured, 3 us" in note for note in table.notes)
    bare = compose(find_profile(tmp_path, "A100", "Llama-3.1-8B"), model_shape("Llama-3.1-8B"))
    assert any("left out for want of a bandwidth" in note for note in bare.notes)
    assert bare(0, 16, 16 * 256) < table(0, 16, 16 * 256)


def test_the_most_even_load_of_experts_is_taken(tmp_path: Path) -> None:
    profile = find_profile(aiconfigurator(tmp_path), "A100", "Qwen3-30B-A3B")
    assert profile.tokens["moe"](np.array([1000.0]))[0] == pytest.approx(1.1e-3)
    assert any("power_law_1.01" in note for note in profile.notes)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("Llama-2-7B", {}, "no kernel with 32 heads and 32 KV heads of width 128"),
        ("Mixtral-8x7B", {}, "no experts of Mixtral-8x7B"),
        ("DeepSeek-V3", {"precision": "bf16"}, "latent attention"),
        ("Llama-3.1-8B", {"precision": "int4"}, "no products in int4"),
    ],
)
def test_kernels_of_another_shape_are_not_stretched(
    tmp_path: Path, model: str, settings: dict[str, str], words: str
) -> None:
    aiconfigurator(tmp_path)
    with pytest.raises(ScenarioError, match=words):
        load_step_table(tmp_path, "A100", model, **settings)  # type: ignore[arg-type]


def test_missing_attention_comes_from_kernel_tables_of_the_same_accelerator(tmp_path: Path) -> None:
    aiconfigurator(tmp_path)
    kernels().to_csv(tmp_path / "a100_Llama-2-70b-hf_mlp.csv", index=False)
    table = load_step_table(tmp_path, GPU, MODEL)
    assert any(note.startswith("attention: not in these files") for note in table.notes)
    decode = table.attention(np.array([[0, 16, 16 * 256.0, 0]]))[0]
    assert decode == pytest.approx(80 * (1e-5 + 1e-10 * 8 * 16 * 256))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aiconfigurator(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(pd, "read_parquet", refuse)
    with pytest.raises(ScenarioError, match=r"needs pyarrow; install it with pip install llmopt\[parquet\]"):
        find_profile(tmp_path, "A100", "Llama-3.1-8B")


DISTSERVE = {
    "facebook/opt-13b": {
        "1": {
            "decoding_large_small_bs_threshold": 95,
            "prefill": [18.0, 0.1, 8e-6],
            "decoding_smallbs": [20.0, 6e-4, 0.04],
            "decoding_largebs": [7.0, 5e-4, 0.16],
        },
        "2": {"prefill": [18.0, 0.1, -1e-6], "decoding_smallbs": [20.0, 6e-4, -0.04], "decoding_largebs": [7.0, 5e-4]},
    }
}


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    path = tmp_path / "profiler.json"
    path.write_text(json.dumps(DISTSERVE))
    return path


def test_distserves_coefficients_are_affine_pieces_in_seconds(fitted: Path) -> None:
    steps = read_distserve(fitted, "OPT-13B")
    # two prompts of 300 and 500 tokens: 18 + 0.1 x 800 + 8e-6 x (300^2 + 500^2) ms
    prefill = StepTime.from_pieces((steps.prefill,))
    assert prefill(prefill=800, pairs=(300**2 + 500**2) / 2) == pytest.approx(1e-3 * (98 + 8e-6 * 340_000))
    small, large = (StepTime.from_pieces((piece,)) for piece in (steps.small, steps.large))
    assert small(decode=32, kv=32 * 700) == pytest.approx(1e-3 * (20 + 6e-4 * 22_400 + 0.04 * 32))
    assert large(decode=128, kv=128 * 700) == pytest.approx(1e-3 * (7 + 5e-4 * 89_600 + 0.16 * 128))
    assert steps.threshold == 95
    assert steps.pieces == (steps.prefill, steps.small, steps.large)


def test_a_negative_square_is_taken_as_none_and_said(fitted: Path) -> None:
    data = json.loads(fitted.read_text())
    data["facebook/opt-13b"]["2"] = data["facebook/opt-13b"]["1"] | {"prefill": [18.0, 0.1, -1e-6]}
    fitted.write_text(json.dumps(data))
    steps = read_distserve(fitted, "facebook/opt-13b", 2)
    assert steps.prefill.pairs == 0
    assert "negative" in steps.notes[0]


@pytest.mark.parametrize(
    ("model", "degree", "words"),
    [("Llama-2-7B", 1, "has no model"), ("OPT-13B", 4, "fitted are 1, 2"), ("OPT-13B", 2, "negative coefficient")],
)
def test_bad_fits_are_refused(fitted: Path, model: str, degree: int, words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        read_distserve(fitted, model, degree)


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[1]", "holds no models")])
def test_bad_files_of_fits_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=words):
        read_distserve(path, "OPT-13B")
