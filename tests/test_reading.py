"""Scenario files: bundled names, catalog entries, traces of their own or from outside, and every bad file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmopt.errors import ScenarioError
from llmopt.reading import bundled_scenarios, load_scenario

SCENARIO = """
[workload]
rate = 4.0
arrivals = { law = "poisson" }

[[workload.classes]]
name = "short"
share = 0.5
prompts = [1, 100]
prompt = { law = "constant", value = 50 }
output = { law = "constant", value = 10 }

[[workload.classes]]
name = "long"
share = 0.5
prompts = [101, 2000]
prompt = { law = "constant", value = 500 }
output = { law = "constant", value = 10 }

[[pools]]
name = "p"
replicas = 2
kv_capacity = 1600
step_time = [{ base = 0.01 }]
"""
TRACE = "arrival,prompt,output\n0.0,40,5\n1.0,400,20\n2.0,60,9\n4.0,80,7\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scenario s.toml and trace t.csv, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(SCENARIO)
    (tmp_path / "t.csv").write_text(TRACE)
    return tmp_path


def put(folder: Path, *changes: tuple[str, str]) -> None:
    """Rewrite s.toml with the changes applied, each of which must bite."""
    text = SCENARIO
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "s.toml").write_text(text)


OWN_TRACE = (
    '[[workload.classes]]\nname = "short"',
    '[workload.trace]\nfile = "t.csv"\n\n[[workload.classes]]\nname = "short"',
)
REPLAY = ('arrivals = { law = "poisson" }', 'arrivals = { law = "replay" }')
NO_RATE = ("rate = 4.0\n", "")
NO_SHARES = ("share = 0.5\n", "")
NO_LAWS = (
    ('prompt = { law = "constant", value = 50 }\noutput = { law = "constant", value = 10 }\n', ""),
    ('prompt = { law = "constant", value = 500 }\noutput = { law = "constant", value = 10 }\n', ""),
)


def test_a_file_is_named_after_itself(write: Path) -> None:
    assert load_scenario("s.toml").name == "s"
    assert load_scenario(write / "s.toml").workload.rates.tolist() == [2.0, 2.0]


def test_a_bundled_name_wins_over_a_file_beside_it(write: Path) -> None:
    (write / "quickstart").mkdir()
    assert load_scenario("quickstart").name == "quickstart"
    found = bundled_scenarios()
    assert "quickstart" in found
    assert all(path.is_file() and path.stem == name for name, path in found.items())


def test_catalog_fills_what_a_pool_does_not_give(write: Path) -> None:
    put(write, ("kv_capacity = 1600\nstep_time = [{ base = 0.01 }]", 'catalog = "nie-a100-llama3-8b"\nmax_batch = 7'))
    pool = load_scenario("s.toml").pools[0]
    assert (pool.kv_capacity, pool.max_batch, pool.stepper()) == (131_000, 7, 0.0372)
    assert pool.catalog == "nie-a100-llama3-8b"
    assert "Nie, Si and Zhou" in pool.source


def test_trace_from_outside_is_replayed_whole(write: Path) -> None:
    """Four requests over 4 s stand for 16/3 s; prompts sort them into classes; the file's laws and rates give way."""
    scenario = load_scenario("s.toml", "t.csv")
    assert scenario.evaluation.horizon == pytest.approx(16 / 3)
    assert scenario.workload.rates == pytest.approx([0.75 * 0.75, 0.25 * 0.75])
    requests = scenario.workload.sample(scenario.evaluation.horizon, 1)
    assert requests.arrival == pytest.approx([0.0, 1.0, 2.0, 4.0])
    assert requests.prompt.tolist() == [40, 400, 60, 80]
    assert requests.cls.tolist() == [0, 1, 0, 0]
    short = scenario.workload.classes[0]
    assert short.prompt.mean == pytest.approx(60)
    assert short.expect(lambda s: s, lambda o: o) == pytest.approx((40 * 5 + 60 * 9 + 80 * 7) / 3)
    assert scenario.workload.trace is not None
    assert scenario.workload.trace.file == "t.csv"


def test_own_trace_is_relative_to_the_scenario(write: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(write, OWN_TRACE, REPLAY, NO_RATE, NO_SHARES, *NO_LAWS)
    (write / "sub").mkdir()
    monkeypatch.chdir(write / "sub")
    assert len(load_scenario("../s.toml").workload.sample(100.0, 1)) == 4


def test_a_replay_may_be_scaled_in_time_or_to_a_rate(write: Path) -> None:
    put(write, OWN_TRACE, ('law = "poisson"', 'law = "replay", time_scale = 0.5'), NO_RATE, NO_SHARES, *NO_LAWS)
    assert load_scenario("s.toml").workload.sample(100.0, 1).arrival == pytest.approx([0.0, 0.5, 1.0, 2.0])
    put(write, OWN_TRACE, REPLAY, ("rate = 4.0", "rate = 7.5"), NO_SHARES, *NO_LAWS)
    scenario = load_scenario("s.toml")
    assert scenario.workload.total_rate == pytest.approx(7.5)
    assert scenario.workload.sample(100.0, 1).arrival == pytest.approx([0.0, 0.1, 0.2, 0.4])
    assert scenario.replace(**{"workload.rate": 0.75}).workload.sample(100.0, 1).arrival[-1] == pytest.approx(4.0)


@pytest.mark.parametrize("rate", [30.0, 0.2])
def test_a_replay_keeps_its_requests_at_another_rate(write: Path, rate: float) -> None:
    """Four requests stand for 4 / rate s, which is what goodput and cost are counted over."""
    scenario = load_scenario("s.toml", "t.csv").replace(**{"workload.rate": rate})
    assert scenario.evaluation.horizon == pytest.approx(4 / rate)
    assert len(scenario.workload.sample(scenario.evaluation.horizon, 1)) == 4
    assert scenario.replace(**{"workload.rate": 1.0, "evaluation.horizon": 2.5}).evaluation.horizon == 2.5


def test_a_byte_order_mark_is_no_part_of_a_scenario(write: Path) -> None:
    (write / "s.toml").write_text(SCENARIO, encoding="utf-8-sig")
    assert load_scenario("s.toml").name == "s"


def test_a_horizon_cuts_a_replay_and_its_rates(write: Path) -> None:
    """Three requests in the first 2.5 s, over a span of 2 s that stands for 3 s."""
    put(
        write,
        OWN_TRACE,
        REPLAY,
        NO_RATE,
        NO_SHARES,
        *NO_LAWS,
        ("[[pools]]", "[evaluation]\nhorizon = 2.5\n\n[[pools]]"),
    )
    scenario = load_scenario("s.toml")
    assert scenario.evaluation.horizon == 2.5
    assert scenario.workload.rates == pytest.approx([2 / 3, 1 / 3])


def test_with_another_law_the_trace_gives_lengths_only(write: Path) -> None:
    put(write, OWN_TRACE, NO_SHARES, *NO_LAWS)
    scenario = load_scenario("s.toml")
    assert scenario.workload.rates == pytest.approx([3.0, 1.0])
    requests = scenario.workload.sample(500.0, 1)
    assert set(zip(requests.prompt.tolist(), requests.output.tolist(), strict=True)) == {
        (40, 5),
        (60, 9),
        (80, 7),
        (400, 20),
    }
    put(write, OWN_TRACE, *NO_LAWS)
    assert load_scenario("s.toml").workload.rates == pytest.approx([2.0, 2.0])
    put(write, OWN_TRACE, NO_RATE, NO_SHARES, *NO_LAWS)
    assert load_scenario("s.toml").workload.total_rate == pytest.approx(0.75)


def test_a_scenario_that_only_borrows_lengths_keeps_doing_so(write: Path) -> None:
    put(write, OWN_TRACE, *NO_LAWS)
    (write / "u.csv").write_text("prompt,output\n30,5\n300,5\n")
    scenario = load_scenario("s.toml", "u.csv")
    assert scenario.workload.replay is None
    assert scenario.workload.rates == pytest.approx([2.0, 2.0])
    assert [c.prompt.largest for c in scenario.workload.classes] == [30, 300]


def test_the_digest_follows_the_content_of_a_trace_not_its_name(write: Path) -> None:
    (write / "copy.csv").write_text(TRACE)
    (write / "other.csv").write_text(TRACE.replace("2.0,60,9", "2.0,60,8"))
    (write / "later.csv").write_text(TRACE.replace("2.0,60,9", "2.5,60,9"))
    names = ("t.csv", "copy.csv", "other.csv", "later.csv")
    first, copy, other, later = (load_scenario("s.toml", name).digest for name in names)
    assert first == copy and len({first, other, later}) == 3


def test_replace_keeps_a_replay(write: Path) -> None:
    changed = load_scenario("s.toml", "t.csv").replace(**{"pools.0.replicas": 5})
    assert changed.pools[0].replicas == 5
    assert changed.workload.sample(100.0, 1).output.tolist() == [5, 20, 9, 7]
    assert np.allclose(changed.workload.rates, [0.5625, 0.1875])


def test_long_requests_may_be_left_out(write: Path) -> None:
    put(write, (OWN_TRACE[0], OWN_TRACE[1].replace('"t.csv"', '"t.csv"\nmax_tokens = 100')), REPLAY, NO_RATE, NO_SHARES)
    text = (write / "s.toml").read_text()
    (write / "s.toml").write_text(
        text.replace("prompts = [101, 2000]", "prompts = [60, 2000]").replace("[1, 100]", "[1, 59]")
    )
    assert load_scenario("s.toml").workload.sample(100.0, 1).prompt.tolist() == [40, 60, 80]


BAD_TRACES = [
    (
        TRACE + "5.0,1590,30\n6.0,1700,1\n",
        "2 of 6 requests exceed the KV memory of every pool, the first at line 6 with",
    ),
    (TRACE + "5.0,2500,30\n", "1 of 5 requests exceed the KV memory"),
    ("arrival,prompt,output\n0.0,10,1\n1.0,20,1\n", "none of 2 requests belongs to class 'long'"),
    (TRACE + "5.0,x,30\n", "1 of 5 rows are no requests, the first is line 6 (prompt = x is no whole number"),
    (TRACE + "5.0,30,nan\n", "1 of 5 rows are no requests, the first is line 6 (output = nan is no whole number"),
    ("arrival,prompt,output\n0.0,10,1\n0.0,200,1\n", "all requests arrive at one instant"),
    ("prompt,output\n10,1\n200,1\n", "has lengths but no arrival times"),
    ("arrival,prompt,output\n", "has no usable request"),
    ("", "is empty"),
    ("arrival,prompt\n1,2\n", "has no column for output tokens (found arrival, prompt)"),
]


@pytest.mark.parametrize(("text", "words"), BAD_TRACES, ids=[words[:40] for _, words in BAD_TRACES])
def test_traces_that_do_not_fit_are_refused(write: Path, text: str, words: str) -> None:
    (write / "t.csv").write_text(text)
    with pytest.raises(ScenarioError) as refused:
        load_scenario("s.toml", "t.csv")
    assert str(refused.value).startswith("t.csv: ")
    assert words in str(refused.value)


def test_a_request_outside_every_class_is_refused(write: Path) -> None:
    put(write, ("[101, 2000]", "[101, 300]"))
    with pytest.raises(
        ScenarioError, match="1 of 4 requests belong to no class, the first at line 3 with a prompt of 400"
    ):
        load_scenario("s.toml", "t.csv")


def test_rate_and_time_scale_exclude_each_other(write: Path) -> None:
    put(write, OWN_TRACE, ('law = "poisson"', 'law = "replay", time_scale = 0.5'), NO_SHARES, *NO_LAWS)
    with pytest.raises(ScenarioError, match="both a rate and a time_scale; drop one"):
        load_scenario("s.toml")


def test_bad_rows_may_be_skipped_on_demand(write: Path) -> None:
    (write / "t.csv").write_text(TRACE + "5.0,x,30\n")
    put(
        write,
        (OWN_TRACE[0], OWN_TRACE[1].replace('"t.csv"', '"t.csv"\nskip_bad_rows = true')),
        REPLAY,
        NO_RATE,
        NO_SHARES,
    )
    assert len(load_scenario("s.toml").workload.sample(100.0, 1)) == 4


BAD_FILES = [
    ([("[workload]", "[workload")], "is not valid TOML: "),
    ([("rate = 4.0", "rate = 4.0\nrate = 5.0")], "is not valid TOML: "),
    ([("rate = 4.0", "rate = -4.0")], "workload.rate = -4.0 must be above 0"),
    ([("replicas = 2", "replcas = 2")], "pools[0].replcas is not a known key; did you mean 'replicas'?"),
    ([("share = 0.5", "share = 0.4")], "workload has class shares that sum to 0.8, not 1; scale them to fractions"),
    ([REPLAY], "workload has arrivals law 'replay' but no trace; add [workload.trace] file or pass --trace FILE"),
    (
        [OWN_TRACE, REPLAY, ('file = "t.csv"', 'file = "t.csv"\nfromat = "azure"')],
        "workload.trace.fromat is not a known",
    ),
    ([OWN_TRACE, REPLAY, ('file = "t.csv"', "")], "workload.trace.file is missing; add it"),
    ([OWN_TRACE, ("[1, 100]", '"all"')], "workload.classes[0].prompts = 'all' must be a list"),
    ([("kv_capacity = 1600", 'catalog = "nope"')], "pools[0].catalog: catalog entry 'nope' does not exist; known are"),
    ([("kv_capacity = 1600", "catalog = 3\nkv_capacity = 1600")], "pools[0].catalog = 3 must be a text in quotes"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_FILES, ids=[words[:40] for _, words in BAD_FILES])
def test_bad_files_are_refused_in_one_sentence(write: Path, changes: list[tuple[str, str]], words: str) -> None:
    put(write, *changes)
    with pytest.raises(ScenarioError) as refused:
        load_scenario("s.toml")
    assert str(refused.value).startswith("s.toml: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_scenario_file_is_refused(write: Path) -> None:
    (write / "b.toml").write_bytes(b"\x00\xff\xfe")
    for path, words in [
        ("b.toml", "b.toml: is not a text file"),
        ("t.csv", "pass a trace with --trace"),
        (".", ".: is a folder"),
        ("gone.toml", "gone.toml: no such file; check the path"),
        ("quikstart", "no such file or bundled scenario; did you mean 'quickstart'?"),
    ]:
        with pytest.raises(ScenarioError) as refused:
            load_scenario(path)
        assert words in str(refused.value)
    with pytest.raises(ScenarioError, match=r"gone\.csv: no such trace file"):
        load_scenario("s.toml", "gone.csv")
    with pytest.raises(ScenarioError, match="is a folder; give a trace file"):
        load_scenario("s.toml", ".")
