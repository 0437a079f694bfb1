import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_release import OPEN, PRIVATE, THREE, TWO, audit_report, cohort_summary, distilled_set, estimate
from PIL import Image

from medistill.errors import DataError
from medistill.report.contact_sheet import contact_sheet
from medistill.report.disclosure import public_audit, public_cohort, public_commands, rounded
from medistill.report.plots import auroc_axis, full_axis, track
from medistill.report.png import encode, picture
from medistill.report.wording import at_most, best_guess, interval, metric_label, p_value


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (9, 0), (10, 10), (19, 10), (1987, 1980)])
def test_counts_are_rounded_down(count, shown):
    assert rounded(count) == shown


def test_only_listed_settings_of_a_profile_are_public():
    public = public_cohort(cohort_summary(distilled_set(TWO)))
    assert public["profile"] == {"size": 64, "fit": "pad", "intensity": "voi"}
    assert public["splits"]["train"]["patients"] == 1980
    assert public["quarantine"] == {"burned_in_text": 110, "no_patient": 0, "undecodable": 20}


def test_unknown_part_of_a_cohort_is_refused():
    with pytest.raises(DataError, match="another part"):
        public_cohort({"patients": ["x"]})


def test_public_audit_has_no_exact_number_of_patients():
    report = audit_report(distilled_set(TWO))
    values = public_audit(replace(report, outcomes=(replace(report.outcomes[1], p_value=math.nan),)))
    assert (values["members"], values["non_members"]) == (210, 210)
    assert values["outcomes"][0]["auroc"]["n"] == 210
    assert values["outcomes"][0]["p_value"] is None


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("medistill run configs/a.yaml", "medistill run configs/a.yaml"),
        ("medistill run ~/a.yaml", "medistill run PATH"),
        ("medistill run 'C:\\ward\\a.yaml'", "medistill run 'PATH'"),
        ("medistill run --out=/srv/x", "medistill run --out=PATH"),
        ("medistill ingest dicom+tls://pacs:104/AE", "medistill ingest ADDRESS"),
    ],
)
def test_places_in_commands_are_masked(command, shown):
    assert public_commands((command,)) == (shown,)


@pytest.mark.parametrize(("epsilon", "bound"), [(1.0, 0.7310609), (3.0, 0.9525746)])
def test_best_guess_is_the_bound_of_the_definition(epsilon, bound):
    assert best_guess(replace(PRIVATE, epsilon=epsilon)) == pytest.approx(bound, abs=1e-5)


def test_best_guess_without_a_guarantee_is_certain():
    assert best_guess(OPEN) == 1.0
    assert best_guess(replace(PRIVATE, epsilon=1e6)) == 1.0


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.5, "50.0 %"), (0.95257, "95.3 %"), (0.99995, "99.995 %"), (0.999999, "99.9999 %"), (1.0, "100 %")],
)
def test_a_bound_is_rounded_up_but_not_to_certainty(share, shown):
    assert at_most(share) == shown


def test_figures_in_words():
    assert p_value(1e-9) == "< 0.001"
    assert p_value(math.nan) == "not estimable"
    assert interval(None) == "not estimable"
    assert interval(estimate(0.5)) == "0.500 [0.460, 0.540]"
    assert metric_label("sensitivity") == "diagnostic sensitivity"
    assert metric_label("brier_score") == "brier score"


def test_tracks_lie_inside_their_axis():
    axis = full_axis()
    placed = track(estimate(0.5, 0.1), axis)
    assert (placed.left, placed.dot, placed.width) == (40.0, 50.0, 20.0)
    assert axis.position(-3) == 0
    assert axis.position(7) == 100


@pytest.mark.parametrize(("value", "low"), [(0.9, 0.5), (0.5, 0.4), (0.04, 0.0)])
def test_axis_begins_at_chance_or_below_the_lowest_interval(value, low):
    axis = auroc_axis([estimate(value), estimate(0.95)])
    assert axis.low == low
    assert (axis.ticks[0], axis.ticks[-1]) == (low, 1.0)


def test_axis_without_estimates():
    assert auroc_axis([]).low == 0.5


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((1, 4, 6), "L"), ((3, 4, 6), "RGB"), ((2, 4, 6), "L")],
)
def test_picture_of_any_image(shape, mode):
    drawn = picture(torch.full(shape, 0.5))
    assert (drawn.mode, drawn.size) == (mode, (6, 4))
    assert set(drawn.tobytes()) == {128}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_picture_of_a_volume_shows_three_planes(channels, mode):
    volume = torch.zeros(channels, 5, 4, 6)
    volume[:, 2], volume[:, 0, 2], volume[:, 0, 0, 3] = 0.2, 0.4, 0.6
    drawn = picture(volume)
    assert (drawn.mode, drawn.size) == (mode, (6 + 1 + 6 + 1 + 4, 5))
    grey = np.asarray(drawn.convert("L"))
    assert (grey[:4, :6] == 51).all()  # across the first axis
    assert (grey[:, 7:13] == np.array([0, 0, 51, 0, 102])[:, None]).all()  # the first axis points up
    assert grey[4, 14:].tolist() == [153, 0, 102, 0]
    assert (grey[:, 6] == 255).all()


def test_png_is_exact_and_repeatable():
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    png = encode(picture(image))
    assert png == encode(picture(image))
    back = Image.open(io.BytesIO(png))
    assert not back.info
    assert back.tobytes() == (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()


def test_picture_of_a_flat_tensor_is_refused():
    with pytest.raises(DataError, match="2 axes"):
        picture(torch.zeros(4, 4))


def test_contact_sheet_places_every_image():
    distilled = distilled_set(THREE, ipc=2, size=16)
    captions = [f"image {i} with a caption that is far too long" for i in range(6)]
    png = contact_sheet(distilled.images, columns=4, captions=captions)
    assert png == contact_sheet(distilled.images, columns=4, captions=captions)
    sheet = Image.open(io.BytesIO(png))
    assert sheet.size == (4 * 102 + 6, 2 * 118 + 6)
    tile = picture(distilled.images[5]).resize((96, 96), Image.Resampling.NEAREST)
    assert sheet.crop((6 + 102, 6 + 118, 102 + 102, 102 + 118)).tobytes() == tile.tobytes()


def test_contact_sheet_without_captions_and_of_large_colour_images():
    sheet = Image.open(io.BytesIO(contact_sheet(torch.rand(1, 3, 120, 100), columns=5)))
    assert (sheet.mode, sheet.size) == ("RGB", (112, 132))


@pytest.mark.parametrize(("count", "columns", "captions"), [(0, 2, ()), (2, 0, ()), (2, 2, ("one",))])
def test_contact_sheet_refuses_what_it_cannot_draw(count, columns, captions):
    with pytest.raises(DataError):
        contact_sheet(torch.zeros(count, 1, 8, 8), columns=columns, captions=captions)
