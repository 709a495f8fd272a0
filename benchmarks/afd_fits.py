"""Fit the stage times of every Attention/FFN bundle of the catalog; check the catalog against them or write it anew.

    python -m benchmarks.afd_fits --shared ../shared/data            compare, exit with 1 where a digit differs
    python -m benchmarks.afd_fits --shared ../shared/data --write    write llmopt/catalog/afd-*.toml

Prints for every stage how many points it is fitted to, in which range, and how far it is from them; then transfers that
were measured, but on other machines than the stages. What is measured and what is stated: docs/afd_coefficients.md.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator
from math import comb
from pathlib import Path

import llmopt.catalog
from benchmarks import afd_points as measured
from benchmarks.afd_entry import Entry, Stage, fitted, memory, sizes, table
from benchmarks.afd_points import Points, Side
from llmopt.calibrate.result import rounded
from llmopt.hardware import Piece
from llmopt.machines import ModelShape, accelerator, model_shape
from llmopt.machines.roofline import LINK_EFFICIENCY
from llmopt.profiles.estimates import START

AITABLES = "aiconfigurator (github.com/ai-dynamo/aiconfigurator, commit 095f58a5)"
A100_TABLES, H100_TABLES = (f"{AITABLES}, systems/data/{name}" for name in ("a100_sxm, vLLM 0.14.0", "h100_sxm"))
FRONTIER = "Frontier (github.com/NetX-lab/Frontier, commit a4b22df8), data/profiling/compute, A800"
VIDUR = "Vidur (github.com/microsoft/vidur, commit 7d475133), data/profiling/network/a100_dgx/send_recv.csv"
A100_PRICE = "RunPod A100 PCIe secure-cloud list price, skypilot-catalog at 01acdfd419ce; not live"
H100_PRICE = "Nebius H100 on-demand list price, skypilot-catalog at 0082b0435f39; not live"
NOTE = (
    "Song et al., arXiv 2601.21351 v1: regression on traces, as told by one secondary note, whose digits reproduce "
    "three published ratios; its unit is not told and taken as microseconds of one layer"
)
TOUCHED = 128.0
"""From this many tokens on practically all of 128 experts are visited, and the time of a layer grows affinely."""
SHARED_LINK = {"transfer_of": ("bundle", "what a server receives comes in through its own links, whoever sends it")}


def a100_side(shared: Path, shape: ModelShape) -> Side:
    """Everything but the cache on an Attention worker, from aiconfigurator's products of an A100."""
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    small = ("layernorm", "rotary_emb") + (("qk_norm",) if shape.qk_norm else ())
    curves = {
        "qkv_proj": measured.product(shared, wide, shape.hidden),
        "o_proj": measured.product(shared, shape.hidden, shape.heads * shape.head_dim),
        **measured.elementwise(small, shape, accelerator("A100 SXM 80GB")),
    }
    return Side(curves)


def expert_side(shared: Path, shape: ModelShape, degree: int) -> Points:
    """Norm, gate and experts of an FFN server of `degree` A100, by the tokens of all of them."""
    chip = accelerator("A100 SXM 80GB")
    (norm,) = measured.elementwise(("layernorm",), shape, chip).values()
    gate, moe = measured.product(shared, shape.experts, shape.hidden), measured.experts(shared, shape, degree)
    return measured.by_tokens(moe.at, moe(moe.at) + gate(moe.at / degree) + norm(moe.at / degree), TOUCHED, 16_384.0)


def visited(shape: ModelShape, degree: int) -> float:
    """Share of the tokens that one of `degree` GPUs receives which divide the experts, if tokens choose at random."""
    others = shape.experts - shape.experts // degree
    return 1.0 - comb(others, shape.experts_per_token) / comb(shape.experts, shape.experts_per_token)


def _to_some(shape: ModelShape, degree: int) -> str:
    """How a source says it."""
    return (
        f", of which each of {degree} receives {visited(shape, degree):.0%} through its own link" if degree > 1 else ""
    )


SMALL = f"norms and rotary embedding not measured: {START * 1e6:g} us each and their bytes at 75% of the bandwidth"
FEWER = "below 128 tokens fewer experts are visited and this is too long"
EVEN = f"expert load as measured (power law 1.01); {FEWER}"


def ffn_a100(shared: Path, shape: ModelShape, degree: int) -> Stage:
    """The experts of a server on `degree` A100."""
    many = f"; experts divided among the {degree} A100 of a server, the busiest one decides" if degree > 1 else ""
    return fitted(expert_side(shared, shape, degree), f"{A100_TABLES}: experts and gate; {SMALL}; {EVEN}{many}")


def qwen_a100(shared: Path, degree: int = 1) -> Entry:
    """Qwen3-30B-A3B on A100, the experts of a server on `degree` of them."""
    shape, price = model_shape("Qwen3-30B-A3B"), 1.39
    points = measured.attention_points(
        a100_side(shared, shape),
        measured.measured_decode(shared, "a100", shape),
        measured.measured_prompts(shared, "a100", shape),
    )
    source = f"{A100_TABLES}: attention kernels, projections; {SMALL}; prompts behind nothing cached"
    return Entry(
        f"Attention on A100 SXM 80GB, FFN on {degree} A100: Qwen3-30B-A3B in bf16, fitted to measured kernel times",
        {"accelerator": ("A100 SXM 80GB", A100_TABLES), "model": (shape.name, "same: its shape, in bf16")},
        sizes(shape, "A100 SXM 80GB", 128)
        | SHARED_LINK
        | {
            "attention_price": (price, A100_PRICE),
            "ffn_price": (round(price * degree, 2), f"{degree} x the same"),
            "ffn_devices": (degree, f"experts divided among {degree}"),
        },
        {
            "attention": fitted(points, source, 2, 2),
            "transfer": fitted(
                measured.send_recv(shared, visited(shape, degree) * shape.hidden),
                f"{VIDUR}: between two A100 over NVLink, {2 * shape.hidden:,} B a token{_to_some(shape, degree)}",
            ),
            "ffn": ffn_a100(shared, shape, degree),
        },
    )


def qwen_h100(shared: Path) -> Entry:
    """Attention of Qwen3-30B-A3B on H100, its experts on a node of A100."""
    shape, a100 = model_shape("Qwen3-30B-A3B"), qwen_a100(shared, 8)
    points = measured.attention_points(
        a100_side(shared, shape),
        measured.measured_decode(shared, "h100", shape),
        measured.measured_prompts(shared, "h100", shape),
    )
    each = visited(shape, 8) * measured.KV_BYTES * shape.hidden / (0.8 * 25e9)
    hop = Piece(base=10e-6, decode=each, prefill=each)
    return Entry(
        "Attention on H100 SXM, FFN on 8 A100 SXM 80GB: Qwen3-30B-A3B in bf16, fitted to measured kernel times",
        {
            "accelerator": ("H100 SXM with A100 SXM 80GB", f"{H100_TABLES}, vLLM 0.19.0; {A100_TABLES}"),
            "model": (shape.name, "same: its shape, in bf16"),
        },
        {
            **a100.bundle,
            "kv_capacity": memory(shape, "H100 SXM"),
            "attention_price": (2.95, H100_PRICE),
        },
        {
            "attention": fitted(
                points,
                f"{H100_TABLES}, vLLM 0.19.0: attention kernels of an H100; its products were not measured: projections"
                f" and what else there is are those of an A100, an upper limit; {SMALL}; prompts behind nothing cached",
                2,
                2,
            ),
            "transfer": Stage(
                rounded((hop,)),
                "stated, not measured: 10 us and 80% of 25 GB/s for each of the 8 A100 of a server (aiconfigurator, "
                f"a100_sxm.yaml at 095f58a5: inter_node_bw, p2p_latency), {2 * shape.hidden:,} B a token"
                f"{_to_some(shape, 8)}",
            ),
            "ffn": a100.stages["ffn"],
        },
    )


def qwen_a800(shared: Path) -> Entry:
    """Qwen3-30B-A3B on A800, as far as Frontier measured it."""
    shape, chip = model_shape("Qwen3-30B-A3B"), accelerator("A800 80GB")
    profile = measured.frontier(shared, shape.name)
    at = profile.tokens["moe_grouped_gemm"].at
    parts = ("moe_gating_linear", "moe_gating_routing_topk", "moe_shuffling", "moe_grouped_gemm")
    (norm,) = measured.elementwise(("layernorm",), shape, chip).values()
    ffn = measured.by_tokens(at, norm(at) + sum(profile.tokens[name](at) for name in parts), TOUCHED, 4096.0)
    stage = fitted(
        measured.attention_points(a100_side(shared, shape), measured.whole_grid(profile.decode)),
        f"{FRONTIER}: attention kernels, reshaping and writing the KV cache, launched one by one (150 us before any "
        "work), for heads of 64 where the model has 128: not scaled; projections, not measured there, of an A100 "
        f"({AITABLES}); {SMALL}; last piece stated: reading the model's own weights of Attention and KV cache at all "
        "of the bandwidth",
        prompts=False,
    )
    read = [measured.KV_BYTES * numbers / chip.bandwidth for numbers in (shape.attention_weights, shape.cached_width)]
    limit = Piece(base=read[0], kv=read[1])
    return Entry(
        "Attention and FFN on A800 80GB: Qwen3-30B-A3B in bf16, fitted to measured kernel times of Frontier",
        {"accelerator": (chip.name, f"{FRONTIER}, qwen3-a3b-30b-moe"), "model": (shape.name, "same: in bf16")},
        {**sizes(shape, chip.name, 64), **SHARED_LINK},
        {
            "attention": Stage(stage.pieces + rounded((limit,)), stage.source, stage.points),
            "transfer": cut_link(shape),
            "ffn": fitted(ffn, f"{FRONTIER}: gate, top-k, shuffling, experts on one A800 (uniform routing); {FEWER}"),
        },
    )


def cut_link(shape: ModelShape) -> Stage:
    """A hop over the A800's NVLink, which nobody measured."""
    chip = accelerator("A800 80GB")
    each = measured.KV_BYTES * shape.hidden / (LINK_EFFICIENCY * chip.link_bandwidth)
    return Stage(
        rounded((Piece(base=chip.link_latency, decode=each, prefill=each),)),
        f"stated, not measured: {chip.link_latency * 1e6:g} us and {LINK_EFFICIENCY:.0%} of the "
        f"{chip.link_bandwidth / 1e9:.0f} GB/s of {chip.link} (llmopt.machines), {2 * shape.hidden:,} B a token",
    )


def llama_a800(shared: Path) -> Entry:
    """Llama-2-7B on A800."""
    shape, chip = model_shape("Llama-2-7B"), accelerator("A800 80GB")
    profile = measured.frontier(shared, shape.name)
    names = ("input_layernorm", "qkv_proj", "rotary_emb", "o_proj", "add")
    side = Side({name: profile.tokens[name] for name in names})
    gate, prompts = profile.tokens["gate_up_proj"].at, measured.fresh(profile.prefill)
    after = ("post_attention_layernorm", "gate_up_proj", "act_fn", "down_proj", "add")
    dense = sum(profile.tokens[name](gate) for name in after)
    points = measured.attention_points(side, measured.whole_grid(profile.decode), prompts)
    return Entry(
        "Attention and FFN on A800 80GB: Llama-2-7B in fp16, fitted to measured kernel times of Frontier",
        {"accelerator": (chip.name, f"{FRONTIER}, Llama-2-7b-hf"), "model": (shape.name, "same: in fp16")},
        {**sizes(shape, chip.name, 32, precision="fp16"), **SHARED_LINK},
        {
            "attention": fitted(
                points, f"{FRONTIER}: all operators before the FFN; prompts behind nothing cached", 2, 2
            ),
            "transfer": cut_link(shape),
            "ffn": fitted(measured.by_tokens(gate, dense, 1.0, 4096.0), f"{FRONTIER}: all operators of the FFN"),
        },
    )


def published(_: Path) -> Entry:
    """DeepSeek-V3 on Ascend 910C, as published."""
    shape = model_shape("DeepSeek-V3")
    return Entry(
        "Attention and FFN on Ascend 910C: DeepSeek-V3, published coefficients, unit taken as microseconds of a layer",
        {"accelerator": ("Ascend 910C", NOTE), "model": (shape.name, "same")},
        sizes(shape, "Ascend 910C", 256) | {"batch": (256, "same: the reference instance")},
        {
            "attention": Stage((Piece(base=50e-6, kv=1.65e-9),), f"{NOTE}: 50 and 0.00165 a KV token of a worker"),
            "transfer": Stage(
                (Piece(base=20e-6, decode=2.2e-8),),
                f"{NOTE}: 20 and 0.022 a sequence of a worker; no published ratio rests on it",
            ),
            "ffn": Stage((Piece(base=100e-6, decode=8.3e-8),), f"{NOTE}: 100 and 0.083 a token of a server"),
        },
    )


ENTRIES: dict[str, Callable[[Path], Entry]] = {
    "afd-deepseek-v3-910c": published,
    "afd-qwen3-30b-a100": qwen_a100,
    "afd-qwen3-30b-a100-ep8": lambda shared: qwen_a100(shared, 8),
    "afd-qwen3-30b-h100-a100": qwen_h100,
    "afd-qwen3-30b-a800": qwen_a800,
    "afd-llama2-7b-a800": llama_a800,
}


def alternatives(shared: Path) -> Iterator[tuple[str, Stage]]:
    """Transfers measured among H100, where no FFN was."""
    for name in ("Qwen3-30B-A3B", "DeepSeek-V3"):
        for hop, points in measured.deepep(shared, model_shape(name)):
            yield f"DeepEP {name} {hop}", fitted(points, "", prompts=False)


def catalog_file(name: str) -> Path:
    """Where the entry lies."""
    return Path(llmopt.catalog.__file__).with_name(f"{name}.toml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with the measurements")
    parser.add_argument("--write", action="store_true", help="write the catalog instead of comparing")
    options = parser.parse_args()
    differing = 0
    print(f"{'entry':26} {'stage':10} {'points':8} {'':5} {'median':>7} {'95 %':>7} {'most':>6}  range")
    for name, build in ENTRIES.items():
        entry, file = build(options.shared), catalog_file(name)
        print("\n".join(table(name, entry.stages)))
        if options.write:
            file.write_text(entry.text())
        before = file.read_text() if file.exists() else ""
        changed = list(difflib.unified_diff(before.splitlines(), entry.text().splitlines(), "catalog", "fit", n=0))
        differing += bool(changed)
        print("\n".join(changed), end="\n" if changed else "")
    for name, stage in alternatives(options.shared):
        print("\n".join(table(name, {"transfer": stage})))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
