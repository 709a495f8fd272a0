"""The command `llmopt calibrate`: a step time from measured profiles or from a benchmark log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli_tools import deliver, json_option, say_written, show
from llmopt.errors import ScenarioError

if TYPE_CHECKING:
    from llmopt.calibrate.from_profile import Load
    from llmopt.calibrate.result import Calibration

OUTPUTS = ("paths", "output", "json_file", "report")
"""Parameters that do not change the answer."""
CAPS = ("max_batch", "token_budget", "kv_capacity")
FOR_LOGS = ("select", "columns")
FOR_PROFILES = ("precision", "decode_pieces", "mixed_pieces", "host_overhead")


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PROFILE...")
@click.option("-o", "--output", metavar="F", help='Write a catalog entry that a scenario names: catalog = "F".')
@click.option("--accelerator", default="", metavar="A", help="Whose profile, where the files hold several.")
@click.option("--model", default="", metavar="M", help="Likewise.")
@click.option("--tp", type=int, metavar="N", help="Tensor-parallel degree, likewise.")
@click.option("--precision", default="", metavar="P", help="Of the weights; the one that the model is published in.")
@click.option(
    "--max-batch", type=int, metavar="N", help="Sequences of a step; 256, for a log no less than its concurrency."
)
@click.option("--token-budget", type=int, metavar="N", help="Tokens of a step; 2048, for a benchmark log 8192.")
@click.option("--kv-capacity", type=int, metavar="N", help="KV tokens of a replica; computed if absent.")
@click.option("--decode-pieces", type=int, default=1, show_default=True, metavar="N", help="Without prefill terms.")
@click.option("--mixed-pieces", type=int, default=2, show_default=True, metavar="N", help="With all terms.")
@click.option("--host-overhead", type=float, default=0.0, metavar="S", help="Seconds of a step besides its kernels.")
@click.option("--scenario", metavar="S", help="Follow the profile best where the load of this scenario takes it.")
@click.option("--select", multiple=True, metavar="KEY=VALUE", help="Which server of a benchmark log: backend=vllm, ...")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Column of a log, as ttft=latency:ms.")
@click.option("--allow-unphysical", is_flag=True, help="Only warn of times that peak FLOPs or bandwidth do not allow.")
@json_option
@click.option("--report", metavar="DIR", help="Write a picture and the table of errors into this folder.")
@click.pass_context
def calibrate(context: click.Context, /, paths: tuple[str, ...], **options: Any) -> None:
    """Fit the max-affine step time that the programs need, and say how far to trust it.

    PROFILE is a folder or files of measured operator tables (LLMServingSim, Vidur, aiconfigurator), or one CSV file of
    benchmark points with TTFT and TPOT against concurrency and lengths.
    """
    output = options["output"]
    if output is not None and not output.endswith(".toml"):
        raise ScenarioError(f"-o {output}: a catalog entry is a TOML file; name one that ends in .toml")
    if options["report"] is not None and Path(options["report"]).is_file():
        raise ScenarioError(f"--report {options['report']}: is a file; name a folder")
    found = _calibrated(context, paths, options)
    if output is not None:
        say_written([_write_entry(found, output, command_line(context))])
    if options["report"] is not None:
        say_written(_write_report(found, Path(options["report"])))
    if deliver(options["json_file"], found.as_dict):
        from llmopt.calibrate.view import calibration_view

        show(calibration_view(found))


def _calibrated(context: click.Context, paths: Sequence[str], options: Mapping[str, Any]) -> Calibration:
    shared = {key: options[key] for key in CAPS if options[key] is not None}
    shared["allow_unphysical"] = options["allow_unphysical"]
    names = {"accelerator": options["accelerator"], "model": options["model"], "tensor_parallel": options["tp"]}
    if any(_is_log(Path(path)) for path in paths) or options["columns"]:
        _refuse(context, (*FOR_PROFILES, "scenario"), "a benchmark log")
        if len(paths) > 1:
            raise ScenarioError(f"{', '.join(paths)}: a benchmark log is fitted alone; give one file")
        from llmopt.calibrate.from_benchmarks import calibrate_benchmarks

        return calibrate_benchmarks(
            paths[0],
            select=_pairs("--select", options["select"]),
            columns=_pairs("--column", options["columns"]),
            **names,
            **shared,
        )
    _refuse(context, FOR_LOGS, "a profile")
    from llmopt.calibrate.from_profile import calibrate_profile

    chosen = {key: options[key] for key in FOR_PROFILES}
    load = _load(options["scenario"]) if options["scenario"] else None
    return calibrate_profile(paths, load=load, **names, **chosen, **shared)


def _load(scenario: str) -> Load:
    from functools import partial

    from llmopt.reading import load_scenario
    from llmopt.validation.load import load_steps

    return partial(load_steps, load_scenario(scenario))


def _is_log(path: Path) -> bool:
    """Whether a file is no profile by its name and has a column of TTFT, TPOT or ITL."""
    from llmopt.calibrate.bench_table import QUANTITIES
    from llmopt.profiles.finding import recognise

    if not path.is_file() or recognise(path) is not None:
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().lower()
    return any(name in header for name in (*QUANTITIES["ttft"], *QUANTITIES["tpot"]))


def _refuse(context: click.Context, names: Sequence[str], what: str) -> None:
    """Refuse options that mean nothing for this kind of file."""
    for name, flag in _typed(context):
        if name in names:
            raise ScenarioError(f"{flag} means nothing for {what}; drop it")


def _typed(context: click.Context) -> Iterator[tuple[str, str]]:
    """Name and flag of each parameter on the command line."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            yield name, parameter.opts[-1]


def command_line(context: click.Context) -> str:
    """What was typed, without what does not change the answer."""
    import shlex

    words = ["llmopt", "calibrate", *context.params["paths"]]
    for name, flag in _typed(context):
        value = context.params[name]
        if name not in OUTPUTS:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)


def _pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise ScenarioError(f"{flag} {item} has no '='; write it like {flag} key=value")
    return {key.strip(): value.strip() for key, value in (item.split("=", 1) for item in items)}


def _write_entry(found: Calibration, output: str, command: str) -> Path:
    from datetime import date

    from llmopt.calibrate.entry import entry_text
    from llmopt.output import write

    return write(output, entry_text(found, date=date.today().isoformat(), command=command))


def _write_report(found: Calibration, folder: Path) -> list[Path]:
    from llmopt.calibrate.picture import calibration_pictures
    from llmopt.output import write

    written = [write(folder / "errors.csv", found.errors.to_csv(index=False))]
    return written + [write(folder / name, content) for name, content in calibration_pictures(found).items()]
