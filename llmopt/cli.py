"""The command line. Heavy imports happen inside the commands, so that `llmopt --help` answers at once.

Exit codes: 0 fine; 1 the answer is no (infeasible, or not stable under --check); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmopt import __version__
from llmopt.cli_calibrate import calibrate
from llmopt.cli_tools import deliver, json_option, say_written, show
from llmopt.cli_validate import validate
from llmopt.errors import LLMOptError, ScenarioError

if TYPE_CHECKING:
    from llmopt.evaluate.comparison import Comparison
    from llmopt.evaluate.ratio_comparison import RatioComparison
    from llmopt.scenario import Scenario

    Compared = Comparison | RatioComparison

Command = TypeVar("Command", bound=Callable[..., Any])
NO = 1
INTERRUPTED = 130


class Guarded(click.Group):
    """Prints errors made for users as one line, and everything else as Python does."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn an `LLMOptError` or an interrupt into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except LLMOptError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Guarded, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="llmopt")
def main() -> None:
    """Design LLM-serving policies by optimization, and judge them by theory and simulation.

    SCENARIO is a TOML file or the name of a bundled scenario; `llmopt list` shows them.
    """


def scenario_options(command: Command) -> Command:
    """Options that change the scenario before it is used."""
    for option in (
        click.option(
            "--load", type=float, metavar="F", help="Set the rate to F times the critical rate of max-margin."
        ),
        click.option("--rate", type=float, metavar="X", help="Set the total arrival rate to X requests/s."),
        click.option("--trace", metavar="FILE", help="Replay this trace instead of the arrivals of the scenario."),
        click.option("--predictions", metavar="LAW", help="What rules know of outputs: oracle, noise:0.5, none, ..."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("scenarios", nargs=-1, required=True, metavar="SCENARIO...")
@click.option("--policies", metavar="A,B", help="Names, or module:attribute of your own; all bundled ones if absent.")
@click.option("--seeds", metavar="N", help="How many seeds, or a list such as 4,5,6; those of the scenario if absent.")
@scenario_options
@json_option
@click.option("--report", metavar="DIR", help="Write tables, pictures and an HTML page into this folder.")
@click.option("--check", is_flag=True, help="Exit with 1 unless at least one policy is stable in the simulator.")
def compare(
    scenarios: tuple[str, ...],
    policies: str | None,
    seeds: str | None,
    trace: str | None,
    rate: float | None,
    load: float | None,
    predictions: str | None,
    json_file: str | None,
    report: str | None,
    check: bool,
) -> None:
    """Compare policies on the same arrivals: the main job."""
    from llmopt.api import compare as play
    from llmopt.progress import Display

    names = [name.strip() for name in policies.split(",") if name.strip()] if policies is not None else None
    comparisons = []
    for scenario in _told_apart([prepared(source, trace, rate, load, predictions) for source in scenarios]):
        with Display(quiet=json_file == "-") as display:
            comparisons.append(play(scenario, names, parsed_seeds(seeds), display))
        if json_file != "-":
            from llmopt.text import comparison_view

            show(comparison_view(comparisons[-1]))
    if all(_code(comparison) != LLMOptError.exit_code for comparison in comparisons):
        _write_comparisons(comparisons, json_file, report)
    _exit_of_comparisons(comparisons, check)


@main.command()
@click.argument("scenario", metavar="SCENARIO")
@click.option("--policy", metavar="NAME", help="Whose plan to make; max-margin, mc-sf or afd-fleet if absent.")
@scenario_options
@json_option
def plan(
    scenario: str,
    policy: str | None,
    trace: str | None,
    rate: float | None,
    load: float | None,
    predictions: str | None,
    json_file: str | None,
) -> None:
    """Make one plan and print it with its proof and its prices."""
    from llmopt.api import plan as make
    from llmopt.describe import plan_data

    given = prepared(scenario, trace, rate, load, predictions)
    answer = make(given, policy)
    if deliver(json_file, lambda: plan_data(answer, given)):
        from llmopt.text import plan_view

        show(plan_view(answer, given))


@main.command()
@click.argument("scenario", metavar="SCENARIO")
@click.option(
    "--policy",
    metavar="NAME",
    help="Whose split to assess, or bundle; max-margin, or afd-fleet where the ratio is open.",
)
@scenario_options
@json_option
@click.option("--check", is_flag=True, help="Exit with 1 unless the verdict is stable.")
def stability(
    scenario: str,
    policy: str | None,
    trace: str | None,
    rate: float | None,
    load: float | None,
    predictions: str | None,
    json_file: str | None,
    check: bool,
) -> None:
    """Loads, critical rate and what binds, by theory alone."""
    from llmopt.api import stability as assess
    from llmopt.describe import stability_data

    given = prepared(scenario, trace, rate, load, predictions)
    report = assess(given, policy)
    if deliver(json_file, lambda: stability_data(report, given)):
        from llmopt.text import stability_view

        show(stability_view(report, given))
    if check and report.verdict != "stable":
        raise click.exceptions.Exit(NO)


@main.command()
@click.argument("file", metavar="FILE")
@click.option("--format", "layout", metavar="F", help="Layout of the file; found by its content if absent.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Column of arrival, prompt or output.")
@click.option("--to", "target", metavar="OUT", help="Write the trace as a plain CSV, JSONL or Parquet table.")
@json_option
@click.option("--report", metavar="DIR", help="Write a picture of the trace into this folder.")
def trace(
    file: str,
    layout: str | None,
    columns: tuple[str, ...],
    target: str | None,
    json_file: str | None,
    report: str | None,
) -> None:
    """Statistics of a real trace, its bad rows, a picture, a clean copy."""
    from llmopt.describe import trace_data
    from llmopt.output import write
    from llmopt.traces import read_trace, write_trace

    known = read_trace(file, layout, _mapping(columns) or None)
    if target:
        write_trace(known, target)
    written = [Path(target)] if target else []
    if report:
        from llmopt.drawing import KINDS, draw
        from llmopt.plot import trace_figure

        written += [write(Path(report) / f"trace.{kind}", draw(trace_figure, known, kind=kind)) for kind in KINDS]
    if deliver(json_file, lambda: trace_data(known)):
        from llmopt.text import trace_view

        show(trace_view(known))
    say_written(written)


@main.command(name="list")
@json_option
def list_command(json_file: str | None) -> None:
    """Policies, scenarios, hardware, models and accelerators, with one line each."""
    from llmopt.describe import catalogue

    data = catalogue()
    if deliver(json_file, lambda: data):
        from llmopt.text import catalogue_view

        show(catalogue_view(data))


main.add_command(calibrate)
main.add_command(validate)


def prepared(
    source: str, trace: str | None, rate: float | None, load: float | None, predictions: str | None = None
) -> Scenario:
    """The scenario with the options of the command line applied."""
    from llmopt.api import at_load, at_rate, with_predictions
    from llmopt.reading import load_scenario

    scenario = load_scenario(source, trace)
    if predictions is not None:
        scenario = with_predictions(scenario, predictions)
    if rate is not None and load is not None:
        raise ScenarioError("--rate and --load both set the arrival rate; drop one of the two")
    for name, value in (("--rate", rate), ("--load", load)):
        if value is not None and not 0 < value < float("inf"):
            raise ScenarioError(f"{name} {value:g} is not a positive number; give one")
    if rate is not None:
        return at_rate(scenario, rate)
    return scenario if load is None else at_load(scenario, load)


def parsed_seeds(text: str | None) -> int | list[int] | None:
    """``3`` is three seeds, ``4,5,6`` are these."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ScenarioError(f"--seeds {text} is neither a number nor a list such as 4,5,6; give one of them") from None
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ScenarioError(f"--seeds {text} has a negative or repeated seed; give different whole numbers from 0")
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers


def _told_apart(scenarios: list[Scenario]) -> list[Scenario]:
    """The scenarios, refused if two of them would share rows and folders of a report under one name."""
    names = [scenario.name for scenario in scenarios]
    if len(set(names)) < len(names):
        raise ScenarioError(f"two scenarios share a name ({', '.join(names)}); give each its own name in its file")
    return scenarios


def _write_comparisons(comparisons: Sequence[Compared], json_file: str | None, report: str | None) -> None:
    if report:
        from llmopt.page import write_report

        for comparison in comparisons:
            folder = Path(report) if len(comparisons) == 1 else Path(report) / comparison.scenario.name
            say_written(write_report(comparison, folder))
    data = [comparison.as_dict() | {"timings": comparison.timings()} for comparison in comparisons]
    deliver(json_file, lambda: data[0] if len(data) == 1 else data)


def _exit_of_comparisons(comparisons: Sequence[Compared], check: bool) -> None:
    """1 if a check fails or nothing was feasible, 2 if no policy of a scenario worked for another reason."""
    for comparison in comparisons:
        if _code(comparison):
            raise click.exceptions.Exit(_code(comparison))
        if check and not comparison.served:
            raise click.exceptions.Exit(NO)


def _code(comparison: Compared) -> int:
    """The exit code of a comparison in which no policy worked; 0 if one did."""
    statuses = [outcome.status for outcome in comparison.outcomes]
    if any(status == "ok" for status in statuses):
        return 0
    return NO if all(status.startswith("infeasible") for status in statuses) else LLMOptError.exit_code


def _mapping(columns: Sequence[str]) -> dict[str, str]:
    for item in columns:
        if "=" not in item:
            raise ScenarioError(f"--column {item} has no '='; write it like arrival=TIMESTAMP")
    return {name.strip(): column.strip() for name, column in (item.split("=", 1) for item in columns)}
