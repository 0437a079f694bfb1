"""Made-up people and the DICOM headers that carry them, with an answer key of every planted value.

Names and places are strung together from syllables; nothing refers to a real person or hospital.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ComputedRadiographyImageStorage, XRayRadiofluoroscopicImageStorage

MARKER = "SYNTHETIC PHANTOM"
PRIVATE_CREATOR = "PHANTOM WORKS 1.0"
PRIVATE_GROUP = 0x0011
SYLLABLES = np.array(
    [
        *("ba", "bel", "cor", "dru", "fen", "gal", "hiv", "jor", "kel", "lum", "mor", "nax"),
        *("ori", "pel", "qua", "rin", "sul", "tav", "ul", "vex", "wim", "yor", "zan"),
    ]
)

HOSPITALS = ("Keltavul", "Morfenba", "Sulpeljor")


@dataclass(frozen=True, kw_only=True)
class Person:
    """A made-up patient and the made-up staff around."""

    patient_id: str
    name: str
    other_id: str
    birth: date
    sex: str
    address: str
    telephone: str
    institution: str
    physician: str
    radiologist: str
    operator: str
    station: str
    serial: str


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A made-up study of a patient."""

    study_uid: str
    earlier_study_uid: str
    day: date
    clock: str
    accession: str
    study_id: str
    procedure_id: str


@dataclass(frozen=True, kw_only=True)
class Planted:
    """An identifying value and where it was put: keywords or ``(gggg,eeee)`` joined by dots, ``[i]`` for items."""

    where: str
    value: str


@dataclass
class Header:
    """A data set under construction, with the list of what was planted in it."""

    dataset: Dataset
    meta: FileMetaDataset
    planted: list[Planted] = field(default_factory=list)

    def plant(self, target: Dataset, values: dict[str, Any], *, path: str = "") -> None:
        """Set elements of ``target`` by keyword and note them down."""
        for keyword, value in values.items():
            setattr(target, keyword, value)
            self.planted.append(Planted(where=path + keyword, value=str(value)))

    def plant_item(self, keyword: str, values: dict[str, Any], **coded: Any) -> Dataset:
        """Add a sequence with one item that holds the values."""
        item = Dataset()
        setattr(self.dataset, keyword, Sequence([item]))
        self.plant(item, values, path=f"{keyword}[0].")
        for name, value in coded.items():
            setattr(item, name, value)
        return item


def draw_person(rng: np.random.Generator, index: int) -> Person:
    """Make up patient number ``index``; the number keeps the PatientID unique."""
    accent = "é" if rng.random() < 0.1 else ""
    return Person(
        patient_id=f"SYN-{_word(rng, 2).upper()}-{index:05d}",
        name=f"{_word(rng, 3)}{accent}^{_word(rng, 2)}",
        other_id=f"SYN-OLD-{_digits(rng, 8)}",
        birth=date(1930, 1, 1) + timedelta(days=int(rng.integers(25_000))),
        sex=str(rng.choice(["F", "M"])),
        address=f"{rng.integers(1, 400)} {_word(rng, 3)} Lane, {_word(rng, 2)}ville",
        telephone=f"000-{_digits(rng, 7)}",
        institution=f"{HOSPITALS[rng.integers(len(HOSPITALS))]} Phantom Hospital",
        physician=f"{_word(rng, 3)}^{_word(rng, 2)}^^Dr",
        radiologist=f"{_word(rng, 3)}^{_word(rng, 2)}^^Dr",
        operator=f"{_word(rng, 2)}^{_word(rng, 2)}",
        station=f"XR-{_word(rng, 2).upper()}-{rng.integers(1, 9)}",
        serial=f"SN{_digits(rng, 9)}",
    )


def draw_visit(rng: np.random.Generator, *, study_uid: str, earlier: Visit | None) -> Visit:
    """Make up a study, half a year to three years after the earlier one."""
    if earlier is None:
        day = date(2015, 1, 1) + timedelta(days=int(rng.integers(2_000)))
    else:
        day = earlier.day + timedelta(days=int(rng.integers(180, 1_100)))
    return Visit(
        study_uid=study_uid,
        earlier_study_uid="" if earlier is None else earlier.study_uid,
        day=day,
        clock=f"{rng.integers(7, 18):02d}{rng.integers(60):02d}{rng.integers(60):02d}",
        accession=f"ACC{_digits(rng, 9)}",
        study_id=f"ST{_digits(rng, 6)}",
        procedure_id=f"RP{_digits(rng, 7)}",
    )


def build_header(
    person: Person,
    visit: Visit,
    *,
    fluoroscopy: bool,
    series_uid: str,
    sop_uid: str,
    instance_number: int,
    rng: np.random.Generator,
) -> Header:
    """Header of one film without pixels: CR, or RF where ``fluoroscopy`` is set.

    Nothing in it depends on what the film shows.
    """
    header = Header(Dataset(), FileMetaDataset())
    dataset = header.dataset
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = XRayRadiofluoroscopicImageStorage if fluoroscopy else ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = sop_uid
    dataset.StudyInstanceUID = visit.study_uid
    dataset.SeriesInstanceUID = series_uid
    dataset.Modality = "RF" if fluoroscopy else "CR"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = instance_number
    dataset.Manufacturer = "PHANTOM WORKS"
    dataset.ImageComments = MARKER
    dataset.SeriesDescription = f"{MARKER} UPPER GI"
    dataset.BodyPartExamined = "STOMACH"
    dataset.ContrastBolusAgent = "BARIUM SULFATE"
    dataset.PatientOrientation = ["L", "F"]
    dataset.KVP = str(rng.integers(80, 111))
    dataset.Exposure = str(rng.integers(2, 30))
    if fluoroscopy:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "SINGLE PLANE"]
        dataset.RadiationSetting = "GR"
        dataset.PixelIntensityRelationship = "DISP"
    else:
        dataset.ImageType = ["ORIGINAL", "PRIMARY"]
        dataset.ViewPosition = "AP"
    _plant_ordinary(header, person, visit)
    _plant_nested(header, person, visit)
    _plant_private(header, person)
    if rng.random() < 0.3:
        header.plant(header.meta, {"SourceApplicationEntityTitle": person.station[:16]}, path="file_meta.")
    if rng.random() < 0.1:
        dataset.preamble = f"archive copy {person.patient_id}".encode().ljust(128, b"\0")
        header.planted.append(Planted(where="preamble", value=person.patient_id))
    return header


def _plant_ordinary(header: Header, person: Person, visit: Visit) -> None:
    day = visit.day.strftime("%Y%m%d")
    years = (visit.day - person.birth).days // 365
    header.plant(
        header.dataset,
        {
            "PatientName": person.name,
            "PatientID": person.patient_id,
            "IssuerOfPatientID": person.institution,
            "PatientBirthDate": person.birth.strftime("%Y%m%d"),
            "PatientSex": person.sex,
            "PatientAge": f"{years:03d}Y",
            "PatientAddress": person.address,
            "PatientTelephoneNumbers": person.telephone,
            "PatientComments": f"Seen by {person.physician.split('^')[0]}, call {person.telephone}",
            "StudyDate": day,
            "SeriesDate": day,
            "ContentDate": day,
            "StudyTime": visit.clock,
            "ContentTime": visit.clock,
            "AccessionNumber": visit.accession,
            "StudyID": visit.study_id,
            "ReferringPhysicianName": person.physician,
            "PerformingPhysicianName": person.radiologist,
            "OperatorsName": person.operator,
            "InstitutionName": person.institution,
            "StationName": person.station,
            "DeviceSerialNumber": person.serial,
        },
    )


def _plant_nested(header: Header, person: Person, visit: Visit) -> None:
    request = {
        "RequestedProcedureID": visit.procedure_id,
        "AccessionNumber": visit.accession,
        "RequestingPhysician": person.physician,
    }
    header.plant_item(
        "RequestAttributesSequence",
        request,
        ScheduledProcedureStepID="1",
        RequestedProcedureDescription="UPPER GI",
    )
    header.plant_item(
        "OtherPatientIDsSequence",
        {"PatientID": person.other_id, "IssuerOfPatientID": person.institution},
        TypeOfPatientID="TEXT",
    )
    if visit.earlier_study_uid:
        header.plant_item(
            "ReferencedStudySequence",
            {"ReferencedSOPInstanceUID": visit.earlier_study_uid},
            ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        )
    replaced = Dataset()
    header.plant_item(
        "OriginalAttributesSequence",
        {"SourceOfPreviousValues": person.institution},
        AttributeModificationDateTime=f"{visit.day:%Y%m%d}{visit.clock}",
        ModifyingSystem="PHANTOM WORKS",
        ReasonForTheAttributeModification="CORRECT",
        ModifiedAttributesSequence=Sequence([replaced]),
    )
    path = "OriginalAttributesSequence[0].ModifiedAttributesSequence[0]."
    header.plant(replaced, {"PatientID": person.other_id}, path=path)


def _plant_private(header: Header, person: Person) -> None:
    block = header.dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    nested = Dataset()
    for offset, vr, value in ((0x01, "LO", person.name), (0x02, "LT", f"{person.patient_id} {person.telephone}")):
        block.add_new(offset, vr, value)
        header.planted.append(Planted(where=f"({PRIVATE_GROUP:04X},10{offset:02X})", value=value))
    header.plant(nested, {"PatientName": person.name}, path=f"({PRIVATE_GROUP:04X},1003)[0].")
    block.add_new(0x03, "SQ", [nested])


def _word(rng: np.random.Generator, syllables: int) -> str:
    return "".join(SYLLABLES[rng.integers(len(SYLLABLES), size=syllables)]).capitalize()


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, count))
