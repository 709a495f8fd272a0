"""The command `llmopt validate`: predict a recorded run and compare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from llmopt.cli_tools import deliver, json_option, say_written, show
from llmopt.errors import ScenarioError

if TYPE_CHECKING:
    from llmopt.validation.judge import Overhead

NO = 1


@click.command()
@click.argument("run", metavar="RUN_FOLDER")
@click.option("--profiles", required=True, metavar="FOLDER", help="Folder with profiles of the run's GPU and model.")
@click.option(
    "--step-time",
    type=click.Choice(["table", "max-affine"]),
    default="table",
    show_default=True,
    help="Interpolate in the profiles, or play the fit that the programs use.",
)
@click.option(
    "--host-overhead",
    default="common",
    show_default=True,
    metavar="common|fit|S",
    help="Seconds of a step besides its kernels: one constant for all machines, estimated from the first requests of "
    "the run (then the others are judged), or given.",
)
@click.option("--first", default=50, show_default=True, metavar="N", help="How many requests fit estimates from.")
@click.option("--gpu", metavar="NAME", help="The GPU, where the run does not name it or profiles name it otherwise.")
@click.option("--model", metavar="NAME", help="The model, likewise.")
@json_option
@click.option("--report", metavar="DIR", help="Write pictures and an HTML page into this folder.")
@click.option(
    "--check", type=float, metavar="PCT", help="Exit with 1 if the error of a mean, p50, p90 or p99 exceeds PCT %."
)
def validate(
    run: str,
    profiles: str,
    step_time: str,
    host_overhead: str,
    first: int,
    gpu: str | None,
    model: str | None,
    json_file: str | None,
    report: str | None,
    check: float | None,
) -> None:
    """Replay a recorded vLLM run through the simulator and compare what was measured.

    RUN_FOLDER holds requests.jsonl and meta.json, and may hold timeseries.csv and config.json.
    """
    from llmopt.validation import validate as play

    limit = _limit(check)
    answer = play(
        run,
        profiles,
        step_time="max-affine" if step_time == "max-affine" else "table",
        host_overhead=_overhead(host_overhead),
        first=_positive(first),
        gpu=gpu,
        model=model,
    )
    if report:
        from llmopt.validation.page import write_report

        say_written(write_report(answer, report))
    if deliver(json_file, answer.as_dict):
        from llmopt.validation.view import validation_view

        show(validation_view(answer))
    if answer.largest_error > limit:
        raise click.exceptions.Exit(NO)


def _limit(check: float | None) -> float:
    if check is None:
        return math.inf
    if not 0 < check < math.inf:
        raise ScenarioError(f"--check {check:g} is not a positive number of percent; give one")
    return check / 100


def _positive(first: int) -> int:
    if first < 1:
        raise ScenarioError(f"--first {first} leaves no request to estimate from; give at least 1")
    return first


def _overhead(text: str) -> Overhead:
    if text == "common":
        return "common"
    if text == "fit":
        return "fit"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 1:
        hint = "; it is in seconds, not milliseconds" if seconds > 1 else ""
        raise ScenarioError(f"--host-overhead {text} is neither common, fit nor 0 to 1 seconds; give one{hint}")
    return seconds
