"""Shadow distillations: many at once equal one at a time, the likelihood ratio is the textbook one, leaks show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from medistill.audit import statistics
from medistill.audit.attack import Exposed, MembershipAttack
from medistill.audit.shadow import (
    MARGIN,
    NEARNESS,
    TRACING,
    WHITENED,
    Moments,
    Observer,
    PreparedShadow,
    Shadow,
    aligned,
    likelihood_ratio,
    moments,
    shrunk,
)
from medistill.audit.shadow_distillation import (
    ShadowDistillation,
    class_labels,
    class_means,
    draw_membership,
    image_weights,
    random_network,
)
from medistill.core.compute import Compute
from medistill.core.images import ImageSet
from medistill.core.task import Task
from medistill.distill.distribution_matching import DistributionMatching
from medistill.distill.distribution_matching import class_means as means_of_one
from medistill.errors import ConfigError, DataError
from medistill.privacy.curator import OpenCurator
from medistill.progress import Progress
from tests.conftest import blobs

FAST = ShadowDistillation(networks=4, iterations=30, width=8, most=8)
QUICK = Shadow(shadows=8, observers=2, distillation=FAST)


def _run(real: ImageSet, membership: torch.Tensor, settings: ShadowDistillation, ipc: int = 2) -> torch.Tensor:
    parts = settings.run(real, membership, ipc=ipc, seed=3, compute=Compute(), progress=Progress())
    return torch.cat([part.images for part in parts])


def _prepared(attack: Shadow, candidates: ImageSet, reference: ImageSet) -> PreparedShadow:
    return attack.prepare(candidates, reference, ipc=2, seed=0, compute=Compute(), progress=Progress())


def _multilabel(real: ImageSet) -> ImageSet:
    task = Task.multilabel(("a", "b"))
    targets = real.targets.clone()
    targets[::3] = 1.0
    return replace(real, targets=targets, task=task)


def test_every_patient_is_in_half_of_the_shadows_and_every_shadow_has_about_half_of_the_patients() -> None:
    drawn = draw_membership(400, 16, seed=1)
    assert (drawn.sum(0) == 8).all()
    assert ((drawn.sum(1) - 200).abs() < 50).all()
    pairs = (drawn[:, :-1] == drawn[:, 1:]).double().mean()
    assert abs(float(pairs) - 0.5) < 0.03
    assert torch.equal(drawn, draw_membership(400, 16, seed=1))


@pytest.mark.parametrize("multilabel", [False, True])
def test_class_means_of_all_shadows_are_those_of_a_loop_over_shadows(multilabel: bool) -> None:
    real = blobs(12, per_patient=3)
    real = real.select([i for i in range(36) if i % 3 == 0 or i % 2])  # patients of one, two and three images
    real = _multilabel(real) if multilabel else real
    membership = draw_membership(12, 6, seed=0)
    network = random_network(real.task, (1, 16, 16), 8, 0, Compute())
    weights = image_weights(real, membership)
    found = class_means(real, weights, network, Compute())
    names = np.array(real.unique_patients)
    for shadow, mine in enumerate(membership):
        part = real.of_patients(set(names[mine.numpy()]))
        torch.testing.assert_close(found[shadow], means_of_one(OpenCurator(part), network, Compute()))
    labels = class_labels(real, weights)
    if not multilabel:
        torch.testing.assert_close(labels, torch.eye(2).expand(6, 2, 2))
    else:
        assert float(labels[:, 0, 1].min()) > 0


@pytest.mark.parametrize("shape", ["grey", "colour", "volume"])
def test_shadows_made_together_are_those_made_one_at_a_time(shape: str) -> None:
    real = blobs(12)
    if shape == "colour":
        real = replace(real, images=real.images.repeat(1, 3, 1, 1))
    if shape == "volume":
        real = replace(real, images=real.images[:, :, None].repeat(1, 1, 16, 1, 1))
    membership = draw_membership(12, 4, seed=0)
    settings = ShadowDistillation(networks=2, iterations=6, width=4, rate=0.02)
    together = _run(real, membership, settings)
    names = np.array(real.unique_patients)
    for shadow, mine in enumerate(membership):
        part = real.of_patients(set(names[mine.numpy()]))
        everybody = torch.ones(shadow + 1, int(mine.sum()), dtype=torch.bool)  # the number decides the start
        alone = _run(part, everybody, settings)[shadow]
        torch.testing.assert_close(together[shadow], alone, rtol=0, atol=1e-4)
    assert torch.equal(together, _run(real, membership, settings))


def test_a_shadow_reaches_the_class_means_as_the_distiller_does() -> None:
    real = blobs(20)
    everybody = torch.ones(1, 20, dtype=torch.bool)
    made = _run(real, everybody, ShadowDistillation(networks=4, iterations=100, width=8))[0]
    start = _run(real, everybody, ShadowDistillation(networks=4, iterations=1, rate=1e-9, width=8))[0]
    from medistill.core.protocols import Workbench

    theirs = DistributionMatching(networks=4, iterations=100, rate=0.05, width=8).distill(
        OpenCurator(real), ipc=2, seed=1, start=None, bench=Workbench()
    )
    fresh = random_network(real.task, (1, 16, 16), 8, 99, Compute())
    wanted = means_of_one(OpenCurator(real), fresh, Compute())

    def gap(images: torch.Tensor) -> float:
        return float((fresh.features(images).view(2, 2, -1).mean(1) - wanted).square().sum())

    assert gap(made) < 0.5 * gap(start)
    assert gap(made) < 1.5 * gap(theirs.images)


def test_lira_is_the_textbook_likelihood_ratio_of_every_patient() -> None:
    generator = np.random.default_rng(0)
    membership = draw_membership(30, 10, seed=0)
    observed = torch.tensor(generator.normal(size=(30, 10, 2)) * [1.0, 5.0] + generator.normal(size=(30, 1, 2)))
    target = torch.tensor(generator.normal(size=(30, 2)))
    usual = moments(observed, membership)
    found = likelihood_ratio(target, usual)
    values, coins = observed.numpy(), membership.numpy()
    inside = np.array([[values[p, coins[:, p], j].mean() for j in range(2)] for p in range(30)])
    outside = np.array([[values[p, ~coins[:, p], j].mean() for j in range(2)] for p in range(30)])
    spread = np.zeros(2)
    for j in range(2):
        rest = [values[p, s, j] - (inside if coins[s, p] else outside)[p, j] for p in range(30) for s in range(10)]
        spread[j] = np.sqrt(np.sum(np.square(rest)) / (30 * 8))
    naive = stats.norm.logpdf(target, inside, spread) - stats.norm.logpdf(target, outside, spread)
    np.testing.assert_allclose(found.numpy(), naive.sum(1), rtol=1e-9)


def test_differences_that_are_noise_are_shrunk_and_real_ones_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    membership = draw_membership(500, 16, seed=0)
    noise = torch.randn(500, 16, 2, generator=generator, dtype=torch.float64)
    own = 3 * torch.randn(500, 1, generator=generator, dtype=torch.float64)
    effect = membership.T[:, :, None].double() * torch.cat([torch.full_like(own, 0.2), own], dim=1)[:, None]
    usual = moments(noise + effect, membership)
    drawn = shrunk(usual, membership)
    difference = drawn.inside - drawn.outside
    assert float(difference[:, 0].std()) < 0.15
    assert float(difference[:, 0].mean()) == pytest.approx(0.2, abs=0.06)
    torch.testing.assert_close(difference[:, 1:], own, atol=2.0, rtol=0)
    assert float(difference[:, 1].std()) > 2.5
    torch.testing.assert_close(drawn.inside + drawn.outside, usual.inside + usual.outside)


def test_what_all_patients_share_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    targets = torch.nn.functional.one_hot(torch.arange(50) % 2, 2).double()
    other_scale = 7 * usual + targets[:, :1] * 3 - 1
    torch.testing.assert_close(aligned(other_scale, usual, targets), usual)
    own = torch.zeros_like(usual)
    own[7] = 1.0
    changed = aligned(other_scale + own, usual, targets) - usual
    assert float(changed[7]) > 0.8
    assert int(changed.argmax()) == 7


@pytest.mark.parametrize("multilabel", [False, True])
def test_observations_are_those_of_plain_formulas(multilabel: bool) -> None:
    pool = blobs(10, per_patient=2)
    pool = _multilabel(pool) if multilabel else pool
    network = random_network(pool.task, (1, 16, 16), 4, 0, Compute())
    released, labels = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)), pool.targets[:6]
    found = Observer(pool, [network], Compute())(released, labels).numpy()
    features = network.features(pool.images).double().numpy()
    centre = features.mean(0)
    scale = np.sqrt(((features - centre) ** 2).sum(1).mean())
    ours, theirs = (features - centre) / scale, (network.features(released).double().numpy() - centre) / scale
    truth, y = pool.targets.double().numpy(), labels.double().numpy()
    means = [np.average(theirs, axis=0, weights=y[:, c]) for c in range(2)]
    within = ours - truth @ np.linalg.lstsq(truth, ours, rcond=None)[0]
    covariance = within.T @ within / len(within)
    typical = np.trace(covariance) / len(covariance)
    inverse = typical * np.linalg.inv(covariance + typical * np.eye(len(covariance)))
    centred = y - y.mean(0)
    gram = theirs @ theirs.T
    alpha = np.linalg.solve(gram + 0.01 * np.diag(gram).mean() * np.eye(6), centred)  # the dual form
    for patient, name in enumerate(pool.unique_patients):
        mine = [i for i, p in enumerate(pool.patients) if p == name]
        rows = np.array(
            [
                [
                    sum(truth[i, c] * (ours[i] @ means[c]) for c in range(2)),
                    sum(truth[i, c] * (ours[i] @ inverse @ means[c]) for c in range(2)),
                    np.mean((2 * truth[i] - 1) * (ours[i] @ theirs.T @ alpha)),
                    -np.log(min(np.linalg.norm(ours[i] - t) for t in theirs) + 1e-6),
                ]
                for i in mine
            ]
        )
        assert (TRACING, WHITENED, MARGIN, NEARNESS) == (0, 1, 2, 3)
        np.testing.assert_allclose(found[patient], rows.mean(0), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("test", ["lira", "rmia"])
def test_the_positive_control_is_caught(test: str) -> None:
    members, others, reference = blobs(40), blobs(60, seed=1, first=100), blobs(60, seed=2, first=300)
    attack: MembershipAttack = Shadow(shadows=16, test=test, distillation=ShadowDistillation(networks=8, most=8))
    candidates = ImageSet(
        images=torch.cat([members.images, others.images]),
        targets=torch.cat([members.targets, others.targets]),
        patients=members.patients + others.patients,
        task=members.task,
    )
    prepared = attack.prepare(candidates, reference, ipc=2, seed=0, compute=Compute(), progress=Progress())
    guilty = attack.guilty(members, others, reference, seed=0)
    assert len(guilty.members) == 10
    scores = prepared.score(guilty.release, guilty.candidates)
    is_member = np.array([name in guilty.members for name in guilty.candidates.unique_patients])
    area = statistics.auroc(scores[is_member], scores[~is_member])
    print(f"\n{test}: {area}")
    assert area.low > (0.6 if test == "lira" else 0.5)
    assert area.value >= attack.wanted


def test_a_release_of_none_of_them_says_nothing_and_the_score_never_looks_at_membership() -> None:
    candidates, reference = blobs(80), blobs(40, seed=2, first=300)
    prepared = _prepared(QUICK, candidates, reference)
    covered = []
    for seed in range(8):
        release = Exposed.of_images(blobs(10, seed=50 + seed, first=900))
        scores = prepared.score(release, candidates)
        coins = np.random.default_rng(seed).permutation(80) < 40
        area = statistics.auroc(scores[coins], scores[~coins])
        covered.append(area.low <= 0.5 <= area.high)
    assert sum(covered) >= 6
    some = candidates.of_patients(set(candidates.unique_patients[5:30]))
    np.testing.assert_array_equal(prepared.score(release, some), scores[5:30])
    again = _prepared(QUICK, candidates, reference).score(release, candidates)
    np.testing.assert_array_equal(again, scores)


def test_what_cannot_be_done_is_said() -> None:
    real = blobs(20)
    with pytest.raises(ConfigError, match="even number of shadows"):
        Shadow(shadows=7)
    with pytest.raises(ConfigError, match="lira, rmia"):
        Shadow(test="loss")
    with pytest.raises(ConfigError, match="iterations"):
        ShadowDistillation(iterations=0)
    with pytest.raises(DataError, match="both among the candidates"):
        _prepared(QUICK, real, real)
    prepared = _prepared(QUICK, real, blobs(10, seed=1, first=100))
    with pytest.raises(DataError, match="know nothing"):
        prepared.score(Exposed.of_images(real), blobs(4, first=900))
    with pytest.raises(DataError, match="shape"):
        prepared.score(replace(Exposed.of_images(real), images=torch.rand(40, 3, 16, 16)), real)
    rare = replace(real, targets=torch.tensor([[1.0, 0.0]] * 38 + [[0.0, 1.0]] * 2))
    with pytest.raises(DataError, match="'class1' has 2 images"):
        _prepared(QUICK, rare, blobs(1, seed=1, first=100))


def test_usual_moments_keep_their_shape() -> None:
    usual = Moments(inside=torch.ones(3, 2), outside=torch.zeros(3, 2), variance=torch.ones(2))
    assert likelihood_ratio(torch.full((3, 2), 0.5), usual).abs().max() == 0
