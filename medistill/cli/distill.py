"""From a cohort to a sealed release: distill, audit, evaluate, release."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from medistill.cli.app import app, guarded, noted_commands, open_cohort, progress, remember_command
from medistill.cli.privacy import around, check_options, described, parse_delta
from medistill.errors import ConfigError, OutputError

_NEXT = re.compile(r",(?=\w+\.\w+=)")  # between the settings of a candidate, and not within one


@app.command()
@guarded
def distill(
    context: typer.Context,
    cohort: Annotated[Path, typer.Argument(help="Cohort folder made by ingest.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    method: Annotated[str, typer.Option(help="auto, a distiller, or several joined by +.")] = "auto",
    ipc: Annotated[int, typer.Option(min=1, help="Images per class.")] = 10,
    size: Annotated[int, typer.Option(min=16, help="Side length in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many looks without a better validation AUROC; 0: never.")
    ] = 0,
    looks: Annotated[int, typer.Option(min=1, help="Times to look at the images as they form.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Forward passes in bfloat16.")
    ] = False,
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="Compile networks with torch.compile.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    epsilon: Annotated[
        float | None, typer.Option(help="Differential privacy for each patient: what this release may spend.")
    ] = None,
    delta: Annotated[str, typer.Option(help="With --epsilon: auto, or a number.")] = "auto",
    lifetime: Annotated[
        float | None, typer.Option(help="Epsilon of all releases of the cohort; fixed by the first. [default: 6]")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Ledger, where several cohorts hold the same patients.")
    ] = None,
    expected_runs: Annotated[
        float, typer.Option(help="With --epsilon: keep the best of a random number of runs, so many on average.")
    ] = 1.0,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="DISTILLER.NAME=VALUE,...",
            help="With --expected-runs: settings of which every run draws one; repeatable.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="DISTILLER.NAME=VALUE", help="Change a setting; repeatable."),
    ] = None,
) -> None:
    """Distil the train patients of a cohort into a few synthetic images with soft labels.

    Interrupted, the same command goes on from its checkpoint. RUN/forming/sheet.png shows the images as they
    form and looks.csv what a student trained on them reaches on validation patients.

    With --epsilon the release is differentially private for each patient. What it will ask is shown first and
    written to COHORT/ledger.jsonl, which refuses more than the lifetime's epsilon; noisy answers are kept in
    RUN/sealed, so that the same command spends nothing twice. Without --expected-runs no validation patient is
    looked at.

    With --expected-runs settings may be tuned within the same epsilon: every run draws a candidate and a seed,
    validation patients judge its release by a noisy score, and the best is kept. What it costs is noise, and time.
    How many runs there were must not be published.

    Example: `medistill distill cohort --method auto --ipc 10 --out run`

    Example: `medistill distill cohort --epsilon 3 --delta auto --out run`

    Example: `medistill distill cohort --epsilon 3 --expected-runs 3 --candidate surrogate.sharpness=1 --candidate
    surrogate.sharpness=4 --out run`
    """
    from medistill.config import check_settings
    from medistill.core.compute import Compute
    from medistill.distill import distill as distil
    from medistill.distill import distill_privately, foresee, resolve_method
    from medistill.privacy.curator import OpenCurator
    from medistill.report.forming import FormingSheet
    from medistill.workflow import open_ledger, remember_cohort, save_run_distilled, shape_of_images

    if (out / "distilled").exists():
        raise OutputError(
            "The run folder holds a distilled set already. Choose a new one, so that its audit stays with it."
        )
    check_options(
        epsilon,
        delta=delta,
        lifetime=lifetime,
        ledger=ledger,
        patience=patience,
        expected_runs=expected_runs,
        candidates=len(candidates or []),
    )
    real = open_cohort(cohort)
    train = real.split("train")
    typed = check_settings(method, _settings(settings or []), private=epsilon is not None)
    what: dict[str, Any] = {"method": method, "ipc": ipc, "seed": seed, "settings": typed}
    compute = Compute(device=device, mixed_precision=mixed_precision, compile=compile_networks, engine=engine)
    how: dict[str, Any] = {"folder": out / "checkpoints", "compute": compute, "looks": looks}
    how |= {"observer": FormingSheet(out / "forming"), "progress": progress()}
    if epsilon is None:
        chosen = resolve_method(method, real.task, ipc, image_shape=shape_of_images(real, size))
        typer.echo(f"{' + '.join(chosen.distillers)}: {chosen.why}", err=True)
        curator, validation = OpenCurator(train.images(size)), real.split("validation").images(size)
        result = distil(curator, validation=validation, patience=patience, **what, **how)
    else:
        shape, count = shape_of_images(real, size), len(train.patients)
        what |= {"epsilon": epsilon, "delta": parse_delta(delta), "patients": count}
        tried = [_settings(_NEXT.split(candidate), option="--candidate") for candidate in candidates or []]
        what |= {"expected_runs": expected_runs}
        what |= {"candidates": [check_settings(method, each, private=True) for each in tried]}
        prospect = foresee(real.task, shape, **what)
        for line in described(prospect, around(count)):
            typer.echo(line, err=True)
        book = open_ledger(cohort, path=ledger, lifetime=lifetime)
        how |= {"ledger": book, "sealed": out / "sealed"}
        how |= {"validation": real.split("validation").images(size) if prospect.plan.selects else None}
        result = distill_privately(train.images(size), prospect, **how)
    for stale in ("audit.json", "diagnosis.json"):
        (out / stale).unlink(missing_ok=True)
    save_run_distilled(out, result.distilled, result.snapshots)
    remember_cohort(out, real)
    remember_command(context, out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    typer.echo(f"{len(result.distilled)} images of {size} px in {out}")


def _settings(entries: list[str], *, option: str = "--set") -> dict[str, dict[str, Any]]:
    from medistill.config import parse_value

    settings: dict[str, dict[str, Any]] = {}
    for entry in entries:
        path, separator, text = entry.partition("=")
        distiller, dot, name = path.partition(".")
        if not (separator and dot):
            raise ConfigError(f"Expected {option} DISTILLER.NAME=VALUE, got {entry!r}.")
        settings.setdefault(distiller, {})[name] = parse_value(text, option=f"{option} {path}")
    return settings


def _policy(file: Path | None, profile: str | None) -> Any:
    """Limits of an audit from a file, its profile replaced where one is named."""
    from medistill.audit import AuditPolicy
    from medistill.config import read_yaml
    from medistill.studies.records import read_record

    values = dict(read_yaml(file)) if file is not None else {}
    return read_record(AuditPolicy, {**values, **({"profile": profile} if profile else {})})


@app.command()
@guarded
def audit(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder made by distill.")],
    cohort: Annotated[Path, typer.Option(help="Cohort it was distilled from.")],
    policy: Annotated[Path | None, typer.Option(help="YAML of limits, like configs/policy.yaml.")] = None,
    profile: Annotated[str | None, typer.Option(help="quick, default or full: which attacks are made.")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--with", help="Run folder of another release of this cohort; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Attack a distilled set, with positive and negative controls beside every attack.

    Writes audit.json and, for the data protection officer, audit.html, which shows patients and stays inside.
    Only the verdict PASS exits 0; every other verdict exits 3.

    Example: `medistill audit run --cohort cohort --policy configs/policy.yaml`
    """
    from medistill import __version__
    from medistill.audit import Exposed, attributes_of, outcome_lines, write_audit
    from medistill.audit import audit as attack
    from medistill.core.compute import Compute
    from medistill.core.reports import Verdict
    from medistill.release.tensors import load_distilled
    from medistill.workflow import require_cohort

    limits = _policy(policy, profile)
    distilled = load_distilled(run / "distilled")
    others = [load_distilled(other / "distilled") for other in beside or []]
    real, size = open_cohort(cohort), distilled.images.shape[-1]
    for folder in (run, *(beside or [])):
        require_cohort(folder, real)
    train, holdout, reference = (real.split(name).images(size) for name in ("train", "holdout", "validation"))
    report = attack(
        distilled,
        train=train,
        holdout=holdout,
        reference=reference,
        others=others,
        attributes=attributes_of(real),
        policy=limits,
        seed=seed,
        folder=run / "checkpoints",
        controls=run / "controls",
        compute=Compute(device=device),
        progress=progress(),
    )
    write_audit(
        run,
        report,
        Exposed.of(distilled),
        statement=distilled.privacy,
        train=train,
        holdout=holdout,
        reference=reference,
        version=__version__,
    )
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    remember_command(context, run)
    for line in outcome_lines(report):
        typer.echo(line)
    for threat in report.not_tested:
        typer.echo(f"Not tested: {threat}")
    for refusal in report.refusals:
        typer.echo(f"Refused: {refusal}")
    typer.echo(f"Page for the data protection officer (stays inside): {run / 'audit.html'}")
    typer.echo(f"Verdict: {report.verdict.value}")
    if report.verdict is not Verdict.PASS:
        raise typer.Exit(3)


@app.command()
@guarded
def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder made by distill.")],
    cohort: Annotated[Path, typer.Option(help="Cohort it was distilled from.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per arm and network.")] = 3,
    network: Annotated[
        list[str] | None, typer.Option(help="See `medistill list networks`; repeatable. [default: convnet]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Compare training on the distilled set with training on real images, on patients held out.

    Example: `medistill evaluate run --cohort cohort --seeds 3`
    """
    import json

    from medistill.core.compute import Compute
    from medistill.evaluate import EvaluationConfig
    from medistill.evaluate import evaluate as compare
    from medistill.release.tensors import load_distilled
    from medistill.workflow import require_cohort, write_text

    distilled = load_distilled(run / "distilled")
    real, size = open_cohort(cohort), distilled.images.shape[-1]
    require_cohort(run, real)
    judged = {name: real.split(name) for name in ("test", "holdout")}
    report = compare(
        distilled,
        train=real.split("train").images(size),
        validation=real.split("validation").images(size),
        tests={name: part.images(size) for name, part in judged.items()},
        attributes={name: part.attributes() for name, part in judged.items()},
        config=EvaluationConfig(seeds=seeds, networks=tuple(network or ["convnet"])),
        seed=seed,
        compute=Compute(device=device),
        progress=progress(),
    )
    write_text(run / "diagnosis.json", json.dumps(report.to_json(), indent=2) + "\n")
    remember_command(context, run)
    for arm in report.arms:
        called = f"{arm.network:<10} {arm.split:<8} {arm.arm:<15}"
        typer.echo(f"{called} {arm.images:>6} images  AUROC {arm.metrics['auroc']}")
    for found in report.differences:
        if found.kind == "against_real" and found.arm == "distilled":
            called = f"{found.network:<10} {found.split:<8} distilled - real"
            typer.echo(f"{called}  AUROC {found.value}  p {found.p_value:.3f}")


@app.command()
@guarded
def release(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder with distilled/, audit.json and diagnosis.json.")],
    out: Annotated[Path, typer.Option(help="New release folder.")],
    cohort: Annotated[Path | None, typer.Option(help="Cohort, for the data-flow part of the report.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the release, for example CC-BY-4.0.")] = "",
    force_with_reason: Annotated[
        str | None, typer.Option(help="Release although the gate was not passed; the reason is printed on it.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Private key made by keygen; signs the release.", metavar="NAME.key")
    ] = None,
    published: Annotated[str | None, typer.Option(help="Day that stands in croissant.json: YYYY-MM-DD.")] = None,
) -> None:
    """Seal a release folder, if the audit passed, and sign it where a key is given.

    Example: `medistill release run --cohort cohort --out release`

    Example: `medistill release run --cohort cohort --sign hospital.key --out release`
    """
    from medistill.core.reports import Verdict
    from medistill.release.folder import write_release
    from medistill.release.gate import check_gate
    from medistill.release.signature import load_signing_key
    from medistill.release.tensors import load_distilled
    from medistill.report.forming import load_moments
    from medistill.workflow import cohort_summary, load_audit, load_diagnosis, load_profile, load_snapshots

    key = load_signing_key(sign) if sign else None
    distilled = load_distilled(run / "distilled")
    report = load_audit(run)
    check_gate(report, accept=frozenset({Verdict.PASS}), forced_reason=force_with_reason)
    remember_command(context, run)
    write_release(
        out,
        distilled=distilled,
        audit=report,
        diagnosis=load_diagnosis(run),
        cohort=cohort_summary(open_cohort(cohort)) if cohort else None,
        snapshots=load_snapshots(run),
        moments=load_moments(run / "forming", distilled),
        commands=(*noted_commands(cohort), *noted_commands(run)),
        forced_reason=force_with_reason,
        licence=licence or None,
        profile=load_profile(run),
        signing_key=key,
        published=published,
    )
    if key is not None:
        typer.echo(f"Signed by the key {key.fingerprint}")
    typer.echo(f"Sealed {out}; report: {out / 'report.html'}")


@app.command()
@guarded
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Page with the table and a chart.")] = Path("compare.html"),
) -> None:
    """Put several runs side by side: AUROC of every arm, epsilon, the audit's verdict.

    Example: `medistill compare runs/ten runs/one runs/private --out compare.html`
    """
    from medistill.report.runs import render_runs, warnings_of_runs
    from medistill.workflow import load_row, write_text

    rows = [load_row(folder) for folder in runs]
    write_text(out, render_runs(rows))
    width = max(len(row.name) for row in rows)
    for row in rows:
        found = "  ".join(f"{arm} {estimate}" for arm, estimate in row.auroc.items()) or "not evaluated"
        epsilon = "nothing proved" if row.epsilon == float("inf") else f"epsilon {row.epsilon:.3g}"
        typer.echo(f"{row.name:<{width}}  {row.images} images  {epsilon}  {row.audited}  {found}")
    for warning in warnings_of_runs(rows):
        typer.echo(f"Note: {warning}")
    typer.echo(f"Page: {out}")
