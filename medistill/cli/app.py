"""The application: options before the verb, one clear line for everything that can go wrong, exit codes."""

from __future__ import annotations

import errno
import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from medistill.errors import MedistillError
from medistill.progress import Progress, TerminalProgress

if TYPE_CHECKING:
    from medistill.core.cohort import Cohort

Parameters = ParamSpec("Parameters")

app = typer.Typer(
    name="medistill",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn medical images that may not be shared into a small synthetic *release* that trains a diagnostic "
    "model, with a privacy statement that can be checked.\n\n"
    "Start with `medistill demo`, then `medistill run CONFIG`.",
)
COMMANDS = "commands.txt"
#: Options whose words are settings of the method.
_PUBLIC_WORDS = frozenset(
    {
        *("kind", "classes", "no_class", "label_column", "volumes", "fit", "intensity", "colour", "modality"),
        *("burned_in", "ocr", "heads", "missing_patient", "method", "settings", "device", "engine", "delta"),
        *("profile", "network", "licence", "published"),
    }
)
_options = {"quiet": False, "debug": False}


def guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """One clear line and the right exit code for everything that can go wrong."""

    @functools.wraps(command)
    def outer(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, SystemExit):
            raise
        except BaseException as error:
            if _options["debug"] and not isinstance(error, KeyboardInterrupt):
                raise
            message, code = _explain(error)
            typer.echo(message, err=True)
            raise typer.Exit(code) from None

    return outer


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, MedistillError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: nothing was half-written; finished stages and checkpoints are kept.", 130
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "error: the disk is full. Nothing was half-written; free some space and run the command again.", 2
    if isinstance(error, PermissionError):
        return "error: a file or folder may not be read or written with your permissions.", 2
    where = _innermost(error)
    return f"error: unexpected {type(error).__name__} in {where}. Run with --debug for the traceback.", 1


def _innermost(error: BaseException) -> str:
    """Module and line of ours nearest to where it happened; the message itself could quote a patient."""
    found, trace = "medistill", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("medistill"):
            found = f"{name} line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def progress() -> Progress:
    """What shows a person how far it is."""
    return TerminalProgress(quiet=_options["quiet"])


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks; they can quote patient data.")] = False,
) -> None:
    """Options before the verb."""
    _options.update(quiet=quiet, debug=debug)


def remember_command(context: typer.Context, folder: Path) -> None:
    """Note the running command in a folder, for the report of the release that is made from it.

    Numbers, switches and words of :data:`_PUBLIC_WORDS` stand as they were given; everything else, which may name
    a patient, by the name of its option.
    """
    words = ["medistill", context.info_name or ""]
    for option in context.command.params:
        value = context.params[option.name or ""]
        if option.param_type_name == "argument":
            words.append((option.name or "").upper())
        elif value != option.get_default(context) and value not in (None, False, (), []):
            several = list(value) if isinstance(value, list | tuple) else [value]
            for one in several:
                words += [max(option.opts, key=len), *_shown(option.name or "", one)]
    before = [kept for kept in noted_commands(folder) if kept.split()[:2] != words[:2]]
    partial = folder / f".{COMMANDS}.partial"
    partial.write_text("\n".join([*before, " ".join(words)]) + "\n", encoding="utf-8")
    partial.replace(folder / COMMANDS)


def _shown(name: str, value: object) -> list[str]:
    if value is True:
        return []
    if isinstance(value, int | float) or name in _PUBLIC_WORDS:
        return [shlex.quote(str(value))]
    return [name.upper()]


def noted_commands(folder: Path | None) -> tuple[str, ...]:
    """Commands noted in a folder, the oldest first; none where there are none."""
    if folder is None or not (folder / COMMANDS).is_file():
        return ()
    return tuple((folder / COMMANDS).read_text(encoding="utf-8").splitlines())


def open_cohort(path: Path) -> Cohort:
    """A cohort written by `medistill ingest`."""
    from medistill.ingest import load_cohort

    return load_cohort(path)
