"""The entry file: it registers commands and turns errors into sentences and exit codes."""

from __future__ import annotations

import gc
import io
import os
import sys

import typer

from glmplan import __version__
from glmplan.cli import bench, doctor, launch, logs, probe, restart, size, status, stop, tune, verify
from glmplan.cli._errors import exit_code_of, report

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for plugins takes 20 ms of every start

app = typer.Typer(
    name="glmplan",
    help="Size, plan and launch GLM-5.2 on the GPUs you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("size", epilog=size.EXAMPLES)(size.size)
app.command("launch", epilog=launch.EXAMPLES)(launch.launch)
app.command("probe", epilog=probe.EXAMPLES)(probe.probe)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("status", epilog=status.EXAMPLES)(status.status)
app.command("logs", epilog=logs.EXAMPLES)(logs.logs)
app.command("stop", epilog=stop.EXAMPLES)(stop.stop)
app.command("restart", epilog=restart.RESTART_EXAMPLES)(restart.restart)
app.command("watch", epilog=restart.WATCH_EXAMPLES)(restart.watch)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"glmplan {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Size, plan and launch GLM-5.2 on the GPUs you have."""


def main() -> None:
    """Run the program; every error becomes one sentence and an exit code."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: the lowest free descriptor is this one
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    gc.disable()  # a short-lived process: collecting while importing costs a tenth of the start
    try:
        app()
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        report(error)
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
