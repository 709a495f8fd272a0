"""Numbers, JSON, files and progress as a reader meets them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import ScenarioError
from llmopt.output import plain, to_json, whole, write
from llmopt.progress import Display
from llmopt.tables import duration, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.14159, "3.14"),
        (18.0, "18.0"),
        (314.159, "314"),
        (19366.4, "19,366"),
        (0.00123456, "0.00123"),
        (1.234e-7, "1.23e-07"),
        (-2.5, "-2.50"),
        (math.nan, "–"),
        (math.inf, "∞"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str):
    assert number(value) == text


@given(st.floats(1e-4, 1e6))
def test_a_printed_number_is_within_half_a_unit_of_its_last_digit(value: float):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


def test_durations_end_at_a_hundredth_of_a_second():
    assert [duration(x) for x in (0.0004, 0.25, math.nan)] == ["<0.01", "0.25", "–"]


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Thing:
    flag: np.bool_
    values: np.ndarray
    table: MappingProxyType


def test_everything_becomes_plain_json():
    thing = Thing(np.bool_(True), np.array([[1.5, np.nan], [np.inf, 2.0]]), MappingProxyType({1: Colour.RED}))
    assert plain(thing) == {"flag": True, "values": [[1.5, None], [None, 2.0]], "table": {"1": "red"}}
    assert json.loads(to_json({"n": np.int64(3), "t": (Path("a"), None)})) == {"n": 3, "t": ["a", None]}
    assert plain(frozenset("tropical")) == sorted("tropical")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    write(target, "old")

    def fail() -> None:
        with whole(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_a_folder_in_the_way_is_one_sentence(tmp_path: Path):
    with pytest.raises(ScenarioError, match="cannot be written"):
        write(tmp_path, b"content")


def test_without_a_terminal_each_topic_is_one_line(capsys: pytest.CaptureFixture[str]):
    with Display() as display:
        for done, what in enumerate(["a: plan", "compile", "a: simulate", "b: plan"]):
            display(done, 4, what)
        display(4, 4, "done")
    with Display(quiet=True) as display:
        display(0, 1, "c")
    assert capsys.readouterr().err.splitlines() == ["[0/4] a", "[1/4] compile", "[3/4] b"]
