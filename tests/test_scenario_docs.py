"""docs/scenario.md: every example loads, every key and law is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from llmopt.arrivals import Arrivals
from llmopt.bundle import Bundle, Fleet, Pipeline
from llmopt.hardware import Piece
from llmopt.lengths import Law
from llmopt.model import InputModel
from llmopt.predictions import Predictor
from llmopt.reading import load_scenario
from llmopt.scenario import Evaluation, Pool, Preemption, Scenario
from llmopt.stagetable import StageTable
from llmopt.trace_formats import GENERIC, format_names
from llmopt.workload import RequestClass, TraceSource, Workload

TEXT = (Path(__file__).parents[1] / "docs" / "scenario.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_load(number: int, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("when,tokens_in,tokens_out\n0,100,5\n2,3000,5\n4,200,9\n")
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLES[number])
    scenario = load_scenario(path)
    assert len(scenario.workload.sample(scenario.evaluation.horizon, 1)) > 2


MODELS = [Scenario, Workload, RequestClass, TraceSource, Pool, Piece, Evaluation, Bundle, StageTable, Fleet]


@pytest.mark.parametrize("model", MODELS)
def test_every_key_is_documented(model: type[InputModel]) -> None:
    for name, field in model.model_fields.items():
        if not field.exclude:
            assert f"`{field.alias or name}`" in TEXT or f"{field.alias or name}]" in TEXT, name


def test_every_law_format_and_mode_is_documented() -> None:
    unions = (Law, Arrivals, Predictor)
    laws = [m.model_fields["law"].annotation for union in unions for m in get_args(get_args(union)[0])]
    words = [tag for law in laws for tag in get_args(law)] + [*get_args(Preemption), *get_args(Pipeline)]
    assert all(f'`"{word}"`' in TEXT for word in words)
    assert all(f"`{name}`" in TEXT for name in (*format_names(), *GENERIC))
