"""A scenario's pool with a profile: the table it gets, and what is said when it cannot have one."""

from __future__ import annotations

from pathlib import Path

import pytest
from profile_files import tables

from llmopt.errors import ScenarioError
from llmopt.profiles import load_step_table
from llmopt.reading import load_scenario

SCENARIO = """
[workload]
rate = 1.0
arrivals = { law = "poisson" }

[[workload.classes]]
name = "chat"
share = 1.0
prompt = { law = "constant", value = 50 }
output = { law = "constant", value = 10 }

[[pools]]
name = "gpu"
replicas = 2
kv_capacity = 16000
step_time = [{ base = 0.01 }]
accelerator = "RTX 4090 24GB"
model = "Llama-3.1-8B"
profile = "measured"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with scenario s.toml and a profile in measured/."""
    tables().write(tmp_path / "measured", "RTX4090_Llama-3.1-8B_tp1_")
    (tmp_path / "s.toml").write_text(SCENARIO)
    return tmp_path


def test_a_pool_gets_the_table_of_its_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    pool = load_scenario(folder / "s.toml").pools[0]
    expected = load_step_table(folder / "measured", "RTX4090", "Llama-3.1-8B")
    assert pool.table is not None
    assert pool.table(512, 3, 900, 512 * 256) == expected(512, 3, 900, 512 * 256)
    assert pool.stepper(decode=1) == 0.01  # the theory's step time stays the one that is given


def test_the_table_counts_in_the_digest_and_outlives_changes(folder: Path) -> None:
    scenario = load_scenario(folder / "s.toml")
    faster = scenario.replace(**{"workload.rate": 2.0})
    assert faster.pools[0].table is scenario.pools[0].table
    tables(extra={"qkv_proj": (60.0, 0.3)}).write(folder / "measured", "RTX4090_Llama-3.1-8B_tp1_")
    assert load_scenario(folder / "s.toml").digest != scenario.digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('profile = "measured"', 'profile = "nowhere"', ["pools[0] ('gpu').profile:", "no such folder"]),
        ('accelerator = "RTX 4090 24GB"', "", ["pools[0] ('gpu'): has a profile but no accelerator"]),
        ('model = "Llama-3.1-8B"', 'model = ""', ["pools[0] ('gpu'): has a profile but no model"]),
        ("step_time = [{ base = 0.01 }]", "", ["has a profile but no step_time", "llmopt calibrate"]),
        ('"RTX 4090 24GB"', '"H100"', ["pools[0] ('gpu').profile:", "no profile of Llama-3.1-8B on H100"]),
        ("replicas = 2", "replicas = 2\ntensor_parallel = 2", ["tensor_parallel = 2 was not profiled"]),
        ("replicas = 2", "replicas = 2\ntensor_parallel = 0", ["pools[0].tensor_parallel = 0"]),
        ("replicas = 2", 'replicas = 2\ntensor_parallel = "two"', ["pools[0].tensor_parallel = 'two'"]),
    ],
)
def test_what_is_wrong_names_the_pool(folder: Path, old: str, new: str, words: list[str]) -> None:
    assert old in SCENARIO
    (folder / "s.toml").write_text(SCENARIO.replace(old, new))
    with pytest.raises(ScenarioError) as error:
        load_scenario(folder / "s.toml")
    assert all(word in str(error.value) for word in ["s.toml", *words]), error.value


def test_a_bad_table_names_the_pool_and_the_row(folder: Path) -> None:
    file = folder / "measured" / "RTX4090_Llama-3.1-8B_tp1_dense.csv"
    lines = file.read_text().splitlines()
    lines[4] = lines[4].rsplit(",", 1)[0] + ",-3.0"
    file.write_text("\n".join(lines))
    with pytest.raises(ScenarioError, match=r"pools\[0\] \('gpu'\)\.profile: .*dense\.csv: line 5: time_us = -3\.0"):
        load_scenario(folder / "s.toml")
