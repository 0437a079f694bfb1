"""Epsilon against integrals, closed forms and the accountants called directly; and what is refused."""

from __future__ import annotations

import ast
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from medistill.errors import PrivacyError
from medistill.privacy import accountants
from medistill.privacy.accountants import PROCESSES, Process, Stopped
from medistill.privacy.accounting import (
    ACCOUNTANTS,
    CLOSED_FORM,
    Mechanism,
    _asked,
    analytic_delta,
    analytic_epsilon,
    analytic_noise,
    epsilon_of,
)

DELTA = 1e-5


def sampled(sigma: float = 1.0, rate: float = 0.02, count: int = 100) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, sampling_rate=rate, count=count)


def integrated_delta(sigma: float, epsilon: float, rate: float = 1.0) -> float:
    """Mass of the patient's presence above e^epsilon times that of the absence, by numerical integration."""

    def above(x: float) -> float:
        without = norm.pdf(x, 0, sigma)
        present = (1 - rate) * without + rate * norm.pdf(x, 1, sigma)
        return max(0.0, present - math.exp(epsilon) * without)

    from_here = sigma**2 * math.log1p(math.expm1(epsilon) / rate) + 0.5
    value, _ = quad(above, from_here, from_here + 40 * sigma, epsabs=1e-16, epsrel=1e-10, limit=500)
    return value


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.73, 20.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_closed_form_is_the_integral(sigma: float, epsilon: float) -> None:
    assert analytic_delta(sigma, epsilon) == pytest.approx(integrated_delta(sigma, epsilon), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(("epsilon", "sigma"), [(1, 3.73), (3, 1.39), (10, 0.50)])
def test_known_noise_multipliers(epsilon: float, sigma: float) -> None:
    assert analytic_noise(epsilon, DELTA) == pytest.approx(sigma, abs=0.005)
    assert analytic_epsilon(analytic_noise(epsilon, DELTA), DELTA) == pytest.approx(epsilon, rel=1e-6)


@given(
    sigma=st.floats(0.1, 100),
    delta=st.floats(1e-9, 1e-2),
    more=st.floats(1.01, 3),
    count=st.integers(1, 1000),
)
@settings(max_examples=60, deadline=None)
def test_unsampled_epsilon_is_monotone(sigma: float, delta: float, more: float, count: int) -> None:
    base = analytic_epsilon(sigma, delta)
    assert analytic_epsilon(sigma * more, delta) <= base
    assert analytic_epsilon(sigma, min(0.5, delta * more)) <= base
    assert analytic_epsilon(sigma / math.sqrt(count), delta) >= base
    assert analytic_delta(sigma, base) <= delta


def test_unsampled_gaussians_are_one() -> None:
    parts = [
        Mechanism(noise_multiplier=3.0, count=4),
        Mechanism(noise_multiplier=2.0),
        Mechanism(noise_multiplier=5),
    ]
    together = 1 / math.sqrt(4 / 9 + 1 / 4 + 1 / 25)
    bound = epsilon_of(parts, DELTA)
    assert bound.epsilon == pytest.approx(analytic_epsilon(together, DELTA))
    assert bound.accountants == (CLOSED_FORM,)


def test_pld_is_what_the_library_gives_and_the_smallest_is_reported() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    mechanisms = [sampled(), Mechanism(noise_multiplier=4.0, count=2)]
    direct = PLDAccountant()
    direct.compose(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.0)), 100)
    direct.compose(GaussianDpEvent(4.0), 2)
    bound = epsilon_of(mechanisms, DELTA)
    assert set(bound.answers) == set(ACCOUNTANTS)
    assert bound.epsilon == min(bound.answers.values()) == bound.answers[bound.accountants[0]]
    assert bound.answers["pld"] == pytest.approx(direct.get_epsilon(DELTA), rel=3e-3)
    assert bound.answers["prv"] == pytest.approx(bound.answers["pld"] + 0.01, abs=0.005)
    assert 1.05 < bound.answers["rdp"] / bound.answers["pld"] < 1.4


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.1), (0.6, 0.02), (2.0, 0.5)])
def test_one_sampled_query_against_its_exact_epsilon(sigma: float, rate: float) -> None:
    exact = math.log1p(rate * math.expm1(analytic_epsilon(sigma, DELTA / rate)))
    assert integrated_delta(sigma, exact, rate) == pytest.approx(DELTA, rel=1e-3)
    found = epsilon_of([sampled(sigma, rate, 1)], DELTA, accountants=("pld",)).epsilon
    assert exact * (1 - 1e-6) <= found <= 1.015 * exact


@given(sigma=st.floats(2, 5), rate=st.floats(0.01, 0.2), count=st.integers(1, 50))
@settings(max_examples=2, deadline=None)
def test_sampled_epsilon_is_monotone(sigma: float, rate: float, count: int) -> None:
    def epsilon(mechanism: Mechanism, delta: float = DELTA) -> float:
        return epsilon_of([mechanism], delta, accountants=("pld",)).epsilon

    base, slack = epsilon(sampled(sigma, rate, count)), 1e-3
    assert epsilon(sampled(1.2 * sigma, rate, count)) <= base + slack
    assert epsilon(sampled(sigma, 1.2 * rate, count)) >= base - slack
    assert epsilon(sampled(sigma, rate, 2 * count)) >= base - slack
    assert epsilon(sampled(sigma, rate, count), 10 * DELTA) <= base + slack


BAD_MECHANISMS: list[dict[str, Any]] = [
    *({"noise_multiplier": sigma} for sigma in (0, -1.0, math.nan, math.inf, 1e-3, 1e6, "1", None, True)),
    *({"noise_multiplier": 1.0, "sampling_rate": rate} for rate in (0, -0.1, 1.1, math.nan, None)),
    *({"noise_multiplier": 1.0, "count": count} for count in (0, -3, 1.5, math.nan, 10**7, None)),
]


@pytest.mark.parametrize("values", BAD_MECHANISMS, ids=str)
def test_odd_mechanisms_are_refused_at_once(values: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(PrivacyError, match="Expected"):
        Mechanism(**values)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, None])
def test_odd_deltas_are_refused_at_once(delta: Any) -> None:
    began = time.monotonic()
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_of([sampled()], delta)
    assert time.monotonic() - began < 1


def test_odd_compositions_are_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(PrivacyError, match="at least one"):
        epsilon_of([], DELTA)
    with pytest.raises(PrivacyError, match="above 100"):
        epsilon_of([Mechanism(noise_multiplier=0.05)], DELTA)
    with pytest.raises(PrivacyError, match="above 100"):
        epsilon_of([Mechanism(noise_multiplier=0.05, count=1000)], DELTA)
    with pytest.raises(PrivacyError, match="at most"):
        epsilon_of([Mechanism(noise_multiplier=100.0, count=10**6)] * 2, DELTA)
    assert time.monotonic() - began < 1


def test_gaussian_differential_privacy_is_no_accountant() -> None:
    assert "gdp" not in ACCOUNTANTS
    with pytest.raises(PrivacyError, match="Unknown accountant"):
        epsilon_of([sampled()], DELTA, accountants=("gdp",))


@pytest.mark.parametrize("answer", [-0.3, 0.0, 1e-4, math.nan, math.inf])
def test_silly_answers_are_discarded(answer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = sampled(1.5, 0.5, 2)
    _asked.cache_clear()
    monkeypatch.setattr(Process, "ask", lambda *_: answer)
    bound = epsilon_of([mechanism], DELTA)
    assert bound.accountants == (CLOSED_FORM,)
    assert set(bound.silent) == {"pld", "prv", "rdp"}
    assert bound.epsilon == pytest.approx(analytic_epsilon(1.5 / math.sqrt(2), DELTA))
    _asked.cache_clear()


def test_an_answer_below_that_of_pld_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    _asked.cache_clear()
    answers = {"pld": 3.5, "prv": 3.3, "rdp": 3.9}
    monkeypatch.setattr(Process, "ask", lambda _self, name, *_: answers[name])
    bound = epsilon_of([sampled(1.5, 0.5, 2)], DELTA)
    assert bound.epsilon == 3.5
    assert "discarded" in bound.silent["prv"]
    _asked.cache_clear()


def test_an_accountant_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountants, "_START", "import time; print('ready', flush=True); time.sleep(600)")
    process = Process()
    began = time.monotonic()
    child = process._started()
    with pytest.raises(Stopped, match=r"after 0\.2 s"):
        process.ask("pld", [(1.0, 0.1, 1)], DELTA, 0.2)
    assert time.monotonic() - began < 5
    assert child.poll() is not None


def test_an_accountant_that_wants_too_much_memory_or_time_costs_only_itself() -> None:
    hopeless = [(0.011, 0.5, 10**6)]
    began = time.monotonic()
    with pytest.raises(Stopped):
        PROCESSES["Opacus"].ask("prv", hopeless, 1e-9, 10)
    assert time.monotonic() - began < 60
    assert PROCESSES["dp-accounting"].ask("pld", [(2.0, 0.1, 1)], DELTA, 60) > 0


def test_the_answer_to_a_question_that_was_broken_off_is_not_that_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gives_delta = "for line in sys.stdin: print(json.dumps({'epsilon': json.loads(line)['delta']}), flush=True)"
    monkeypatch.setattr(accountants, "_START", f"import json, sys\nprint('ready', flush=True)\n{gives_delta}")
    process = Process()
    assert process.ask("pld", [], 0.1, 10) == 0.1

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accountants, "_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.ask("pld", [], 0.2, 10)
    assert process.ask("pld", [], 0.3, 10) == 0.3
    process.stop()


def test_the_libraries_are_imported_only_when_asked() -> None:
    for path in Path(accountants.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not re.match(r"(from|import) (opacus|dp_accounting)", ast.unparse(node)), path.name


def test_numbers_of_numpy_are_numbers() -> None:
    assert Mechanism(noise_multiplier=np.float64(2.0)).noise_multiplier == 2.0
