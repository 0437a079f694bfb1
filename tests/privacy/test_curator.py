"""The private curator: what it answers, what it refuses, and what it never does twice."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medistill.core.compute import fresh
from medistill.core.guarantee import Budget, PrivacyPlan, Query, QueryKind
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.errors import OutputError, PrivacyError
from medistill.networks.convnet import ConvNet
from medistill.privacy import Ledger, OpenCurator, PrivateCurator
from medistill.privacy.accounting import analytic_delta
from medistill.privacy.clipping import grid_step
from medistill.privacy.gradients import ImageGradients
from tests.conftest import blobs, pseudonym
from tests.privacy.asking import BUDGET, TASK, cohort, curator, gradients, marks, pixels, silent, sums


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def binary(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def uneven() -> ImageSet:
    """Patients with 1, 2, ... images, shuffled."""
    data = blobs(patients=6, per_patient=6, size=16)
    kept = [i for i in range(len(data)) if i % 6 <= i // 6]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    return data.select([kept[i] for i in order.tolist()])


def naive_sum(rows: Tensor, patients: tuple[str, ...], clip_norm: float) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for patient in sorted(set(patients)):
        own = torch.stack([rows[i] for i, name in enumerate(patients) if name == patient]).double().mean(0)
        total += own * min(1.0, clip_norm / float(own.norm()))
    return total


@pytest.mark.parametrize("clip_norm", [0.5, 5.0, 1e4])
def test_a_sum_is_that_of_clipped_means_of_patients(clip_norm: float, tmp_path: Path) -> None:
    data = uneven()
    found = curator(data, tmp_path, _entropy=silent).sum(pixels, clip_norm=clip_norm)
    expected = naive_sum(data.images.flatten(1), data.patients, clip_norm)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=7 * grid_step(clip_norm))


@pytest.mark.parametrize("clip_norm", [0.05, 50.0])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (1, 8, 8, 8)], ids=str)
def test_a_gradient_is_the_sum_of_clipped_gradients_of_patients(
    clip_norm: float, shape: tuple[int, ...], tmp_path: Path
) -> None:
    multilabel = len(shape) == 4
    task = Task.multilabel(("mass", "effusion")) if multilabel else TASK
    generator = torch.Generator().manual_seed(0)
    data = ImageSet(
        images=torch.rand((9, *shape), generator=generator),
        targets=torch.eye(2)[torch.arange(9) % 2],
        patients=tuple(pseudonym(number) for number in (0, 1, 1, 2, 2, 2, 3, 1, 0)),
        task=task,
    )
    network = fresh(lambda *of: ConvNet(*of, width=8, depth=2), task, shape, 0)
    loss = binary if multilabel else cross_entropy
    asked = curator(data, tmp_path, plan=gradients(), _entropy=silent)
    found = asked.gradient(network, loss, clip_norm=clip_norm)
    rows = []
    for i in range(9):
        network.zero_grad()
        loss(network(data.images[i : i + 1]), data.targets[i : i + 1]).sum().backward()
        rows.append(torch.cat([value.grad.flatten() for value in network.parameters()]))
    expected = naive_sum(torch.stack(rows), data.patients, clip_norm)
    flat = torch.cat([found[name].flatten() for name, _ in network.named_parameters()])
    torch.testing.assert_close(flat.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    if clip_norm > 1:
        exact = OpenCurator(data).gradient(network, loss)
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


class _Residual(nn.Module):
    """Layers that are known, in ways that the faster way must notice: one used twice, a change in place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head, self.kind = nn.GroupNorm(2, 8), nn.Linear(8, 2), kind

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        hidden = F.relu(hidden, inplace=self.kind == "in place")
        for _ in range(2 if self.kind == "twice" else 1):
            hidden = hidden + self.norm(self.second(hidden))
        if self.kind == "tied":
            hidden = hidden - hidden.mean(0, keepdim=True)
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "fast"), [("plain", True), ("in place", False), ("twice", False), ("tied", False)]
)
def test_the_faster_way_is_taken_only_where_it_is_right(kind: str, fast: bool) -> None:
    torch.manual_seed(0)
    network, images, targets = _Residual(kind), torch.rand(5, 1, 8, 8), torch.eye(2)[[0, 1, 0, 1, 1]]
    gradient = ImageGradients(network, cross_entropy, (1, 8, 8))
    assert gradient.layer_by_layer == fast
    rows = gradient(images, targets)
    for i in range(5):
        network.zero_grad()
        cross_entropy(network(images[i : i + 1]), targets[i : i + 1]).sum().backward()
        expected = torch.cat([value.grad.flatten() for value in network.parameters()])
        torch.testing.assert_close(rows[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (5, 1, 1), (1, 1, 0), (3, 1, 2)])
def test_convolutions_of_all_forms(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 4, kernel, stride, padding), nn.Flatten(), nn.LazyLinear(2)
    )
    images, targets = torch.rand(3, 1, 11, 11), torch.eye(2)[[0, 1, 0]]
    network(images)
    gradient = ImageGradients(network, cross_entropy, (1, 11, 11))
    assert gradient.layer_by_layer
    torch.testing.assert_close(gradient(images, targets), gradient._alone(images, targets), rtol=1e-4, atol=1e-6)


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    network = fresh(lambda *of: ConvNet(*of, width=8), TASK, (1, 16, 16), 0)
    for value in network.parameters():
        value.requires_grad_(False)
    network.head.weight.requires_grad_()
    asked = curator(blobs(patients=4), tmp_path, plan=gradients(), _entropy=silent)
    assert set(asked.gradient(network, cross_entropy, clip_norm=1.0)) == {"head.weight"}


def test_noise_is_as_large_as_accounted(tmp_path: Path) -> None:
    asked = curator(cohort(torch.zeros(4, 128 * 128)), tmp_path)
    answer = asked.sum(pixels, clip_norm=3.0).double()
    # The standard error of a standard deviation from 16,384 values is 0.55 %; seven of them.
    assert float(answer.std()) == pytest.approx(3.0 * asked.noise(0), rel=0.039)
    assert analytic_delta(asked.noise(0), BUDGET.epsilon) == pytest.approx(BUDGET.delta, rel=1e-4)


def test_only_the_plan_is_answered(tmp_path: Path) -> None:
    asked = curator(marks(4), tmp_path, plan=PrivacyPlan.joined((sums(), gradients())))
    network = fresh(lambda *of: ConvNet(*of, width=8, depth=1), TASK, (1, 2, 2), 0)
    with pytest.raises(PrivacyError, match="declared as sum"):
        asked.gradient(network, cross_entropy, clip_norm=1.0)
    with pytest.raises(PrivacyError, match=r"not sum at 0\.5"):
        asked.sum(pixels, clip_norm=1.0, sampling_rate=0.5)
    for clip_norm in (math.inf, 0.0, math.nan):
        with pytest.raises(PrivacyError, match="clip norm"):
            asked.sum(pixels, clip_norm=clip_norm)
    with pytest.raises(PrivacyError, match="clip norm"):
        asked.sum(pixels)
    asked.sum(pixels, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="declared as gradient"):
        asked.sum(pixels, clip_norm=1.0)
    with pytest.raises(PrivacyError, match=r"not gradient at 0\.5"):
        asked.gradient(network, cross_entropy, clip_norm=1.0, sampling_rate=0.5)
    asked.gradient(network, cross_entropy, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="nothing more"):
        asked.sum(pixels, clip_norm=1.0)
    assert asked.noise(0) > 0
    assert asked.noise(1) > 0
    with pytest.raises(PrivacyError, match="position"):
        asked.noise(2)


def test_nothing_is_asked_of_images_without_a_patient(tmp_path: Path) -> None:
    data = marks(4)
    nobody = ImageSet(images=data.images, targets=data.targets, patients=("a", "b", " ", "c"), task=data.task)
    with pytest.raises(PrivacyError, match="names no patient"):
        curator(nobody, tmp_path)


def test_an_interrupted_run_takes_its_answers_up_and_spends_nothing_twice(tmp_path: Path) -> None:
    first = curator(marks(16), tmp_path, plan=sums(3), store=tmp_path / "answers")
    before = [first.sum(pixels, clip_norm=1.0) for _ in range(2)]
    del first
    gc.collect()
    # Another cohort: what is replayed was made then, and touches no image of now.
    again = curator(cohort(torch.ones(9, 16)), tmp_path, plan=sums(3), store=tmp_path / "answers")
    assert all(torch.equal(again.sum(pixels, clip_norm=1.0), answer) for answer in before)
    again.sum(pixels, clip_norm=1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    (reservation,) = ledger.reservations()
    assert len(reservation.sealed) == 3
    spent = ledger.spent()
    assert spent is not None
    assert spent.epsilon <= BUDGET.epsilon


def test_a_run_that_kept_its_own_results_goes_on_behind_them(tmp_path: Path) -> None:
    first = curator(marks(16), tmp_path, plan=sums(4), store=tmp_path / "answers")
    kept = [first.sum(pixels, clip_norm=1.0) for _ in range(3)]
    del first
    gc.collect()
    again = curator(marks(16), tmp_path, plan=sums(4), store=tmp_path / "answers")
    again.resume(2)
    assert len(list((tmp_path / "answers").glob("*.safetensors"))) == 1
    assert torch.equal(again.sum(pixels, clip_norm=1.0), kept[2])
    again.sum(pixels, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="nothing more"):
        again.sum(pixels, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="4 queries"):
        again.resume(5)


def test_without_a_folder_another_run_spends_anew(tmp_path: Path) -> None:
    for _ in range(2):
        curator(marks(4), tmp_path).sum(pixels, clip_norm=1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spent = ledger.spent()
    assert len(ledger.reservations()) == 2
    assert spent is not None
    assert spent.epsilon > BUDGET.epsilon


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    first = curator(marks(4), tmp_path, store=tmp_path / "answers")
    with pytest.raises(OutputError, match="Another process"):
        curator(marks(4), tmp_path, store=tmp_path / "answers")
    assert first.identity


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_an_answer_that_is_not_the_sealed_one_is_refused_and_not_redrawn(damage: str, tmp_path: Path) -> None:
    first = curator(marks(4), tmp_path, store=tmp_path / "answers")
    first.sum(pixels, clip_norm=1.0)
    del first
    gc.collect()
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    again = curator(marks(4), tmp_path, store=tmp_path / "answers")
    with pytest.raises(PrivacyError, match="must not be drawn again"):
        again.sum(pixels, clip_norm=1.0)


def test_kept_answers_of_another_plan_budget_or_ledger_are_refused(tmp_path: Path) -> None:
    store = tmp_path / "answers"
    curator(marks(4), tmp_path, store=store).sum(pixels, clip_norm=1.0)
    gc.collect()
    for change in ({"plan": sums(2)}, {"recipe": "ab"}):
        with pytest.raises(PrivacyError, match="another plan, budget or recipe"):
            curator(marks(4), tmp_path, store=store, **change)
        gc.collect()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(PrivacyError, match="another plan, budget or recipe"):
        PrivateCurator(marks(4), budget=Budget(epsilon=1, delta=1e-5), plan=sums(), ledger=ledger, store=store)
    gc.collect()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(PrivacyError, match="own ledger back"):
        curator(marks(4), tmp_path / "elsewhere", store=store)


def test_an_answer_is_sealed_before_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = curator(marks(4), tmp_path, store=tmp_path / "answers")

    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "seal", full)
        with pytest.raises(OutputError, match="full"):
            first.sum(pixels, clip_norm=1.0)
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    drawn = path.read_bytes()
    del first
    gc.collect()
    again = curator(marks(4), tmp_path, store=tmp_path / "answers")
    again.sum(pixels, clip_norm=1.0)
    assert path.read_bytes() == drawn  # the draw that nobody saw is the one that is given


def test_a_plan_that_the_cohort_cannot_afford_is_refused_before_any_answer(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", lifetime=Budget(epsilon=2.5, delta=1e-5))
    PrivateCurator(marks(4), budget=BUDGET, plan=sums(), ledger=ledger)
    with pytest.raises(PrivacyError, match="lifetime budget"):
        PrivateCurator(marks(4), budget=BUDGET, plan=sums(), ledger=ledger)


def test_nothing_of_a_patient_is_in_the_ledger_or_the_names_of_answers(tmp_path: Path) -> None:
    data = marks(4)
    asked = curator(data, tmp_path, store=tmp_path / "answers", recipe="0f")
    asked.sum(pixels, clip_norm=1.0)
    text = (tmp_path / "ledger.jsonl").read_text() + " ".join(p.name for p in (tmp_path / "answers").iterdir())
    for secret in (*data.patients, str(tmp_path), tmp_path.name, '"4"', "patients"):
        assert secret not in text


def test_the_statement_says_what_was_asked_and_what_is_taken_as_public(tmp_path: Path) -> None:
    plan = PrivacyPlan(
        queries=(Query(kind=QueryKind.SUM, purpose="class moments", count=2),),
        assumptions=("Features are public.",),
    )
    statement = curator(marks(4), tmp_path, plan=plan).statement()
    assert 0.999 * BUDGET.epsilon < statement.epsilon <= BUDGET.epsilon
    assert statement.delta == BUDGET.delta
    assert statement.event[0].startswith("class moments: 2 x Gaussian")
    assert "Features are public." in statement.assumptions
    assert statement.reason == ""


def test_the_open_curator_answers_exactly() -> None:
    data = uneven()
    asked = OpenCurator(data)
    expected = naive_sum(data.images.flatten(1), data.patients, math.inf)
    torch.testing.assert_close(asked.sum(pixels, clip_norm=0.1).double(), expected, rtol=1e-4, atol=1e-4)
    assert asked.noise(7) == 0.0
    asked.resume(3)
    assert asked.statement().reason
