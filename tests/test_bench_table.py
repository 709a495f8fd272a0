"""Reading benchmark logs: known layouts, named columns, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmopt.calibrate.bench_table import read_benchmarks
from llmopt.errors import ScenarioError

SHARED = Path(__file__).parents[2] / "shared/data"
NEEDS_DATA = pytest.mark.skipif(
    not SHARED.exists(), reason="the measured points lie outside the repository, in ../shared"
)
Saver = Callable[[str], Path]

PLAIN = """concurrency,isl,osl,ttft_ms,tpot_ms,gpu
4,1000,100,50,10,A
8,1000,100,70,12,A
16,1000,100,100,15.5,A
"""


@pytest.fixture
def save(tmp_path: Path) -> Saver:
    """Writes a log and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "log.csv"
        path.write_text(text)
        return path

    return write


def test_a_plain_table(save: Saver) -> None:
    (table,) = read_benchmarks(save(PLAIN)).tables
    assert table.setting["system"] == "A"
    assert table.label == "A"
    assert table.load.concurrency.tolist() == [4, 8, 16]
    assert table.ttft == pytest.approx([0.05, 0.07, 0.1])
    assert table.tpot == pytest.approx([0.01, 0.012, 0.0155])
    assert not table.load.static


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("max_concurrency,input_len,output_len,mean_ttft_s,mean_tpot_s", 1.0),
        ("batch,prompt,output,ttft_us,itl_us", 1e-6),
        ("Concurrency,ISL,OSL,TTFT_ms,TPOT_ms", 1e-3),
    ],
)
def test_names_and_units_are_recognised(save: Saver, header: str, unit: float) -> None:
    (table,) = read_benchmarks(save(f"{header}\n4,1000,100,3,2\n")).tables
    assert (table.ttft[0], table.tpot[0]) == pytest.approx((3 * unit, 2 * unit))


def test_columns_can_be_named(save: Saver) -> None:
    path = save("who,load,in,out,first,next\nm,4,1000,100,3,2\n")
    columns = {
        "concurrency": "load",
        "prompt": "in",
        "output": "out",
        "ttft": "first:s",
        "tpot": "next:ms",
        "model": "who",
    }
    (table,) = read_benchmarks(path, columns, static=True).tables
    assert (table.ttft[0], table.tpot[0], table.label) == (3, 0.002, "m")
    assert table.load.static


def test_repeats_are_one_point(save: Saver) -> None:
    (table,) = read_benchmarks(save(PLAIN + "8,1000,100,90,14,A\n8,1000,100,71,11,A\n")).tables
    assert table.repeats.tolist() == [1, 3, 1]
    assert table.ttft[1] == pytest.approx(0.071)
    assert table.tpot[1] == pytest.approx(0.012)


def test_data_parallel_ranks_share_the_concurrency(save: Saver) -> None:
    text = "concurrency,isl,osl,ttft_ms,tpot_ms,dp\n64,1000,100,50,10,4\n64,1000,100,50,10,\n"
    tables = read_benchmarks(save(text)).tables
    assert {t.setting["dp"]: t.load.concurrency[0] for t in tables} == {"": 64, "4": 16}


SILICON = (
    "silicon_data_source,backend,model_path,system,mode,isl,osl,batch_size,tp_size,attention_dp_size,silicon_ttft_ms,"
    "silicon_tpot_ms\n"
    "x; silicon_concurrency=128; y,vllm,org/M,h100,agg,1024,512,32,4,4,100,10\n"
    "x; silicon_concurrency=128; y,vllm,org/M,h100,disagg,1024,512,32,4,4,100,10\n"
    "x,vllm,org/M,h100,agg,1024,256,16,4,4,90,9\n"
)


def test_the_silicon_layout(save: Saver) -> None:
    """The concurrency is in the note on the source; without it, the batch of a rank times the ranks."""
    file = read_benchmarks(save(SILICON))
    (table,) = file.tables
    assert file.left_out == {"of disaggregated serving": 1}
    assert sorted(zip(table.load.output, table.load.concurrency, strict=True)) == [(256, 16), (512, 32)]
    assert table.label == "M h100 vllm tp 4 dp 4"


SPLITWISE = "model,hardware,tensor_parallel,prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time\n"


def test_the_splitwise_layout(save: Saver) -> None:
    """An output that ended early counts with its length, a batch that did not run at once not at all."""
    rows = ("m,a,2,512,1,101,100,50,5100", "m,a,2,512,1,1001,100,50,10100", "m,a,2,512,64,101,100,50,15000")
    file = read_benchmarks(save(SPLITWISE + "\n".join(rows) + "\n"))
    (table,) = file.tables
    assert table.load.static
    assert table.load.output.tolist() == pytest.approx([101, 201])
    assert file.left_out == {"points whose batch did not run at once": 1}


def test_one_server_is_chosen(save: Saver) -> None:
    text = "concurrency,isl,osl,ttft_ms,tpot_ms,model,tp\n" + "".join(
        f"4,1000,100,50,10,{model},{tp}\n" for model in ("org/Big", "org/Small") for tp in (1, 2)
    )
    file = read_benchmarks(save(text))
    assert file.choose({"model": "big", "tp": "2"}).label == "Big tp 2"
    with pytest.raises(ScenarioError, match=r"mixes 2 servers; select one by model = org/Big, org/Small$"):
        file.choose({"tp": "1"})
    with pytest.raises(ScenarioError, match=r"mixes 4 servers; select one by model = .*; tp = 1, 2"):
        file.choose()
    with pytest.raises(ScenarioError, match="no points with model = huge; it has Big; Big tp 2; Small"):
        file.choose({"model": "huge"})
    with pytest.raises(ScenarioError, match=r"not told by 'modell'; did you mean 'model'\?"):
        file.choose({"modell": "big"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("osl", "tokens"), "has no column for output; name one of concurrency, isl, tokens"),
        (("ttft_ms", "ttft"), "column 'ttft' has no unit; name it ttft_ms, or give it as ttft=ttft:ms"),
        (("8,1000", "0,1000"), "line 3: concurrency is 0; give a positive number"),
        (("70,12", "-70,12"), "line 3: ttft_ms is -70; give a positive number"),
        (("70,12", ",12"), "line 3: ttft_ms is nan; give a positive number"),
        (("70,12", "soon,12"), "line 3: ttft_ms is soon; give a positive number"),
        (("70,12", "70,inf"), "line 3: tpot_ms is inf; give a positive number"),
        (("8,1000,100", "8,1000,1"), "line 3: osl is 1; give 2 tokens or more, as one token has no TPOT"),
        (("concurrency,isl", '"concurrency,isl'), "is not readable CSV"),
    ],
)
def test_bad_tables_are_named(save: Saver, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        read_benchmarks(save(PLAIN.replace(*change)))
    assert message in str(error.value)
    assert str(error.value).startswith(str(save(PLAIN).parent))
    assert "\n" not in str(error.value)


def test_other_bad_input(save: Saver, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_benchmarks(tmp_path / "none.csv")
    with pytest.raises(ScenarioError, match="is not readable CSV"):
        read_benchmarks(save(""))
    with pytest.raises(ScenarioError, match=r"has no benchmark point of aggregated serving \(no rows\)"):
        read_benchmarks(save(PLAIN.split("\n")[0] + "\n"))
    with pytest.raises(ScenarioError, match=r"has no column 'lat' for ttft"):
        read_benchmarks(save(PLAIN), {"ttft": "lat:ms"})
    with pytest.raises(ScenarioError, match=r"'tfft' is no column to name; did you mean 'ttft'\?"):
        read_benchmarks(save(PLAIN), {"tfft": "ttft_ms"})
    binary = tmp_path / "x.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ScenarioError, match="is not readable CSV"):
        read_benchmarks(binary)


@NEEDS_DATA
def test_the_measured_points() -> None:
    """The figures of the table's description: 1298 rows, 233 of them disaggregated."""
    file = read_benchmarks(SHARED / "aiconfigurator/silicon_sample.csv")
    assert sum(file.left_out.values()) == 233
    assert sum(int(t.repeats.sum()) for t in file.tables) == 1298 - 233
    assert max(t.load.concurrency.max() for t in file.tables) == 1024
    llama = file.choose({"model": "Llama-3.1-70B", "tp": "4"})
    assert len(llama.load) == 15
    assert np.median(llama.tpot) == pytest.approx(0.0158, rel=0.05)
