"""Trace readers on files written here in every layout, and on the real files where they are at hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.trace_data import Prefixes, Trace
from llmopt.trace_servegen import sample_servegen
from llmopt.trace_summary import window_counts
from llmopt.traces import format_names, read_trace, trace_summary, write_trace

Saver = Callable[[str, str], Path]


@pytest.fixture
def save(tmp_path: Path) -> Saver:
    """Writes a text under a name and returns its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


LAYOUTS = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:48.1805900,396,109\r\n2023-11-16 18:15:50.6805900,879,55\r\n"
    ),
    "azure 2024": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00.500000+00:00,374,44\n"
        "2024-05-12 00:00:02+00:00,396,109\n2024-05-12 00:00:04.500000+00:00,879,55\n"
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,374,44,418,Conversation log\n"
        "6.5,GPT-4,396,109,505,API log\n9,ChatGPT,879,55,934,Conversation log\n"
    ),
    "burstgpt 2": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.0,aa,4,ChatGPT,374,44,418,Conversation log\n6.5,bb,2,GPT-4,396,109,505,API log\n"
        "9.0,aa,1,ChatGPT,879,55,934,Conversation log\n"
    ),
    "mooncake": (
        '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
        '{"timestamp": 1500, "input_length": 396, "output_length": 109, "hash_ids": [1]}\n'
        '{"timestamp": 4000, "input_length": 879, "output_length": 55, "hash_ids": [0, 2]}\n'
    ),
    "qwen-bailian": (
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.0, "input_length": 374, "output_length": 44}\n'
        '{"chat_id": 2, "timestamp": 1.5, "input_length": 396, "output_length": 109, "turn": 1, "hash_ids": []}\n'
        '{"chat_id": 3, "timestamp": 4.0, "input_length": 879, "output_length": 55, "turn": 1, "hash_ids": [0]}\n'
    ),
    "vllm-log": (
        '{"request_id": "bench-0", "input_toks": 374, "output_toks": 44, "arrival_time": 1787267980.0}\n'
        '{"request_id": "bench-1", "input_toks": 396, "output_toks": 109, "arrival_time": 1787267981.5}\n'
        '{"request_id": "bench-2", "input_toks": 879, "output_toks": 55, "arrival_time": 1787267984.0}\n'
    ),
    "vllm-bench": json.dumps(
        {
            "duration": 9.0,
            "completed": 3,
            "input_lens": [374, 396, 879],
            "output_lens": [44, 109, 55],
            "ttfts": [0.1, 0.1, 0.1],
            "itls": [[0.01], [0.01], []],
            "start_times": [100.0, 101.5, 104.0],
            "errors": ["", "", ""],
        }
    ),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n1.5,396,109\n4.0,879,55\n"),
    "generic": "arrival;prompt;output\n0.0;374;44\n1.5;396;109\n4.0;879;55\n",
    "generic json": '[{"time": 0, "prompt_tokens": 374, "completion_tokens": 44}, {"time": 1.5, "prompt_tokens": 396,'
    ' "completion_tokens": 109}, {"time": 4, "prompt_tokens": 879, "completion_tokens": 55}]',
    "generic ms": "t_ms,prompt,output\n".replace("t_ms", "timestamp_ms") + "0,374,44\n1500,396,109\n4000,879,55\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_by_its_content(layout: str, save: Saver) -> None:
    """The same three requests in every layout, under a name that gives nothing away."""
    path = save("file.dat", LAYOUTS[layout])
    trace = read_trace(path)
    assert trace.format == layout.split()[0]
    assert trace.arrival == pytest.approx([0.0, 1.5, 4.0], abs=1e-6)
    assert trace.prompt.tolist() == [374, 396, 879]
    assert trace.output.tolist() == [44, 109, 55]
    assert trace.skipped == ()
    assert trace.timed
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_trace(path, format=trace.format).prompt.tolist() == [374, 396, 879]


def test_lengths_without_times_are_a_trace_too(save: Saver) -> None:
    trace = read_trace(
        save("x", "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n7,2,9,3.5\n8,3,11,2\n")
    )
    assert (trace.format, trace.timed, len(trace)) == ("lengths", False, 2)
    summary = trace_summary(trace)
    assert np.isnan(summary.rate)
    assert summary.prompt.mean == 7.5


def test_columns_may_be_named(save: Saver) -> None:
    path = save("x.csv", "when,Ins,outs,ms\n2024-01-01T00:00:00Z,5,6,0\n2024-01-01T00:00:01.25Z,7,8,2500\n")
    trace = read_trace(path, columns={"arrival": "when", "prompt": "ins", "output": "outs"})
    assert (trace.arrival.tolist(), trace.prompt.tolist()) == ([0.0, 1.25], [5, 7])
    trace = read_trace(path, columns={"arrival_ms": "ms", "prompt": "Ins", "output": "outs"})
    assert trace.arrival.tolist() == [0.0, 2.5]
    trace = read_trace(path, columns={"prompt": "Ins", "output": "outs"})
    assert not trace.timed


def test_epoch_times_in_finer_units_are_recognised(save: Saver) -> None:
    for unit in (1, 1e3, 1e6, 1e9):
        rows = "".join(f"{int((1_700_000_000 + t) * unit)},5,5\n" for t in (0, 2, 3))
        assert read_trace(save("x.csv", "time,prompt,output\n" + rows)).arrival == pytest.approx([0, 2, 3], abs=1e-3)


def test_bad_rows_are_named_by_line_and_counted(save: Saver) -> None:
    text = """\
        arrival,prompt,output
        0,10,1
        1,abc,1
        2,10,nan
        3,10,-4
        oops,10,4

        5,10,2.5
        6,10,0
        7,10,1,9
        8,,3
        9,20,2
        """
    trace = read_trace(save("x.csv", textwrap.dedent(text)))
    assert trace.line.tolist() == [2, 12]
    assert trace.prompt.tolist() == [10, 20]
    reasons = {s.line: s.reason for s in trace.skipped}
    assert sorted(reasons) == [3, 4, 5, 6, 8, 9, 10, 11]
    assert "prompt = abc is no whole number" in reasons[3]
    assert "output = nan" in reasons[4]
    assert "output = -4" in reasons[5]
    assert "arrival = oops is no time" in reasons[6]
    assert "output = 2.5" in reasons[8]
    assert reasons[9] == "output = 0, a request without output"
    assert reasons[10] == "has 4 fields instead of 3"
    assert "prompt = nan" in reasons[11]


def test_bad_json_lines_are_named_by_line(save: Saver) -> None:
    good = '{"timestamp": %d, "input_length": 5, "output_length": 6, "hash_ids": [1]}\n'
    text = good % 0 + '{"timestamp": 5, "inp\n' + "\n" + "[1, 2]\n" + '{"timestamp": 9}\n' + good % 1000
    trace = read_trace(save("x.jsonl", text))
    assert trace.line.tolist() == [1, 6]
    assert [(s.line, s.reason.split(" = ")[0]) for s in trace.skipped] == [
        (2, "is not valid JSON"),
        (4, "is not a JSON object"),
        (5, "input_length"),
    ]
    assert trace.prefixes is not None
    assert trace.prefixes.ids.tolist() == [1, 1]


def test_rows_out_of_order_are_sorted_and_counted(save: Saver) -> None:
    trace = read_trace(save("x.csv", "arrival,prompt,output\n5,1,1\n3,2,2\n4,3,3\n3,4,4\n9,5,5\n"))
    assert trace.arrival.tolist() == [0, 0, 1, 2, 6]
    assert trace.prompt.tolist() == [2, 4, 3, 1, 5]
    assert trace.line.tolist() == [3, 5, 4, 2, 6]
    assert trace.reordered == 2


def test_prefix_hashes_follow_their_requests(save: Saver) -> None:
    rows = [(2000, [7, 8]), (0, [7]), (1000, [])]
    text = "".join(
        json.dumps({"timestamp": t, "input_length": 9, "output_length": 1, "hash_ids": h}) + "\n" for t, h in rows
    )
    prefixes = read_trace(save("x", text)).prefixes
    assert prefixes is not None
    assert [prefixes.of(i).tolist() for i in range(3)] == [[7], [], [7, 8]]
    assert prefixes.block == 512


BAD = [
    ("", "is empty; give a trace with at least one request"),
    ("  \n \n", "is empty"),
    ("arrival,prompt,output\n", "has no usable request (0 of 0 rows); give at least one"),
    ("arrival,prompt,output\n1,x,2\n", "has no usable request (0 of 1 rows, the first is line 2: prompt = x is no"),
    ("arrival,prompt,output\n1,nan,2\n2,nan,4\n", "has no usable request (0 of 2 rows"),
    ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,5\n", "looks like a trace in azure layout but has no column 'Gen"),
    ("a,b\n1,2\n", "has no column for prompt and output tokens (found a, b); name the columns with columns = {"),
    ("arrival,prompt\n1,2\n", "has no column for output tokens (found arrival, prompt)"),
    ('{"timestamp": 0, "input_length": 5}\n{"timestamp": 1, "input_length": 5}\n', "looks like a trace in mooncake"),
    ('{"nonsense\n', "has no valid JSON object in it"),
    ('{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "{1: 1.0}"}}', "holds ServeGen length tables"),
    (
        '{"input_lens": [1], "output_lens": [2]}',
        "looks like a trace in vllm-bench layout but has no column 'start_times'",
    ),
    ("t_s,rate,cv,pattern,param1,param2\n0,1.0,1.0,Gamma,1.0,1.0\n", "is a ServeGen table of rates without lengths"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_unusable_files_are_refused_in_one_sentence(text: str, words: str, save: Saver) -> None:
    path = save("x.dat", text)
    with pytest.raises(ScenarioError) as refused:
        read_trace(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_refusals(save: Saver, tmp_path: Path) -> None:
    path = save("x.csv", "a,b,c\n1,2,3\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": "azur"}, "trace format 'azur' is not known; did you mean 'azure'?"),
        ({"format": "azure"}, "looks like a trace in azure layout but has no column 'TIMESTAMP', 'ContextTokens'"),
        ({"columns": {"promt": "a"}}, "columns has 'promt'; did you mean 'prompt'?"),
        ({"columns": {"prompt": "a"}}, "columns names no output"),
        ({"columns": {"prompt": "a", "output": "z"}}, "has no column 'z' (found a, b, c); correct columns"),
    ]
    for keys, words in cases:
        with pytest.raises(ScenarioError) as refused:
            read_trace(path, **keys)
        assert words in str(refused.value)
    for target, words in ((tmp_path, "is a folder"), (tmp_path / "gone", "no such trace file")):
        with pytest.raises(ScenarioError, match=words):
            read_trace(target)
    path.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_trace(path)
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(ScenarioError, match="is not a readable Parquet file"):
        read_trace(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ScenarioError, match="is neither text nor Parquet"):
        read_trace(path)
    with pytest.raises(ScenarioError, match="cannot write a trace with this suffix"):
        write_trace(_trace([0.0, 1.0]), tmp_path / "x.xlsx")


def test_parquet_without_pyarrow_names_the_extra(save: Saver) -> None:
    path = save("x.parquet", "PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None; sys.modules['fastparquet'] = None\n"
        "from llmopt.traces import read_trace\nfrom llmopt.errors import ScenarioError\n"
        f"try: read_trace({str(path)!r})\nexcept ScenarioError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Parquet needs pyarrow; install it with pip install llmopt[parquet]" in done.stdout


def _trace(arrival: list[float] | Floats, hashes: Prefixes | None = None) -> Trace:
    n = len(arrival)
    whole = np.arange(1, n + 1)
    return Trace(np.array(arrival, dtype=float), whole * 10, whole, whole, "generic", "x", prefixes=hashes)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_what_is_written_is_read_again(suffix: str, tmp_path: Path) -> None:
    hashes = Prefixes(np.array([5, 6, 5]), np.array([0, 1, 1, 3]), 512)
    trace = _trace([0.0, 0.1 + 0.2, 1e3 / 7], hashes)
    again = read_trace(write_trace(trace, tmp_path / f"t.{suffix}"))
    assert again.arrival == pytest.approx(trace.arrival, rel=1e-12)
    assert again.prompt.tolist() == trace.prompt.tolist()
    assert again.output.tolist() == trace.output.tolist()
    assert again.prefixes is not None
    assert again.prefixes.ids.tolist() == [5, 6, 5]
    assert again.prefixes.start.tolist() == [0, 1, 1, 3]


def test_summary_of_a_hand_made_trace() -> None:
    """Gaps 1, 1, 4: mean 2, deviation sqrt(2); counts per second 1,1,1,0,0,0 over six whole windows."""
    summary = trace_summary(_trace([0.0, 1.0, 2.0, 6.0], Prefixes(np.array([1, 2, 1]), np.array([0, 2, 2, 3, 3]), 512)))
    assert (summary.requests, summary.span, summary.rate) == (4, 6.0, 0.5)
    assert summary.gaps.cv == pytest.approx(np.sqrt(2) / 2)
    assert summary.burstiness == pytest.approx((np.sqrt(2) / 2 - 1) / (np.sqrt(2) / 2 + 1))
    assert summary.dispersion["1 s"] == pytest.approx(0.25 / 0.5)
    assert summary.correlation == pytest.approx(1.0)
    assert summary.rank_correlation == pytest.approx(1.0)
    assert summary.prefix_hits == pytest.approx(1 / 3)
    assert summary.prompt.quantiles["p50"] == 25
    assert json.loads(json.dumps(summary.as_dict()))["output"]["max"] == 4


def test_poisson_and_clock_have_the_burstiness_of_textbooks() -> None:
    rng = np.random.default_rng(1)
    poisson = trace_summary(_trace(np.cumsum(rng.exponential(0.1, 50_000))))
    assert poisson.burstiness == pytest.approx(0.0, abs=0.02)
    assert poisson.dispersion["10 s"] == pytest.approx(1.0, abs=0.2)
    clock = trace_summary(_trace(np.arange(0, 100, 0.1)))
    assert clock.burstiness == pytest.approx(-1.0, abs=1e-6)
    assert clock.peak_rate == pytest.approx(10.0, abs=0.02)


@given(gaps=st.lists(st.floats(0, 5), min_size=1, max_size=40), window=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=50, deadline=None)
def test_window_counts_agree_with_counting(gaps: list[float], window: float) -> None:
    arrival = np.concatenate([[0.0], np.cumsum(gaps)])
    counts = window_counts(arrival, window)
    assert len(counts) == int(arrival[-1] // window)
    assert counts.tolist() == [sum(a // window == k for a in arrival) for k in range(len(counts))]


SERVEGEN = "0,0.5,1.0,Gamma,1.0,2.0\n600,0.0,,,,\n1200,0.25,2.0,Weibull,0.6,1.0\n"
LENGTHS = json.dumps(
    {
        "0": {"input_tokens": "{10: 0.5, 30: 0.5}", "output_tokens": "{5: 1.0}"},
        "1200": {"input_tokens": "{77: 1.0}", "output_tokens": "{0: 0.5, 9: 0.5}"},
    }
)


def test_servegen_client_table_gives_the_counted_requests(save: Saver) -> None:
    """300 requests in the first window, none in the second, 150 in the third, which has another length table."""
    save("chunk-4-dataset.json", LENGTHS)
    trace = read_trace(save("chunk-4-trace.csv", SERVEGEN))
    early = trace.line == 1
    assert (trace.format, early.sum(), len(trace)) == ("servegen", 300, 450)
    assert set(trace.prompt[early].tolist()) == {10, 30}
    assert set(trace.prompt[~early].tolist()) == {77}
    assert set(trace.output[~early].tolist()) == {1, 9}
    assert (np.diff(trace.arrival) >= 0).all()
    assert trace.arrival[~early].min() > 500
    again = read_trace(trace.path)
    assert again.arrival.tobytes() == trace.arrival.tobytes()


def test_servegen_clients_without_lengths_are_named(save: Saver) -> None:
    save("m_chunk-4-dataset.json", LENGTHS)
    text = "client,t_s,rate,cv,pattern,param1,param2\n4,0,0.5,1.0,Gamma,1.0,2.0\n5,0,0.5,1.0,Gamma,1.0,2.0\n"
    trace = read_trace(save("m_traces.csv", text))
    assert len(trace) == 300
    assert [(s.line, s.reason) for s in trace.skipped] == [(3, "has no length table for client 5")]


def test_servegen_sampling_stops_at_a_limit(save: Saver) -> None:
    from llmopt.trace_files import read_table

    save("chunk-4-dataset.json", LENGTHS)
    path = save("chunk-4-trace.csv", SERVEGEN)
    trace = sample_servegen(read_table(path), path, limit=200)
    assert len(trace) == 300
    assert [s.line for s in trace.skipped] == [3]


def test_formats_have_names_without_repeats() -> None:
    assert len(set(format_names())) == len(format_names())


REAL = [
    ("azure-llm-2023/AzureLLMInferenceTrace_conv.csv", "azure", 19366, 3501.7, 5.530, 1.09, 1155, 211.1, 14050),
    ("azure-llm-2023/AzureLLMInferenceTrace_code.csv", "azure", 8819, 3435.9, 2.566, 13.2, 2048, 27.88, 7437),
    ("mooncake-fast25/conversation_trace.jsonl", "mooncake", 12031, 3537.0, 3.401, 3.03, 12035, 342.6, 126195),
    ("vllm-runs/RTX4090_Llama-3.1-8B/requests.jsonl", "vllm-log", 300, 29.1, 10.275, 0.94, 857.5, 652.5, 3998),
]


@pytest.mark.parametrize("row", REAL, ids=[row[0].rsplit("/", 1)[-1] for row in REAL])
def test_real_traces_have_their_published_statistics(row: tuple[Any, ...], shared: Path) -> None:
    name, layout, n, span, rate, cv, prompt, output, longest = row
    trace = read_trace(shared / "data" / name)
    summary = trace_summary(trace)
    assert (trace.format, len(trace), len(trace.skipped), trace.reordered) == (layout, n, 0, 0)
    assert summary.span == pytest.approx(span, abs=0.1)
    assert summary.rate == pytest.approx(rate, abs=1e-3)
    assert summary.gaps.cv == pytest.approx(cv, rel=0.005)
    assert summary.prompt.mean == pytest.approx(prompt, rel=5e-4)
    assert summary.output.mean == pytest.approx(output, rel=5e-4)
    assert summary.prompt.max == longest


def test_mooncake_shares_the_published_part_of_its_prefixes(shared: Path) -> None:
    summary = trace_summary(read_trace(shared / "data/mooncake-fast25/conversation_trace.jsonl"))
    assert summary.prefix_blocks == 288_500
    assert summary.prefix_hits == pytest.approx(0.366, abs=5e-4)


def test_servegen_tables_keep_their_rates(shared: Path) -> None:
    """Clients 3, 35 and 48 of deepseek-r1 have length tables: 43 % of the service's 16.01 requests/s."""
    path = shared / "data/servegen/reason_deepseek-r1_traces.csv.gz"
    trace = read_trace(path)
    assert len(trace) / 86_400 == pytest.approx(1.070 + 4.578 + 1.258, abs=1e-3)
    assert len(trace.skipped) == 3111 - sum(1 for line in np.unique(trace.line))


def test_the_load_of_a_busy_slot_is_that_of_requests_played_one_after_the_other() -> None:
    rng = np.random.default_rng(5)
    prompt, output = rng.integers(1, 900, 40), rng.integers(1, 60, 40)
    trace = Trace(np.arange(40.0), prompt, output, np.arange(40), "plain", "t")
    played = np.concatenate([p + np.arange(o) for p, o in zip(prompt, output, strict=True)])
    summary = trace_summary(trace)
    assert summary.slot_load == pytest.approx(played.mean())
    assert summary.slot_deviation == pytest.approx(played.std())
    assert 0 < summary.slot_error < summary.slot_load
