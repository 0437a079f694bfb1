import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from example_release import PRIVATE, TWO, audit_report, distilled_set
from torch.utils.data import DataLoader

from medistill.core.reports import Verdict
from medistill.errors import ReleaseError
from medistill.release.folder import write_release
from medistill.release.seal import is_inside, parse_seal, seal
from medistill.release.verify import load_release, verify_release


@pytest.fixture(scope="module", name="original")
def _original(tmp_path_factory):
    distilled = distilled_set(TWO, ipc=2, privacy=PRIVATE)
    return write_release(
        tmp_path_factory.mktemp("sealed") / "release",
        distilled=distilled,
        audit=audit_report(distilled),
        diagnosis=None,
        cohort=None,
        snapshots=None,
        commands=(),
    )


@pytest.fixture(name="release")
def _release(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "release"))


def reseal(release: Path) -> None:
    files = {
        p.relative_to(release).as_posix(): p.read_bytes()
        for p in release.rglob("*")
        if p.is_file() and p.name != "SHA256SUMS"
    }
    (release / "SHA256SUMS").write_bytes(seal(files))


def test_untouched_release(release):
    verified = verify_release(release)
    assert verified.files == 14
    assert verified.bytes == sum(p.stat().st_size for p in release.rglob("*") if p.is_file())
    assert verified.verdict is Verdict.PASS
    assert verified.privacy == PRIVATE.sentence
    assert verified.seal == hashlib.sha256((release / "SHA256SUMS").read_bytes()).hexdigest()


def test_loaded_release_is_a_dataset(release):
    loaded = load_release(release)
    expected = distilled_set(TWO, ipc=2, privacy=PRIVATE)
    assert len(loaded) == 4
    image, soft_label = loaded[3]
    assert torch.equal(image, expected.images[3])
    assert torch.equal(soft_label, expected.soft_labels[3])
    assert loaded.distilled.recipe == expected.recipe
    assert loaded.card["audit"]["verdict"] == "PASS"
    images, soft_labels = next(iter(DataLoader(loaded, batch_size=4)))
    assert (images.shape, soft_labels.shape) == ((4, 1, 16, 16), (4, 2))
    with pytest.raises(IndexError):
        loaded[4]


@pytest.mark.parametrize(
    "name", ["card.json", "images.safetensors", "images/0001.png", "report.html", "labels.csv"]
)
@pytest.mark.parametrize("position", [0, -1])
def test_changed_byte(release, name, position):
    content = bytearray((release / name).read_bytes())
    content[position] ^= 1
    (release / name).write_bytes(content)
    for check in (verify_release, load_release):
        with pytest.raises(ReleaseError, match=f"changed: {name}"):
            check(release)


def test_missing_file(release):
    (release / "labels.csv").unlink()
    with pytest.raises(ReleaseError, match=r"missing: labels\.csv"):
        verify_release(release)


def test_added_file_and_folder(release):
    (release / "images" / "9999.png").write_bytes(b"x")
    (release / ".hidden").write_text("x")
    (release / "more").mkdir()
    with pytest.raises(ReleaseError) as caught:
        verify_release(release)
    for problem in ("added: 'images/9999.png'", "added: '.hidden'", "added folder: 'more'"):
        assert problem in str(caught.value)


def test_all_problems_at_once(release):
    (release / "labels.csv").unlink()
    (release / "README.md").write_text("x")
    (release / "more").write_text("x")
    with pytest.raises(ReleaseError) as caught:
        verify_release(release)
    assert [line.strip(" -").split(":")[0] for line in str(caught.value).splitlines()[1:-1]] == [
        "added",
        "missing",
        "changed",
    ]


def test_link_to_the_same_bytes(release, tmp_path):
    shutil.move(release / "card.json", tmp_path / "card.json")
    (release / "card.json").symlink_to(tmp_path / "card.json")
    with pytest.raises(ReleaseError, match=r"a link, not a file: 'card\.json'"):
        verify_release(release)


def test_linked_folder(release, tmp_path):
    shutil.move(release / "images", tmp_path / "images")
    (release / "images").symlink_to(tmp_path / "images", target_is_directory=True)
    with pytest.raises(ReleaseError, match="a link, not a file: 'images'"):
        verify_release(release)


def test_linked_seal(release, tmp_path):
    shutil.move(release / "SHA256SUMS", tmp_path / "sums")
    (release / "SHA256SUMS").symlink_to(tmp_path / "sums")
    with pytest.raises(ReleaseError, match="Not a release"):
        verify_release(release)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_not_opened(release):
    (release / "labels.csv").unlink()
    os.mkfifo(release / "labels.csv")
    with pytest.raises(ReleaseError, match="not a plain file"):
        verify_release(release)


def test_folder_in_the_place_of_a_file(release):
    (release / "labels.csv").unlink()
    (release / "labels.csv").mkdir()
    with pytest.raises(ReleaseError, match="added folder"):
        verify_release(release)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../outside",
        "images/../../outside",
        "./card.json",
        "C:\\x",
        "a\\b",
        "images//0000.png",
        "~/x",
        "CON",
        "images/nul.png",
        "ends.",
        "a" * 200,
        "/".join("deep" for _ in range(20)),
    ],
)
def test_path_trick(release, name):
    outside = release.parent / "outside"
    outside.write_text("x")
    with (release / "SHA256SUMS").open("a") as sums:
        sums.write(f"{hashlib.sha256(b'x').hexdigest()}  {name}\n")
    with pytest.raises(ReleaseError, match="outside the release"):
        verify_release(release)
    assert not is_inside(name)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("  card", " *card"), "is not 'digest, two spaces, name'"),
        (lambda text: text.upper(), "is not 'digest, two spaces, name'"),
        (lambda text: text + "\n", "is not 'digest, two spaces, name'"),
        (lambda text: text[:-1], "does not end with a newline"),
        (lambda text: text + text.splitlines()[0] + "\n", "again"),
        (lambda text: text + "0" * 64 + "  SHA256SUMS\n", "names SHA256SUMS again"),
        (lambda text: text + "0" * 64 + "  SHA256SUMS.sig\n", "names SHA256SUMS.sig again"),
        (lambda text: text + "0" * 64 + "  Card.json\n", "names Card.json again, perhaps in another case"),
        (lambda text: text + "0" * 64 + "  IMAGES/9.png\n", "names IMAGES/9.png again"),
        (lambda text: text + "0" * 64 + "  images\n", "names images again"),
        (lambda text: text + "0" * 64 + "  card.json/x\n", "names card.json/x again"),
        (lambda text: "", "is not 'digest, two spaces, name'"),
        (
            lambda text: text + "\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "\n",
            "is not 'digest",
        ),
    ],
)
def test_malformed_seal(release, change, problem):
    sums = release / "SHA256SUMS"
    sums.write_text(change(sums.read_text()))
    with pytest.raises(ReleaseError, match=problem):
        verify_release(release)


def test_not_a_release(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ReleaseError, match="Not a release"):
            verify_release(place)


def test_seal_of_something_else_is_not_a_release(tmp_path):
    (tmp_path / "x").write_text("x")
    reseal(tmp_path)
    with pytest.raises(ReleaseError, match=r"missing: card\.json"):
        verify_release(tmp_path)


def test_resealed_card_must_agree_with_the_recipe(release):
    card = json.loads((release / "card.json").read_text())
    card["privacy"]["statement"]["epsilon"] = 0.1
    (release / "card.json").write_text(json.dumps(card))
    reseal(release)
    with pytest.raises(ReleaseError, match="different guarantees"):
        verify_release(release)


@pytest.mark.parametrize(
    "card", ['{"schema_version": 1}', '{"schema_version": 2}', "[]", "{", '{"schema_version": NaN}']
)
def test_resealed_nonsense_card(release, card):
    (release / "card.json").write_text(card)
    reseal(release)
    with pytest.raises(ReleaseError, match=r"card\.json"):
        load_release(release)


def test_seal_round_trips():
    files = {"b": b"2", "a/c.png": b"1"}
    digests, problems = parse_seal(seal(files))
    assert problems == ()
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
