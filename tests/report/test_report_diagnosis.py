"""What the page says of the diagnosis, in sentences, tables and plots, and of the way of the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from example_release import (
    THREE,
    TWO,
    arm,
    cohort_summary,
    diagnostic_report,
    distilled_set,
    estimate,
    full_diagnostic_report,
    moments,
)
from test_report_page import Page, rendered, report

from medistill.core.reports import DiagnosticReport, Difference, Estimate, SubgroupResult
from medistill.core.task import TaskKind
from medistill.evaluate.arms import ARMS
from medistill.evaluate.metrics import METRICS
from medistill.ingest.build import _CHOICES
from medistill.report import wording
from medistill.report.diagnosis import diagnosis_section
from medistill.report.disclosure import PUBLIC_PROFILE_KEYS, Bin, joined_bins
from medistill.report.flow import PREPARATION
from medistill.report.reliability import reliability_chart

MADE = distilled_set(TWO)
FULL = full_diagnostic_report(MADE)


def words(found: DiagnosticReport, *, kind: TaskKind = TaskKind.BINARY) -> str:
    return Page(diagnosis_section(found, released=len(MADE), kind=kind)).words


def table(source: str, caption: str) -> list[str]:
    """Rows of the table with this caption, as words."""
    start = source.index(f"<caption>{caption}")
    body = source[start : source.index("</table>", start)].split("<tbody>")[1]
    return [Page(row).words for row in re.findall(r"<tr[ >].*?</tr>", body, re.S)]


# -- in words --------------------------------------------------------------------------------------------------


def test_a_plain_sentence_comes_first() -> None:
    assert words(FULL).startswith(
        "Trained on the release, the network convnet reaches 95.9 % of what all real images reach on test "
        "patients (AUROC 0.912 [0.882, 0.942] against 0.951 [0.921, 0.981]; difference −0.039 [−0.084, "
        "+0.006], p = 0.074)."
    )


def test_the_share_that_chance_would_reach_is_said() -> None:
    assert "Pure chance, an AUROC of 0.5, would already be 53 to 55 %." in words(FULL)  # .5 / .951, .5 / .911


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([arm("distilled", 20, 0.9)], "reaches AUROC 0.900 [0.870, 0.930] on test patients; real images were not"),
        ([arm("real", 4321, 0.9)], "No network that was trained on the release was judged by its AUROC."),
        ([], "No network that was trained on the release was judged by its AUROC."),
    ],
)
def test_what_was_not_measured_is_not_claimed(arms: Sequence[object], said: str) -> None:
    assert said in words(replace(diagnostic_report(MADE), arms=tuple(arms)))


def test_an_auroc_that_cannot_be_estimated_is_neither_drawn_nor_compared() -> None:
    unknown = Estimate(value=math.nan, low=0.0, high=1.0, confidence=0.95, n=30)
    arms = tuple(replace(one, metrics={**one.metrics, "auroc": unknown}) for one in diagnostic_report(MADE).arms)
    source = diagnosis_section(
        replace(diagnostic_report(MADE), arms=arms), released=len(MADE), kind=TaskKind.BINARY
    )
    assert 'class="dot"' not in source
    assert "nan" not in source
    assert "No network" in source


def test_every_arm_and_metric_of_an_evaluation_has_words() -> None:
    assert set(ARMS) <= wording.ARMS.keys()
    assert set(METRICS) <= wording.METRICS.keys()


def test_records_without_the_new_fields_are_still_shown() -> None:
    values = json.loads(json.dumps(diagnostic_report(MADE).to_json()))
    for added in ("differences", "subgroups"):
        del values[added]
    for one in values["arms"]:
        for added in ("reliability", "by_patient", "class_auroc"):
            del one[added]
    source = report(MADE, diagnosis=DiagnosticReport.from_json(values))
    assert "AUROC 0.912 [0.882, 0.942] against 0.951 [0.921, 0.981])." in Page(source).words
    for absent in ("compared on the same patients", "Calibration", "Decisions per patient", "Not everything"):
        assert absent not in source


def test_a_record_from_a_file_gives_the_same_page() -> None:
    again = DiagnosticReport.from_json(json.loads(json.dumps(FULL.to_json())))
    assert report(MADE, diagnosis=again, moments=moments(MADE)) == rendered("everything measured")


def test_of_further_networks_it_is_said_what_is_left_out() -> None:
    assert words(FULL).count("Calibration: can the probabilities be believed?") == 2  # two splits of the first
    assert "Of the network convnet alone: calibration" in words(FULL)
    alone = full_diagnostic_report(MADE, networks=("convnet",))
    assert "Of the network" not in words(alone)
    assert "Of the training sets real and distilled alone" in words(alone)


# -- differences -----------------------------------------------------------------------------------------------


def test_every_kind_of_difference_is_explained_in_its_table() -> None:
    source = rendered("everything measured")
    assert table(source, "Against all real images")[6] == (
        "distilled minus real AUROC −0.039 [−0.084, +0.006] 0.074 0.081 not told apart"
    )
    assert table(source, "Label recovery")[1] == (
        "real minus distilled hard balanced accuracy +0.065 [+0.020, +0.110] < 0.001 – real better"
    )
    assert table(source, "Improvement over random")[0] == (
        "distilled minus random soft AUROC +0.111 [+0.066, +0.156] < 0.001 0.081 distilled better"
    )
    assert source.count("both with hard labels (as DD-Ranking defines it, arXiv 2505.13300)") == 4


@pytest.mark.parametrize(
    ("metric", "value", "reading"),
    [
        ("auroc", 0.1, "distilled better"),
        ("auroc", -0.1, "real better"),
        ("ece", 0.1, "real better"),
        ("ece", -0.1, "distilled better"),
        ("ece", 0.01, "not told apart"),
        ("auroc", math.nan, "not estimable"),
    ],
)
def test_a_difference_is_read_by_its_interval_and_its_direction(metric: str, value: float, reading: str) -> None:
    low, high = (0.0, 1.0) if math.isnan(value) else (value - 0.05, value + 0.05)
    one = Difference(
        kind="something_new",
        arm="distilled",
        against="real",
        network="convnet",
        split="test",
        metric=metric,
        value=Estimate(value=value, low=low, high=high, confidence=0.95, n=100),
        p_value=0.5,
    )
    found = words(replace(diagnostic_report(MADE), differences=(one,)))
    assert "something new" in found
    assert re.search(rf"0.500 {reading}", found)
    assert "DeLong" not in found


# -- calibration -----------------------------------------------------------------------------------------------


def _naive(bins: Sequence[tuple[float, float, float]], patients: int) -> list[list[int]]:
    """Numbers of the bins that belong together, by trying every cut from the left."""
    groups: list[list[int]] = []
    start = 0
    while start < len(bins):
        ends = [
            e for e in range(start + 1, len(bins) + 1) if sum(b[2] for b in bins[start:e]) * patients > 9.9999999
        ]
        if not ends:
            if groups:
                groups[-1] += range(start, len(bins))
            break
        groups.append(list(range(start, ends[0])))
        start = ends[0]
    return groups


@pytest.mark.parametrize("patients", [5, 10, 23, 60, 400])
@pytest.mark.parametrize("seed", range(5))
def test_joined_bins_hold_ten_patients_and_lose_nothing(patients: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(15, 0.3))
    bins = [(float((i + 0.5) / 15), float(generator.random()), float(share)) for i, share in enumerate(shares)]
    joined = joined_bins(bins, patients=patients)
    groups = _naive(bins, patients)
    assert len(joined) == len(groups)
    for one, group in zip(joined, groups, strict=True):
        own = np.array([bins[i] for i in group])
        assert one.share == pytest.approx(own[:, 2].sum())
        assert one.share * patients >= 9.999
        assert one.predicted == pytest.approx(np.average(own[:, 0], weights=own[:, 2]))
        assert one.observed == pytest.approx(np.average(own[:, 1], weights=own[:, 2]))


def test_dots_of_the_reliability_plot_are_where_they_belong() -> None:
    drawn = reliability_chart(
        (Bin(predicted=0.0, observed=1.0, share=0.25), Bin(predicted=1.0, observed=0.5, share=0.75)),
        label='<b> & "quoted"',
    )
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)">', drawn)
    (left, top, small), (right, middle, large) = ([float(n) for n in dot] for dot in found)
    ideal = re.search(r'class="ideal" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawn)
    assert ideal
    assert [float(n) for n in ideal.groups()] == [left, 2 * middle - top, right, top]
    assert (large / small) ** 2 == pytest.approx(3, rel=0.05)
    assert 'aria-label="&lt;b&gt; &amp; &quot;quoted&quot;"' in drawn
    assert "predicted 1.00, observed 0.50, 75 % of predictions" in drawn


def test_the_plot_says_its_numbers_and_the_table_shows_them() -> None:
    arms = tuple(
        replace(one, reliability=((0.1, 0.2, 0.6), (0.5, 0.5, 0.03), (0.9, 0.7, 0.37))) for one in FULL.arms
    )
    source = report(MADE, diagnosis=replace(FULL, arms=arms))
    label = next(a["aria-label"] for a in Page(source).of("svg") if "of distilled:" in str(a["aria-label"]))
    assert label == (
        "Reliability of distilled: predicted 0.10, observed 0.20, 60 % of predictions; predicted 0.87, observed "
        "0.69, 40 % of predictions. ECE 0.088 [0.073, 0.103]"
    )  # 217 patients: the 3 % in the middle are fewer than ten and join the next bin
    assert table(source, "The numbers of these plots")[4] == "distilled 0.10 → 0.20 (60 %); 0.87 → 0.69 (40 %)"


def test_too_few_patients_for_any_bin() -> None:
    arms = tuple(replace(one, metrics={"ece": estimate(0.1, n=9)}) for one in FULL.arms)
    assert "distilled too few patients to be shown" in words(replace(FULL, arms=arms))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (TaskKind.BINARY, "Predicted is the probability of pneumonia,"),
        (
            TaskKind.MULTICLASS,
            "Predicted is the probability of the likeliest class, observed how often it is right.",
        ),
        (TaskKind.MULTILABEL, "all classes together."),
    ],
)
def test_what_is_predicted_depends_on_the_task(kind: TaskKind, said: str) -> None:
    assert said in words(FULL, kind=kind)


# -- patients, groups, classes ---------------------------------------------------------------------------------


def test_decisions_per_patient_stand_beside_those_of_real_images() -> None:
    rows = table(rendered("everything measured"), "Figures of whole patients")
    assert [row.split()[:2] for row in rows] == [
        [name, rule] for name in ("real", "distilled") for rule in ("mean", "max", "vote")
    ]
    assert rows[3].startswith("distilled mean 0.924 [0.874, 0.974]")


def test_groups_are_shown_with_their_warnings_and_small_ones_are_not_shown() -> None:
    source = rendered("everything measured")
    rows = table(source, "Groups of patients")
    assert rows[0] == (
        "Sex: F real at least 190 0.950 [0.914, 0.986] 0.870 [0.834, 0.906] 0.900 [0.864, 0.936] "
        "0.050 [0.038, 0.062]"
    )
    assert rows[4] == "Sex: not stated fewer than 10 patients: not shown"
    assert rows[5].startswith("Age: 0-17 real at least 30")
    assert rows[5].endswith("few patients: differences may be chance")
    assert "View: AP real at least 50 not estimable" in " ".join(rows)
    assert not any("random" in row for row in rows)
    for exact in ("197", "203", "123", "291", "346"):
        assert exact not in Page(source).words


def test_a_group_without_figures_and_without_a_reason_is_said_to_be_small() -> None:
    hidden = SubgroupResult(
        arm="distilled",
        network="convnet",
        split="test",
        attribute="<i>dose</i>",
        group="<b>low</b>",
        patients=4,
        metrics={},
    )
    found = replace(diagnostic_report(MADE), subgroups=(hidden,))
    assert "<i>dose</i>: <b>low</b> too few patients to be shown" in words(found)
    assert "<b>low" not in diagnosis_section(found, released=20, kind=TaskKind.BINARY)


def test_many_small_groups_are_one_line_and_their_axis_reaches_every_interval() -> None:
    hidden = [one for one in FULL.subgroups if not one.metrics]
    sites = [replace(one, attribute="site", group=f"site {i}") for i in range(3, 60) for one in hidden]
    low = next(one for one in FULL.subgroups if one.group == "site 2" and one.arm == "real")
    low = replace(low, metrics={"auroc": estimate(0.4, 0.19)}, group="site 60")
    found = replace(FULL, subgroups=(*FULL.subgroups, *sites, low))
    assert words(found).count("57 groups: fewer than 10 patients: not shown") == 1
    assert "0.400 [0.210, 0.590] 0.2 0.3 0.4 0.5" in words(found)


def test_classes_are_rows_and_training_sets_are_columns() -> None:
    rows = table(rendered("everything measured, three classes"), "AUROC of every class against all others")
    assert [row.split(" 0.")[0] for row in rows] == list(THREE)
    assert all(len(re.findall(r"\[", row)) == 6 for row in rows)


# -- data flow -------------------------------------------------------------------------------------------------


def test_the_way_of_the_data_ends_with_what_leaves() -> None:
    found = Page(report(MADE)).words
    assert (
        "Kept out at least 140 files, by reason below. Taken in at least 6360 images of at least 3000 patients. "
        "Divided By patient: each is in exactly one part, with all images. Distilled From the part “train” alone: "
        "at least 4320 images of at least 1980 patients. Leaves 20 distilled images with soft labels, how they "
        "were made, and the figures on this page." in found
    )


def test_an_unknown_or_empty_quarantine_is_told_apart() -> None:
    known, unknown = cohort_summary(MADE), cohort_summary(MADE)
    known["quarantine"] = {}
    del unknown["quarantine"]
    assert "Kept out No file." in Page(report(MADE, cohort=known)).words
    assert "Kept out" not in report(MADE, cohort=unknown)
    nothing = Page(report(MADE, cohort=None)).words
    assert "No summary of the cohort was given." in nothing
    assert "Leaves 20 distilled images" in nothing


def test_every_public_setting_of_the_preparation_is_in_words() -> None:
    assert PREPARATION.keys() == set(PUBLIC_PROFILE_KEYS)
    for name, (_, meanings) in PREPARATION.items():
        assert set(meanings) == set(_CHOICES.get(name, ()))
    rows = table(report(MADE), "How the images were prepared")
    assert rows == [
        "Side length in pixels 64",
        "Images that are not square black borders added",
        "Grey values by the window in the file",
    ]


def test_parts_are_columns_and_every_count_is_a_row() -> None:
    source = report(MADE)
    assert table(source, "Parts of the cohort") == [
        "images at least 4320 at least 610 at least 610 at least 800",
        "patients at least 1980 at least 300 at least 300 at least 400",
        "images: no finding at least 2160 at least 300 at least 300 at least 400",
        "images: pneumonia at least 2160 at least 300 at least 300 at least 400",
    ]
