"""Differential privacy: what a release would spend, and what was spent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medistill.cli.app import app, guarded
from medistill.errors import ConfigError, PrivacyError, SourceError

if TYPE_CHECKING:
    from medistill.distill import Prospect

_USEFUL = 0.8
group = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Show what a private release would spend, and what was spent.\n\n"
    "Example: `medistill privacy plan configs/phantom_private.yaml`",
)
app.add_typer(group, name="privacy")


@group.command()
@guarded
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file with a section privacy; see configs/.")],
    patients: Annotated[
        int, typer.Option(min=1, help="Patients assumed to be distilled from; no data is looked at.")
    ] = 1000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")
    ] = None,
) -> None:
    """Show what a run would ask and spend, how much noise to expect, and what it takes as public.

    Nothing is read but the configuration.

    Example: `medistill privacy plan configs/phantom_private.yaml --patients 1000`
    """
    from medistill.config import load_config
    from medistill.workflow import foresee_run

    parsed = load_config(config, overrides or [])
    prospect = foresee_run(parsed, patients=patients)
    for line in described(prospect, [patients]):
        typer.echo(line)
    if parsed.ingest.classes is None:
        typer.echo("The configuration names no classes; two were assumed.")


@group.command()
@guarded
def ledger(
    cohort: Annotated[Path, typer.Argument(help="Cohort folder made by ingest, or a ledger.jsonl.")],
) -> None:
    """Show every private release of a cohort, their epsilon together, and what is left.

    Releases compose: together they cost less than the sum of their epsilons. Each counts in full, whether or not
    it was finished.

    Example: `medistill privacy ledger cohort`
    """
    from medistill.privacy.ledger import NAME, Ledger

    path = cohort / NAME if cohort.is_dir() else cohort
    if not cohort.exists():
        raise SourceError("Expected a cohort folder or a ledger; found nothing there.")
    found = Ledger(path)
    limit = f"of {found.lifetime.epsilon:g} at delta {found.lifetime.delta:g}"
    reservations = found.reservations()
    if not reservations:
        typer.echo(f"Nothing was spent {limit}.")
        return
    typer.echo(f"{'date':<12}{'recipe':<14}{'epsilon':>8}{'delta':>9}  queries answered")
    for one in reservations:
        about = f"{one.date or '-':<12}{one.recipe[:12] or '-':<14}{one.epsilon:>8.3g}{one.budget.delta:>9.1g}"
        answered = "several runs" if one.plan.selects else f"{len(one.sealed)} of {one.plan.total}"
        typer.echo(f"{about}  {answered}")
    spent = found.spent()
    assert spent is not None
    typer.echo(f"Together: epsilon {spent.epsilon:.3g} {limit}, by {spent.accountants[0]}.")
    left = found.left()
    if left is None:
        typer.echo("Left: too little for another release.")
    else:
        typer.echo(f"Left: another release of up to epsilon {left:.3g} at delta {found.lifetime.delta:g}.")


def check_options(
    epsilon: float | None,
    *,
    delta: str,
    lifetime: float | None,
    ledger: Path | None,
    patience: int,
    expected_runs: float,
    candidates: int,
) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: If options of differential privacy are given without ``--epsilon``.
        PrivacyError: If something is to be chosen on validation patients.
    """
    if epsilon is None and (delta != "auto" or lifetime is not None or ledger is not None):
        raise ConfigError("--delta, --lifetime and --ledger say nothing without --epsilon.")
    if epsilon is None and (expected_runs != 1 or candidates):
        raise ConfigError("--expected-runs and --candidate say nothing without --epsilon.")
    if epsilon is not None and patience:
        raise PrivacyError(
            "--patience stops early by looking at validation patients, whom no budget covers. Leave it out."
        )


def parse_delta(text: str) -> float | None:
    """A number, or ``None`` for ``auto``.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise ConfigError(f"Expected --delta auto or a number, got {text!r}.") from None


def around(patients: int) -> tuple[int, int]:
    """The powers of ten between which a number of patients lies: all that is shown of it."""
    from medistill.distill.private import most_patients

    most = most_patients(patients)
    return most // 10, most


def described(prospect: Prospect, patients: Iterable[int]) -> list[str]:
    """What a private distillation will ask and spend, and what to expect with such numbers of patients."""
    budget, noise = prospect.budget, prospect.calibrated.noise_multipliers
    lines = [
        f"{prospect.recipe.method}: {prospect.why}",
        f"Epsilon {budget.epsilon:g} at delta {budget.delta:g} for each {budget.unit.value}.",
        "",
        f"{'query':<40}{'times':>6}{'rate':>8}{'noise multiplier':>18}{'epsilon alone':>15}",
    ]
    for query, sigma, alone in zip(prospect.plan.queries, noise, prospect.epsilons(), strict=True):
        numbers = f"{query.count:>6}{query.sampling_rate:>8.3g}{sigma:>18.4g}{alone:>15.3g}"
        lines.append(f"{query.purpose[:38]:<40}{numbers}")
    bound = prospect.calibrated.bound
    if prospect.plan.selects:
        several = len(prospect.candidates)
        settings = f"settings from a list of {several}" if several > 1 else "the same settings"
        lines.append(
            f"This in every one of a random number of runs, {prospect.plan.expected_runs:g} on average, each with "
            f"{settings}; the best on validation patients is kept."
        )
    lines += [f"{'together, by ' + bound.accountants[0]:<40}{bound.epsilon:>47.3g}", ""]
    lines += [_noise(prospect, number) for number in patients]
    lines += [f"Expected utility: {prospect.utility}", "", "Taken as public:"]
    return [*lines, *(f"  - {assumption}" for assumption in prospect.assumptions)]


def _noise(prospect: Prospect, patients: int) -> str:
    start = f"Expected noise to signal with {patients} patients, as many of every class: "
    found = prospect.expect(patients)
    if found is None:
        return f"{start}not known for this method."
    if math.isinf(found.noise_to_signal):
        return f"{start}the classes cannot be seen through the noise. Take more patients or a larger epsilon."
    judged = "" if found.noise_to_signal <= _USEFUL else f"; above {_USEFUL} little can be learned"
    return f"{start}{found.noise_to_signal:.2g} over {found.features} features{judged}."
