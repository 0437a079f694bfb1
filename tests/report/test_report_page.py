import re
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from example_release import (
    OPEN,
    PRIVATE,
    THREE,
    TWO,
    audit_report,
    cohort_summary,
    diagnostic_report,
    distilled_set,
    full_diagnostic_report,
    moments,
    snapshots,
)

from medistill.core.distilled import DistilledSet
from medistill.core.reports import Verdict
from medistill.errors import DataError
from medistill.report.page import render_report, three_lines

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a check of accessibility needs to know of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def of(self, *names):
        return [attrs for tag, attrs in self.tags if tag in names]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def report(distilled: DistilledSet, verdict: Verdict | None = Verdict.PASS, **changed) -> str:
    arguments = {
        "distilled": distilled,
        "audit": None if verdict is None else audit_report(distilled, verdict),
        "diagnosis": diagnostic_report(distilled),
        "cohort": cohort_summary(distilled),
        "snapshots": snapshots(distilled),
        "commands": ("medistill run configs/phantom.yaml",),
    }
    return render_report(**{**arguments, **changed})


def everything(names, **settings):
    distilled = distilled_set(names, **settings)
    return report(distilled, diagnosis=full_diagnostic_report(distilled), moments=moments(distilled))


CASES = {
    "two classes": lambda: report(distilled_set(TWO)),
    "three classes, colour, private": lambda: report(distilled_set(THREE, ipc=7, channels=3, privacy=PRIVATE)),
    "starts from real, invalid, forced": lambda: report(
        distilled_set(TWO, init="real"), Verdict.INVALID, forced_reason="A comparison."
    ),
    "everything measured": lambda: everything(TWO),
    "everything measured, three classes": lambda: everything(THREE, ipc=7, channels=3, privacy=PRIVATE),
    "nothing measured": lambda: report(
        distilled_set(TWO), None, diagnosis=None, cohort=None, snapshots=None, commands=()
    ),
}


@pytest.fixture(params=CASES, name="source")
def _source(request):
    return rendered(request.param)


@cache
def rendered(case):
    return CASES[case]()


def test_nothing_is_fetched(source):
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for attrs in (attrs for _, attrs in page.tags):
        assert not any(name.startswith("on") for name in attrs)
        if "src" in attrs:
            assert re.match(r"data:image/(png|jpeg);base64,", attrs["src"])
        if "href" in attrs:
            assert attrs["href"].startswith("#")
    assert "http://" not in source
    assert "https://" not in source
    assert not re.search(r"url\(|@import", source)
    policy = [attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_page_is_accessible(source):
    page = Page(source)
    assert page.of("html")[0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs in page.of("img"))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(identifiers)) == len(identifiers)
    for _, attrs in page.tags:
        for pointed in (attrs.get("aria-labelledby"), (attrs.get("href") or "")[1:]):
            assert not pointed or pointed in identifiers
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    assert all(attrs.get("aria-label") for attrs in (a for _, a in page.tags) if attrs.get("role") == "img")
    assert not page.open


def test_every_table_row_has_a_header_cell(source):
    for row in re.findall(r"<tr[ >].*?</tr>", source, re.S):
        assert "<th scope=" in row


def test_words_that_promise_too_much_do_not_appear(source):
    words = Page(source).words.lower()
    assert "anonym" not in words
    assert re.search(r"(?<!diagnostic )sensitivity", words) is None
    assert "verified" not in words
    assert "safe to" not in words


def test_same_arguments_give_the_same_page(source, request):
    again = CASES[request.node.callspec.params["source"]]()
    assert again == source


def test_guarantee_and_measurement_are_apart():
    source = report(distilled_set(THREE, ipc=7, privacy=PRIVATE))
    proved = source.split("<h3>What is proved</h3>")[1].split("<h3>What was measured</h3>")[0]
    measured = source.split("<h3>What was measured</h3>")[1].split("<h3>What was not tested</h3>")[0]
    assert "AUROC" not in proved
    assert "epsilon" not in measured.lower()
    assert "95.3 %" in proved  # (e^3 + 1e-5) / (e^3 + 1) = 0.952575, a bound is rounded up


def test_a_rate_below_the_resolution_is_not_a_number():
    words = Page(report(distilled_set(TWO))).words
    assert "Members found at 1 % false alarms (TPR) not estimable" in words


def test_controls_stand_beside_every_attack():
    words = Page(report(distilled_set(TWO), Verdict.INVALID)).words
    assert words.count("Controls: does this attack work?") == 3
    assert "release of all real images AUROC ≥ 0.99 AUROC 0.61 failed" in words
    assert "does not count Control failed: release of all real images" in words


@pytest.mark.parametrize(
    ("verdict", "title"),
    [
        (None, "Not audited"),
        (Verdict.FAIL, "Audit verdict: FAIL"),
        (Verdict.INVALID, "Audit verdict: INVALID"),
        (Verdict.NOT_ESTIMABLE, "Audit verdict: NOT ESTIMABLE"),
    ],
)
def test_a_verdict_that_is_not_pass_is_a_warning(verdict, title):
    source = report(distilled_set(TWO, privacy=PRIVATE), verdict)
    summary = source.split('<section id="images"')[0]
    assert f"<strong>{title}</strong>" in summary


def test_every_reason_for_care_is_a_warning():
    source = report(distilled_set(TWO, init="real"), forced_reason="Method comparison only.")
    titles = re.findall(r"<strong>(.*?)</strong>", source.split('<section id="images"')[0])
    assert titles == [
        "Released without regard to the gate",
        "Starts from real images",
        "No formal guarantee",
    ]
    assert "Method comparison only." in source


def test_stages_that_began_as_patients_are_withheld():
    distilled = distilled_set(TWO, init="real")
    real = report(distilled)
    assert "the earlier the moment, the more of a patient" in Page(real).words
    assert len(Page(real).of("img")) == len(distilled)


def test_stages_follow_the_recipe_even_when_names_were_sorted():
    distilled = distilled_set(TWO)
    stages = {name: distilled.images for name in ("distribution_matching", "kernel_ridge", "start")}
    words = Page(report(distilled, snapshots=stages)).words
    assert "before the first step distribution matching kernel ridge 3. Privacy" in words
    assert "images began as noise" in words
    del stages["start"]
    assert "images began as noise" not in Page(report(distilled, snapshots=stages)).words


def test_stages_of_another_set_are_refused():
    with pytest.raises(DataError, match="snapshots of 20"):
        report(distilled_set(TWO), snapshots={"start": torch.zeros(3, 1, 8, 8)})


def test_hostile_names_are_text():
    hostile = ("<script>alert(1)</script>", '" onerror="alert(2)')
    distilled = distilled_set(hostile)
    source = report(
        distilled, forced_reason="</style><img src=x onerror=alert(3)>", name="<b>x</b>", licence="<i>y</i>"
    )
    page = Page(source)
    assert not page.of("script", "b", "i")
    assert all(not any(name.startswith("on") for name in attrs) for _, attrs in page.tags)
    assert hostile[0] in page.words


def test_counts_of_real_patients_are_rounded_down_to_tens():
    words = Page(report(distilled_set(TWO))).words
    assert "at least 1980" in words
    assert "fewer than 10" in words
    for exact in ("1987", "4321", "217", "213", "403", "6361"):
        assert exact not in words


def test_places_in_commands_are_masked():
    source = report(
        distilled_set(TWO), commands=("medistill ingest /mnt/ward/smith --out=/srv/x https://pacs.example/q",)
    )
    assert "medistill ingest PATH --out=PATH ADDRESS" in source
    assert "smith" not in source


def test_three_lines_say_what_it_is_what_is_guaranteed_and_what_was_measured():
    distilled = distilled_set(TWO, privacy=PRIVATE)
    what, guaranteed, measured = three_lines(distilled, audit_report(distilled), diagnostic_report(distilled))
    assert what == (
        "20 synthetic images with soft labels (10 for each of 2 classes: no finding, pneumonia), made by "
        "distribution matching, then kernel ridge to train a diagnostic model."
    )
    assert "epsilon 3" in guaranteed
    assert "AUROC" not in guaranteed
    assert measured == (
        "Audit PASS: no leak beyond the policy's limits found at this power "
        "(3 attacks on at least 210 members and at least 210 other patients, able to see "
        "an AUROC of 0.58 or more); a model trained on it reaches AUROC 0.912 [0.882, 0.942] on test patients, "
        "against 0.951 [0.921, 0.981] with all real images."
    )


def test_three_lines_admit_what_was_not_done():
    distilled = distilled_set(("a\nb", "c\x1b[31m"), privacy=OPEN)
    what, guaranteed, measured = three_lines(distilled, None, None)
    assert "\n" not in what
    assert "\x1b" not in what
    assert guaranteed.startswith("No formal privacy guarantee")
    assert "No attack was run" in measured
    assert "was not measured" in measured


def test_large_sets_show_the_first_images_of_each_class_and_say_so():
    distilled = distilled_set(TWO, ipc=70, size=8)
    page = Page(report(distilled, snapshots=None))
    assert len(page.of("img")) == 120
    assert "The first 60 of 70 images" in page.words


def test_many_classes_show_the_largest_shares():
    distilled = distilled_set(tuple(f"class {i}" for i in range(8)), ipc=1, size=8)
    assert "and 3 smaller" in Page(report(distilled, snapshots=None)).words
