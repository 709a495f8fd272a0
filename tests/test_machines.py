"""Catalogs of models and accelerators against what their makers publish, and lookup by the names people use."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.describe import catalogue
from llmopt.errors import ScenarioError
from llmopt.machines import Accelerator, ModelShape, accelerator, accelerator_names, model_names, model_shape
from llmopt.machines.lookup import accelerators, models
from llmopt.machines.shapes import BYTES
from llmopt.profiles.names import same_model
from llmopt.runs.settings import read_settings

PUBLISHED = {
    # Billions of parameters: total, active, and whether active counts the input embedding; from model cards and papers.
    "DeepSeek-V3": (671, 36.6, False),  # README_WEIGHTS.md: 36.6B, including 0.9B for the output head
    "Llama-2-7B": (6.74, None, True),
    "Llama-2-13B": (13.02, None, True),
    "Llama-2-70B": (68.98, None, True),
    "Llama-3-8B": (8.03, None, True),
    "Llama-3.1-8B": (8.03, None, True),
    "Llama-3.1-70B": (70.6, None, True),
    "Llama-3.1-405B": (405.9, None, True),
    "Mistral-7B": (7.25, None, True),
    "Mixtral-8x7B": (46.7, 12.9, True),
    "OPT-13B": (12.85, None, True),
    "OPT-66B": (65.7, None, True),
    "OPT-175B": (175, None, True),
    "Phi-mini-MoE": (7.6, 2.4, True),
    "Qwen2.5-7B": (7.61, None, True),
    "Qwen2.5-72B": (72.7, None, True),
    "Qwen3-8B": (8.2, None, True),
    "Qwen3-32B": (32.8, None, True),
    "Qwen3-30B-A3B": (30.5, 3.3, True),  # cut, not rounded: active is 3.35
    "Qwen3-235B-A22B": (235, 22, True),
    "gpt-oss-120b": (116.83, 5.13, False),  # model card, table 1
    "gpt-oss-20b": (20.91, 3.61, False),
}
NON_EMBEDDING = {"Qwen2.5-7B": 6.53, "Qwen2.5-72B": 70.0, "Qwen3-8B": 6.95, "Qwen3-32B": 31.2, "Qwen3-30B-A3B": 29.9}
"""Billions of parameters without embedding and output head, from the model cards."""
KV_BYTES = {"DeepSeek-V3": 70_272, "Qwen2.5-72B": 327_680, "Llama-3.1-405B": 516_096}
"""KV cache of a token in BF16: DeepSeek-AI, arXiv 2505.09343, table 1."""
LOADED_GIB = {
    "gpt-oss-120b": 60.8,  # checkpoint sizes of the model card
    "gpt-oss-20b": 12.8,
    "Llama-3.1-8B": 14.9888,  # "Loading model weights took" in vLLM's log
    "Qwen3-8B": 15.27,
}


def near(published: float) -> float:
    """One per cent, or what a number cut to its last printed digit may lack."""
    digits = re.search(r"\.(\d+)", str(published))
    return max(0.01, 10 ** -len(digits[1]) / published) if digits else 0.01


def test_every_model_has_a_published_count() -> None:
    assert set(PUBLISHED) == set(model_names())
    assert len(model_names()) >= 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    shape, (total, active, embedded) = model_shape(name), PUBLISHED[name]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=near(total))
    counted = shape.active_parameters - (0 if embedded else shape.head_weights)
    assert counted / 1e9 == pytest.approx(active or total, rel=near(active or total))


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_parameters_without_embeddings_are_as_published(name: str) -> None:
    shape = model_shape(name)
    rest = (shape.parameters - shape.embedding_parameters) / 1e9
    assert rest == pytest.approx(NON_EMBEDDING[name], rel=near(NON_EMBEDDING[name]))


def test_whole_counts_of_published_checkpoints() -> None:
    """Numbers of stored elements, as the model repositories index them."""
    exact = {
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-2-7B": 6_738_415_616,
        "Mixtral-8x7B": 46_702_792_704,
        "Qwen3-32B": 32_762_123_264,
        "Qwen3-30B-A3B": 30_532_122_624,
        "Qwen2.5-7B": 7_615_616_512,
        "OPT-13B": 12_853_473_280,
    }
    assert {name: model_shape(name).parameters for name in exact} == exact


@pytest.mark.parametrize("name", KV_BYTES)
def test_kv_cache_is_as_published(name: str) -> None:
    assert model_shape(name).kv_bytes_per_token() == KV_BYTES[name]
    assert model_shape(name).kv_bytes_per_token("fp8") == KV_BYTES[name] / 2


@pytest.mark.parametrize("name", LOADED_GIB)
def test_weights_take_what_checkpoints_and_logs_say(name: str) -> None:
    assert model_shape(name).weight_bytes() / 2**30 == pytest.approx(LOADED_GIB[name], rel=3e-3)


def test_quantised_weights_leave_embeddings_alone() -> None:
    """By hand for Llama-3.1-8B: 6.98e9 weights of matrices at one byte, the rest of 8.03e9 at two."""
    shape = model_shape("Llama-3.1-8B")
    matrices = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    assert shape.weight_bytes("fp8") == matrices + 2 * (8_030_261_248 - matrices)
    assert shape.weight_bytes("int4") == pytest.approx(matrices * 4.125 / 8 + 2 * (8_030_261_248 - matrices))
    assert shape.step_bytes("bf16") == 2 * (8_030_261_248 - 128256 * 4096)


def test_operations_of_a_token_multiplied_out_by_hand() -> None:
    """Products of a layer written as m x k x n, twice each, for one grouped-query, one expert and one latent model."""
    llama = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    assert model_shape("Llama-3.1-8B").flops_per_token == 2 * 32 * sum(a * b for a, b in llama)
    qwen = [(2048, 4096), (2048, 512), (2048, 512), (4096, 2048), (2048, 128)]
    qwen += 8 * [(2048, 768), (2048, 768), (768, 2048)]
    assert model_shape("Qwen3-30B-A3B").flops_per_token == 2 * 48 * sum(a * b for a, b in qwen)
    latent = [(7168, 1536), (1536, 128 * 192), (7168, 576), (512, 128 * 256), (128 * 128, 7168)]
    dense, routed = 3 * [(7168, 18432)], 9 * 3 * [(7168, 2048)] + [(7168, 256)]
    layers = 3 * [latent + dense] + 58 * [latent + routed]
    assert model_shape("DeepSeek-V3").flops_per_token == 2 * sum(a * b for layer in layers for a, b in layer)


def test_operations_of_attention_multiplied_out_by_hand() -> None:
    assert model_shape("Llama-3.1-8B").flops_per_pair == 32 * 32 * (2 * 128 + 2 * 128)
    latent = model_shape("DeepSeek-V3")
    assert latent.flops_per_pair == 61 * 128 * (2 * 192 + 2 * 128)
    assert latent.flops_per_kv == 61 * 128 * (2 * 576 + 2 * 512)
    assert model_shape("gpt-oss-120b").flops_per_pair == 18 * 64 * 4 * 64


NAMES = {
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "/data/model/Qwen3-32B": "Qwen3-32B",
    "/data/model/Qwen3-32B/": "Qwen3-32B",
    "Meta-Llama-3-8B": "Llama-3-8B",
    "llama2-70b": "Llama-2-70B",
    "Llama-2-7b-hf": "Llama-2-7B",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-R1-0528": "DeepSeek-V3",
    "Mixtral-8x7B-Instruct-v0.1": "Mixtral-8x7B",
    "facebook/opt-66b": "OPT-66B",
    "llama31-8b": "Llama-3.1-8B",
    "nvidia/Llama-3.3-70B-Instruct-FP8": "Llama-3.1-70B",
}
CARDS = {
    "RTX4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "RTX 4090 24GB": "RTX 4090",
    "RTXPRO6000": "RTX PRO 6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000",
    "h100_sxm": "H100 SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "H100 SXM 80GB x 8": "H100 SXM",
    "8 x H100": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "a100-80gb": "A100 SXM 80GB",
    "A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
    "A800": "A800 80GB",
    "b200_sxm": "B200",
    "gb200": "GB200",
    "AMD Instinct MI300X": "MI300X",
}


@pytest.mark.parametrize("name", NAMES)
def test_models_are_found_by_the_names_they_go_by(name: str) -> None:
    assert model_shape(name).name == NAMES[name]


@pytest.mark.parametrize("name", CARDS)
def test_accelerators_are_found_by_the_names_they_go_by(name: str) -> None:
    assert accelerator(name).name == CARDS[name]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("Qwen3-32B-FP8", "fp8"), ("Qwen3-32B-AWQ", "int4"), ("Qwen3-32B", "bf16"), ("DeepSeek-V3", "fp8")],
)
def test_the_name_says_the_precision(name: str, precision: str) -> None:
    assert model_shape(name).precision == precision


def test_every_name_and_alias_means_one_entry() -> None:
    for shape in models():
        assert {model_shape(name).name for name in (shape.name, *shape.aliases)} == {shape.name}
    for chip in accelerators():
        assert accelerator(chip.name).name == chip.name
    assert len(accelerator_names()) >= 12


@pytest.mark.parametrize("name", ["RTX PRO 6000 Blackwell Workstation Edition", "A100 96GB", "H300", ""])
def test_unknown_accelerators_are_refused(name: str) -> None:
    with pytest.raises(ScenarioError, match=r"is not in the catalog.*(did you mean|known are)"):
        accelerator(name)


def test_a_folder_of_a_hub_cache_is_the_model_in_it() -> None:
    cached = "/root/.cache/huggingface/hub/models--Qwen--Qwen3-32B/snapshots/abc123"
    assert model_shape(cached) == model_shape("Qwen/Qwen3-32B")
    assert model_shape(cached.replace("32B", "32B-FP8")).precision == "fp8"
    assert same_model(cached, "Qwen3-32B")
    assert read_settings({"model": cached}, Path("meta.json"))["model"].value == "Qwen/Qwen3-32B"


def test_unknown_models_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        ScenarioError, match=r"'org/Qwen3-33B' is not in the catalog of models; did you mean 'Qwen3-32B'\?"
    ):
        model_shape("org/Qwen3-33B")
    with pytest.raises(ScenarioError, match="known are"):
        model_shape("")


@given(st.text(max_size=30))
def test_no_name_breaks_the_lookup(name: str) -> None:
    for find in (model_shape, accelerator):
        try:
            find(name)
        except ScenarioError as error:
            assert repr(name) in str(error)


@pytest.mark.parametrize("name", accelerator_names())
def test_peaks_are_dense_and_sourced(name: str) -> None:
    chip = accelerator(name)
    assert all(len(source) > 5 for source in chip.sources.values())
    assert 0.8 < chip.memory_bytes / (chip.gigabytes * 2**30) <= 1.01
    for narrow in ("fp8", "int8"):
        if narrow in chip.flops:
            assert chip.flops[narrow] / chip.flops["bf16"] in (pytest.approx(2, rel=0.02), pytest.approx(4, rel=0.02))
    assert chip.peak("fp16") == chip.flops["bf16"]
    assert chip.peak("mxfp4") == chip.flops["bf16"] <= chip.fastest("mxfp4")
    assert 30 < chip.flops["bf16"] / chip.bandwidth < 600


def test_peaks_agree_with_aiconfigurator(shared: Path) -> None:
    """Within 3 %, but for the two that the sources say: B200 7.7 of 8 TB/s, RTX PRO 6000 of another edition."""
    for file in sorted((shared / "data/aiconfigurator/systems").glob("*.yaml")):
        said = {m[1]: float(m[2]) for m in re.finditer(r"^  (\w+): ([\d.]+)", file.read_text(), re.M)}
        chip = accelerator(file.stem)
        differs = {"B200": 0.05, "RTX PRO 6000": 0.15}.get(chip.name, 0.005)
        assert chip.bandwidth == pytest.approx(said["mem_bw"], rel=differs)
        assert chip.flops["bf16"] == pytest.approx(said["bfloat16_tc_flops"], rel=0.03)
        assert chip.link_bandwidth == pytest.approx(said["intra_node_bw"], rel=0.03)
        assert chip.memory_bytes == pytest.approx(said["mem_capacity"], rel=0.09)


def test_catalog_files_are_whole() -> None:
    import llmopt.machines

    folder = Path(llmopt.machines.__file__).parent
    for kind, model in (("models", ModelShape), ("accelerators", Accelerator)):
        for file in (folder / kind).glob("*.toml"):
            entry = tomllib.loads(file.read_text())
            assert set(entry) <= set(model.model_fields)
            assert file.stem == entry["name"] or kind == "accelerators"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "fp7"}, "known are"),
        ({"experts": 8}, "without experts_per_token"),
        ({"attention": "mla"}, "without q_lora_rank"),
        ({"layers": 0}, "greater than or equal"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelShape.model_validate(model_shape("Llama-3.1-8B").model_dump() | change)


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ScenarioError, match=r"'fp7' is not known; known are"):
        model_shape("Llama-3.1-8B").weight_bytes("fp7")
    assert set(BYTES) >= {"bf16", "fp8", "int4", "mxfp4", "nvfp4"}


def test_list_shows_models_and_accelerators() -> None:
    data = catalogue()
    assert tuple(data["models"]) == model_names()
    assert tuple(data["accelerators"]) == accelerator_names()
    assert data["models"]["Qwen3-30B-A3B"].startswith("30.5 billion parameters, 3.35 active (8 of 128 experts), bf16")
    assert "989.4 TFLOP/s in BF16" in data["accelerators"]["H100 SXM"]
