"""The command line: what it prints, where, with which exit code, and one sentence for every kind of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmopt.cli import main

TINY = """
name = "tiny"
question = "Which queue is shorter?"
[workload]
rate = 2.0
[[workload.classes]]
name = "chat"
share = 1.0
prompt = { law = "constant", value = 100 }
output = { law = "geometric", mean = 20.0, max = 100 }
ttft = 1.0
[[pools]]
name = "fast"
replicas = 2
price = 2.0
kv_capacity = 4000
step_time = [{ base = 0.01, prefill = 1e-5 }]
[[pools]]
name = "slow"
replicas = 1
price = 1.0
kv_capacity = 2000
step_time = [{ base = 0.03, prefill = 2e-5 }]
[evaluation]
horizon = 100.0
warmup = 10.0
seeds = [1, 2]
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def llmopt(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: str | Path, code: int = 2) -> str:
    """The one sentence of an error; nothing on standard output, no traceback."""
    result = llmopt(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def answered(*arguments: str | Path) -> Any:
    """The JSON on standard output, with nothing else beside it."""
    result = llmopt(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_compare_prints_one_row_per_policy_and_progress_on_standard_error(tiny: Path):
    result = llmopt("compare", tiny, "--policies", "max-margin,jsq,random")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[3:6]] == ["max-margin", "jsq", "random"]
    assert "Which queue is shorter?" in result.stdout and "seeds 1 2" in result.stdout
    assert re.search(r"^\[\d+/12\] jsq$", result.stderr, re.M)


def test_compare_writes_the_same_json_to_a_file_and_to_standard_output(tiny: Path):
    shown = answered("compare", tiny, "--policies", "jsq", "--seeds", "1")
    assert llmopt("compare", tiny, "--policies", "jsq", "--seeds", "1", "--json", "out/a.json").exit_code == 0
    filed = json.loads(Path("out/a.json").read_text())
    assert shown.pop("timings").keys() == filed.pop("timings").keys()
    assert shown == filed and shown["seeds"] == [1]


def test_compare_of_two_scenarios_reports_into_two_folders(tiny: Path, tmp_path: Path):
    other = tmp_path / "other.toml"
    other.write_text(TINY.replace('"tiny"', '"other"'))
    arguments = ("compare", tiny, other, "--policies", "jsq", "--seeds", "4,9", "--report", "out")
    assert [part["seeds"] for part in answered(*arguments)] == [[4, 9], [4, 9]]
    assert {path.parent.name for path in tmp_path.glob("out/*/report.html")} == {"tiny", "other"}


def test_rate_and_load_scale_the_arrivals(tiny: Path):
    assert answered("compare", tiny, "--policies", "jsq", "--rate", "1.5")["rate"] == 1.5
    critical = answered("stability", tiny)["critical_rate"]
    loaded = answered("compare", tiny, "--policies", "max-margin", "--load", "0.8", "--seeds", "1")
    assert loaded["rate"] == pytest.approx(0.8 * critical, rel=1e-6)
    assert loaded["policies"][0]["margin"] == pytest.approx(1 / 0.8, rel=0.01)


def test_check_exits_with_one_unless_a_policy_is_stable(tiny: Path):
    assert llmopt("compare", tiny, "--policies", "jsq", "--check").exit_code == 0
    overloaded = llmopt("compare", tiny, "--policies", "jsq", "--load", "2.0", "--check")
    assert overloaded.exit_code == 1 and "unstable" in overloaded.stdout and "*" in overloaded.stdout
    assert llmopt("compare", tiny, "--policies", "jsq", "--load", "2.0").exit_code == 0


def test_plan_prints_the_split_the_proof_and_the_prices(tiny: Path):
    result = llmopt("plan", tiny)
    assert result.exit_code == 0
    for words in ("fraction of", "to fast", "proven bound", "HiGHS", "price in requests/s"):
        assert words in result.stdout
    data = answered("plan", tiny)
    assert sum(data["router"]["fractions"][0]) == pytest.approx(1.0)
    assert data["solve"]["bound"] >= data["solve"]["objective"] > 0 and data["solve"]["duals"]


def test_plan_describes_a_rule_without_a_program(tiny: Path):
    assert "weight of waiting" in llmopt("plan", tiny, "--policy", "jsq").stdout
    assert "the replicas in turn" in llmopt("plan", tiny, "--policy", "round-robin").stdout
    assert answered("plan", tiny, "--policy", "jsq")["solve"] is None


def test_stability_says_what_binds_and_what_is_needed(tiny: Path):
    result = llmopt("stability", tiny)
    assert result.exit_code == 0 and "max-margin" in result.stdout and "critical rate" in result.stdout
    data = answered("stability", tiny)
    assert data["critical_rate"] <= data["outer_rate"] * (1 + 1e-9) and data["verdict"] == "stable"


def test_stability_checks(tiny: Path):
    assert llmopt("stability", tiny, "--check").exit_code == 0
    assert llmopt("stability", tiny, "--check", "--load", "1.5").exit_code == 1
    assert llmopt("stability", tiny, "--load", "1.5").exit_code == 0


def test_stability_needs_a_split(tiny: Path):
    assert "routes by the state of the replicas" in refused("stability", tiny, "--policy", "jsq")


def test_trace_counts_names_bad_rows_converts_and_draws(tiny: Path, tmp_path: Path):
    Path("log.csv").write_text("when,in,out\n0.0,10,5\n1.0,20,6\n1.5,x,7\n4.0,30,8\n")
    columns = ("--column", "arrival=when", "--column", "prompt=in", "--column", "output=out")
    result = llmopt("trace", "log.csv", *columns, "--to", "plain.csv", "--report", "pictures")
    assert result.exit_code == 0
    assert "3 requests, 1 row skipped" in result.stdout and "skipped line 4" in result.stdout
    assert {path.name for path in tmp_path.glob("pictures/*")} == {"trace.svg", "trace.png"}
    again = answered("trace", "plain.csv")
    assert (again["requests"], again["skipped"], again["span"]) == (3, 0, 4.0)


def test_a_trace_replaces_the_arrivals_of_a_scenario(tiny: Path):
    rows = "".join(f"{0.5 * i},{50 + i},{10 + i}\n" for i in range(40))
    Path("log.csv").write_text("arrival,prompt,output\n" + rows)
    data = answered("compare", tiny, "--trace", "log.csv", "--policies", "jsq", "--seeds", "1")
    assert data["rate"] == pytest.approx(2.0, rel=0.05)


def test_list_names_policies_scenarios_and_hardware():
    data = answered("list")
    assert {"max-margin", "jsq"} <= data["routing policies"].keys()
    assert {"hindsight", "fifo"} <= data["batching policies"].keys()
    assert {"afd-fleet", "afd-published", "afd-one"} <= data["af-ratio policies"].keys()
    assert {"quickstart", "afd-256-100-500"} <= data["scenarios"].keys() and data["hardware"]
    assert all(line for part in data.values() for line in part.values())
    assert "max-margin" in llmopt("list").stdout


OWN = """
from dataclasses import dataclass
from llmopt import Plan, index_router

@dataclass(frozen=True)
class Own:
    name: str = "own"

    def plan(self, scenario):
        return Plan(self.name, index_router(scenario, running=1.0))

@dataclass(frozen=True)
class Broken:
    name: str = "broken"

    def plan(self, scenario):
        raise RuntimeError("out of ideas")
"""


def test_a_users_policy_runs_by_module_and_attribute(tiny: Path):
    Path("mypolicies_cli.py").write_text(OWN)
    data = answered("compare", tiny, "--policies", "mypolicies_cli:Own,jsq", "--seeds", "1")
    assert [row["status"] for row in data["policies"]] == ["ok", "ok"]


def test_a_broken_policy_keeps_its_row_and_alone_it_is_bad_input(tiny: Path):
    Path("mybroken_cli.py").write_text(OWN)
    beside = llmopt("compare", tiny, "--policies", "mybroken_cli:Broken,jsq", "--seeds", "1")
    assert beside.exit_code == 0 and "broken: raised RuntimeError: out of ideas" in beside.stdout
    assert llmopt("compare", tiny, "--policies", "mybroken_cli:Broken", "--seeds", "1").exit_code == 2
    assert "out of ideas" in refused("plan", tiny, "--policy", "mybroken_cli:Broken")


def test_no_cell_is_cut_on_a_narrow_terminal(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Rich takes the terminal from the environment; a row then stands in several tables."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    said = re.sub(r"\x1b\[[0-9;]*m", "", llmopt("compare", tiny, "--policies", "jsq", "--seeds", "1").stdout)
    assert "…" not in said and "USD/M tokens" in said
    assert len(re.findall("^policy", said, flags=re.M)) == len(re.findall("^jsq", said, flags=re.M)) > 1


def test_scenarios_of_one_name_are_refused_before_either_is_played(tiny: Path):
    assert "share a name (tiny, tiny)" in refused("compare", tiny, tiny, "--report", "r")
    assert not Path("r").exists()


def test_the_cheapest_plan_says_how_many_replicas_it_uses(tiny: Path):
    """At most those that exist, and the cost is their price: 2 USD/h for a fast one, 1 for a slow one."""
    said = llmopt("plan", tiny, "--policy", "min-cost").stdout
    used = {name: float(x) for name, x in re.findall(r"^(fast|slow) +[12] +[\d.]+ +([\d.]+)$", said, flags=re.M)}
    cost = re.search(r"^cost +([\d.]+)", said, flags=re.M)
    assert cost is not None and float(cost[1]) == pytest.approx(2 * used["fast"] + used["slow"], rel=0.01)
    assert used["fast"] + used["slow"] > 0 and used["fast"] <= 2 and used["slow"] <= 1


def test_a_policy_module_that_raises_is_bad_input(tiny: Path):
    Path("myraises_cli.py").write_text("raise ValueError('not today')\n")
    message = refused("compare", tiny, "--policies", "myraises_cli:policy")
    assert "myraises_cli" in message and "not today" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("warmup = 10.0", "warmupp = 10.0", ("warmupp", "did you mean 'warmup'")),
        ("rate = 2.0", "rate = -2.0", ("workload.rate", "must be above 0")),
        ("value = 100", "value = nan", ("workload.classes[0].prompt.value",)),
        ("mean = 20.0", "mean = nan", ("workload.classes[0].output.mean", "finite")),
        ("replicas = 2", "replicas = 0", ("pools[0].replicas", "at least 1")),
        ("share = 1.0", "share = 0.7", ("0.7", "not 1")),
        ("kv_capacity = 4000", "kv_capacity = true", ("pools[0].kv_capacity",)),
        ("value = 100", "value = 10000", ("10100 tokens", "kv_capacity")),
        ("[workload]", "[workload", ("not valid TOML",)),
    ],
)
def test_a_bad_scenario_is_refused_with_file_key_and_remedy(tiny: Path, old: str, new: str, words: tuple[str, ...]):
    tiny.write_text(TINY.replace(old, new, 1))
    message = refused("compare", tiny)
    assert "tiny.toml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("log.csv", "empty")),
        ("arrival,prompt,output\n", ("log.csv", "no usable request")),
        ("arrival,prompt,output\n1,nan,5\n2,,6\n", ("log.csv", "no usable request", "prompt")),
        ("arrival,prompt\n1,10\n2,20\n", ("log.csv", "output")),
    ],
)
def test_a_bad_trace_is_refused(tiny: Path, content: str, words: tuple[str, ...]):
    Path("log.csv").write_text(content)
    for message in (refused("trace", "log.csv"), refused("compare", tiny, "--trace", "log.csv")):
        for word in words:
            assert word in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "quickstarts"), "did you mean 'quickstart'?"),
        (("compare", "nowhere/x.toml"), "no such file"),
        (("compare", "quickstart", "--policies", "jsqq"), "did you mean jsq"),
        (("compare", "quickstart", "--policies", ","), "no policy"),
        (("compare", "quickstart", "--seeds", "many"), "--seeds many"),
        (("compare", "quickstart", "--seeds", "0"), "at least 1"),
        (("compare", "quickstart", "--seeds", "1,1"), "repeated"),
        (("compare", "quickstart", "--seeds", str(10**30)), "at most 10000"),
        (("compare", "quickstart", "--seeds", "10000"), "take fewer seeds, or a lower rate or horizon"),
        (("compare", "quickstart", "--rate", "1e7", "--seeds", "1"), "1 x 6e+09 requests"),
        (("plan", "quickstart", "--json", ""), "names no file to write"),
        (("compare", "quickstart", "--rate", "-1"), "--rate -1"),
        (("compare", "quickstart", "--rate", "nan"), "--rate nan"),
        (("compare", "quickstart", "--rate", "1", "--load", "0.5"), "drop one of the two"),
        (("trace", "nowhere.csv"), "nowhere.csv"),
        (("trace", "nowhere.csv", "--column", "arrival"), "has no '='"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], words: str):
    assert words in refused(*arguments)


def test_an_infeasible_program_is_an_answer_of_no(tiny: Path):
    message = refused("plan", tiny, "--policy", "min-cost", "--rate", "1000", code=1)
    assert "pool" in message or "class" in message
    result = llmopt("compare", tiny, "--policies", "min-cost", "--rate", "1000", "--seeds", "1")
    assert result.exit_code == 1 and "min-cost: infeasible: " in result.stdout


def test_a_place_that_cannot_be_written_leaves_nothing_behind(tiny: Path, tmp_path: Path):
    Path("blocked").write_text("a file where a folder should be")
    result = llmopt("list", "--json", "blocked/list.json")
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    Path("log.csv").write_text("arrival,prompt,output\n0,10,5\n1,20,6\n")
    assert "suffix" in refused("trace", "log.csv", "--to", "trace.xyz")
    assert not list(tmp_path.glob("*trace.xyz*"))


def test_an_interrupt_is_quiet(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmopt.api.plan", interrupt)
    result = llmopt("plan", tiny)
    assert (result.exit_code, result.stderr.strip()) == (130, "interrupted")


def test_unknown_commands_and_options_are_usage_errors():
    assert llmopt("calibrate").exit_code == 2
    assert llmopt("compare").exit_code == 2
    assert "Usage" in llmopt("compare", "--nonsense").stderr
