"""DICOM files with identifiers planted in every place that can hold one, and the key to what must become of them.

The answer key follows the ten actions of the MIDI-B challenge. Every planted text is new and unique, so a search
of the raw bytes of an output, in any encoding, decides whether it survived.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import imagecodecs
import numpy as np
from pydicom import uid as uids
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag

ACTIONS = (
    "tag_retained",
    "text_notnull",
    "text_retained",
    "text_removed",
    "date_shifted",
    "uid_changed",
    "uid_consistent",
    "patid_consistent",
    "pixels_retained",
    "pixels_hidden",
)

CLASSES = {
    "CR": uids.ComputedRadiographyImageStorage,
    "DX": uids.DigitalXRayImageStorageForPresentation,
    "MG": uids.DigitalMammographyXRayImageStorageForPresentation,
    "US": uids.UltrasoundImageStorage,
    "XA": uids.XRayAngiographicImageStorage,
    "RF": uids.XRayRadiofluoroscopicImageStorage,
    "CT": uids.CTImageStorage,
    "ECT": uids.EnhancedCTImageStorage,
    "MR": uids.MRImageStorage,
    "EMR": uids.EnhancedMRImageStorage,
    "SC": uids.SecondaryCaptureImageStorage,
    "NM": uids.NuclearMedicineImageStorage,
    "PT": uids.PositronEmissionTomographyImageStorage,
}
_SYLLABLES = ("zor", "quv", "wix", "jyp", "kaz", "vex", "pob", "hud", "xil", "fyg", "nuq", "byz")
_ROOT = "1.2.826.0.1.3680043.9.7307."


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What must become of one attribute: the keyword path, the action and the value in the source."""

    keyword: str
    action: str
    value: object = None


@dataclass
class Planted:
    """A file, its planted texts by location, and its answer key."""

    iod: str
    dataset: Dataset
    payload: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)
    key: list[Answer] = field(default_factory=list)


class Names:
    """Texts that stand nowhere else."""

    def __init__(self, seed: int, *, syllables: int = 3) -> None:
        self._rng = np.random.default_rng(seed)
        self._syllables = syllables
        self._given: set[str] = set()

    def word(self) -> str:
        while True:
            word = "".join(self._rng.choice(_SYLLABLES, self._syllables)).capitalize()
            if word not in self._given:
                self._given.add(word)
                return word

    def number(self, digits: int = 8) -> str:
        while True:
            number = str(self._rng.integers(10 ** (digits - 1), 10**digits))
            if number not in self._given and len(set(number)) > 3:
                self._given.add(number)
                return number

    def uid(self) -> str:
        return _ROOT + self.number(9)


def base(iod: str, names: Names, *, bits: int = 12, side: int = 32, seed: int = 0) -> Dataset:
    """A plain image of one kind with the attributes its module asks for, and no identifier but the usual ones."""
    rng = np.random.default_rng(seed)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CLASSES[iod], names.uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = names.uid(), names.uid(), names.uid()
    ds.Modality = {"XA": "XA", "RF": "RF", "ECT": "CT", "EMR": "MR", "SC": "OT"}.get(iod, iod)
    ds.PatientName, ds.PatientID = f"{names.word()}^{names.word()}", names.number()
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19310407", "F", "093Y"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20170615"
    ds.StudyTime, ds.SeriesTime, ds.AcquisitionTime, ds.ContentTime = "081512", "081733", "081845.25", "081911"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = names.number(), names.number(), names.word()
    ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = "3", "17", "2"
    ds.Manufacturer, ds.BodyPartExamined = "GE MEDICAL SYSTEMS", "CHEST"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = side
    ds.BitsAllocated = 8 if bits <= 8 else 16
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, 0
    pixels = rng.integers(0, 1 << bits, (side, side)).astype("<u2" if bits > 8 else "u1")
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW" if bits > 8 else "OB"
    _modality(ds, iod)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta = meta
    return ds


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def code(value: str, scheme: str, meaning: str) -> Dataset:
    return _item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _modality(ds: Dataset, iod: str) -> None:
    """The utility attributes of one kind of image."""
    for keyword, value in UTILITY[iod].items():
        setattr(ds, keyword, value)
    if iod in ("DX", "MG"):
        ds.ViewCodeSequence = [code("399348003", "SCT", "antero-posterior")]
        ds.AnatomicRegionSequence = [code("51185008", "SCT", "Chest")]
    if iod == "US":
        ds.SequenceOfUltrasoundRegions = [
            _item(
                RegionLocationMinX0=1,
                RegionLocationMinY0=1,
                RegionLocationMaxX1=30,
                RegionLocationMaxY1=30,
                PhysicalDeltaX=0.03,
                PhysicalDeltaY=0.03,
                PhysicalUnitsXDirection=3,
                PhysicalUnitsYDirection=3,
                RegionSpatialFormat=1,
                RegionDataType=1,
                RegionFlags=0,
            )
        ]
    if iod in ("NM", "PT"):
        ds.RadiopharmaceuticalInformationSequence = [
            _item(
                RadionuclideTotalDose="370000000",
                RadionuclideHalfLife="6586.2",
                RadiopharmaceuticalStartTime="071512",
                RadionuclideCodeSequence=Sequence([code("77004003", "SCT", "^18^Fluorine")]),
            )
        ]
    if iod in ("ECT", "EMR"):
        ds.NumberOfFrames = 1
        frame = _item(
            PixelMeasuresSequence=Sequence([_item(PixelSpacing=[0.5, 0.5], SliceThickness="2.5")]),
            PlanePositionSequence=Sequence([_item(ImagePositionPatient=[-100, -80.5, 12.25])]),
            PlaneOrientationSequence=Sequence([_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        )
        ds.PerFrameFunctionalGroupsSequence = [frame]
        ds.SharedFunctionalGroupsSequence = [Dataset()]


_PLANE = {
    "PixelSpacing": [0.48828125, 0.48828125],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "ImagePositionPatient": [-249.51171875, -100.5, 33.25],
    "SliceThickness": "2.5",
}
_X = {"KVP": "120", "ExposureTime": "500", "XRayTubeCurrent": "250"}
#: Attributes whose values must be found unchanged in the output, by kind of image.
UTILITY: dict[str, dict[str, object]] = {
    "CR": {
        **_X,
        "ViewPosition": "PA",
        "ImagerPixelSpacing": [0.15, 0.15],
        "WindowCenter": "2048",
        "WindowWidth": "4096",
    },
    "DX": {
        **_X,
        "ViewPosition": "PA",
        "ImagerPixelSpacing": [0.143, 0.143],
        "ImageLaterality": "U",
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": -1,
        "PresentationIntentType": "FOR PRESENTATION",
        "PresentationLUTShape": "IDENTITY",
        "FilterType": "FLAT",
    },
    "MG": {
        **_X,
        "ViewPosition": "MLO",
        "ImageLaterality": "L",
        "AnodeTargetMaterial": "TUNGSTEN",
        "CompressionForce": "110",
        "BodyPartThickness": "55",
        "PositionerType": "MAMMOGRAPHIC",
        "PresentationIntentType": "FOR PRESENTATION",
    },
    "US": {"TransducerType": "LINEAR", "MechanicalIndex": "0.9", "HeartRate": "71"},
    "XA": {
        **_X,
        "PositionerPrimaryAngle": "30.5",
        "PositionerSecondaryAngle": "-15",
        "DistanceSourceToDetector": "1100",
    },
    "RF": {**_X, "PositionerType": "CARM", "RadiationMode": "PULSED", "AveragePulseWidth": "4.5"},
    "CT": {
        **_PLANE,
        **_X,
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "ConvolutionKernel": "B30f",
        "GantryDetectorTilt": "0",
        "SpiralPitchFactor": 0.984375,
        "PatientPosition": "HFS",
        "CTDIvol": 7.25,
    },
    "ECT": {"AcquisitionDuration": 1.5},
    "MR": {
        **_PLANE,
        "RepetitionTime": "2500.5",
        "EchoTime": "80.25",
        "FlipAngle": "90",
        "MagneticFieldStrength": "1.5",
        "ScanningSequence": "SE",
        "SequenceVariant": ["SK", "SP"],
        "MRAcquisitionType": "2D",
        "EchoTrainLength": "8",
    },
    "EMR": {"MagneticFieldStrength": 3.0, "ResonantNucleus": "1H", "EchoPulseSequence": "SPIN"},
    "SC": {"ConversionType": "WSD"},
    "NM": {"CountsAccumulated": "654721", "ActualFrameDuration": "600000"},
    "PT": {
        **_PLANE,
        "Units": "BQML",
        "DecayCorrection": "START",
        "CountsSource": "EMISSION",
        "ActualFrameDuration": "150000",
        "FrameReferenceTime": "37500.5",
        "DecayFactor": "1.03125",
    },
}


def plant(iod: str, *, seed: int = 0, syntax: str = "", bits: int = 12) -> Planted:
    """A file of one kind with something planted at every location, and its answer key."""
    names = Names(seed + 1000 * sorted(CLASSES).index(iod))
    ds = base(iod, names, bits=bits, seed=seed)
    planted = Planted(iod=iod, dataset=ds)
    _note_ordinary(planted)
    for location, function in LOCATIONS.items():
        planted.texts.update(function(ds, names, location))
    if syntax:
        _compress(planted, names, syntax)
    else:
        _plant_native(planted, names)
    planted.payload = _written(planted, names)
    _answers(planted)
    return planted


def _note_ordinary(planted: Planted) -> None:
    ds = planted.dataset
    last, first = str(ds.PatientName).split("^")
    planted.texts |= {"PatientName family": last, "PatientName given": first, "PatientID": ds.PatientID}
    for keyword in (
        "AccessionNumber",
        "StudyID",
        "ReferringPhysicianName",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "PatientBirthDate",
        "StudyDate",
    ):
        planted.texts[keyword] = str(ds[keyword].value)


def _texts(**keywords: str):
    """Locations that are plain attributes of text."""

    def put(ds: Dataset, names: Names, location: str) -> dict[str, str]:
        made = {}
        for keyword, form in keywords.items():
            word = names.word()
            setattr(ds, keyword, form.format(word=word, WORD=word.upper(), number=names.number()))
            made[f"{location} {keyword}"] = word
        return made

    return put


def _ordinary(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    return _texts(
        InstitutionName="{word} Hospital",
        InstitutionAddress="{word} Street 5",
        StationName="{WORD}",
        OperatorsName="{word}^Op",
        PerformingPhysicianName="{word}",
        NameOfPhysiciansReadingStudy="{word}",
        OtherPatientIDs="{word}",
        PatientAddress="{word} 12",
        PatientMotherBirthName="{word}",
        Occupation="{word}",
        PatientTelephoneNumbers="{word} 0301",
        DeviceSerialNumber="{word}",
        SoftwareVersions="{word}",
        ManufacturerModelName="{word} 3000",
        RequestingPhysician="{word}",
        CurrentPatientLocation="{word} ward",
        PatientReligiousPreference="{word}",
        MedicalRecordLocator="{word}",
        ProtocolName="{word} chest",
        DetectorID="{word}",
        PlateID="{word}",
        CassetteID="{word}",
        GantryID="{word}",
        GeneratorID="{word}",
        TransmitCoilName="{WORD}",
        ReceiveCoilName="{WORD}",
        StageName="{word}",
        AcquisitionDeviceProcessingCode="{word}",
        Radiopharmaceutical="{word}",
        ContrastBolusAgent="{word} 300",
        RescaleType="{WORD}",
        IssuerOfPatientID="{word}",
        ContentCreatorName="{word}",
        PulseSequenceName="{WORD}",
        SequenceName="{WORD}",
        FilterType="{WORD}" if "FilterType" not in ds else "FLAT",
    )(ds, names, location)


def _free_text(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    return _texts(
        StudyDescription="CT chest of {word} on 15.06.2017",
        SeriesDescription="t2 tra {word}",
        ImageComments="seen by {word}, born 07.04.1931",
        PatientComments="{word}",
        AdditionalPatientHistory="{word} fell",
        DerivationDescription="{word}",
        AcquisitionProtocolDescription="{word}",
        StudyComments="{word}",
        AdmittingDiagnosesDescription="{word}",
        RequestedProcedureDescription="{word}",
        FrameComments="{word}",
        PerformedProcedureStepDescription="{word}",
        WindowCenterWidthExplanation="{word}",
        LossyImageCompressionMethod="{WORD}",
    )(ds, names, location)


def _code_strings(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    made = {}
    word = names.word()
    ds.ImageType = [*ds.ImageType, word.upper()]
    made[f"{location} ImageType 4"] = word
    for keyword in (
        "ScanOptions",
        "PatientOrientation",
        "TypeOfDetectorMotion",
        "DetectorMode",
        "VOILUTFunction",
        "PatientSexNeutered",
        "QualityControlImage",
        "ColumnAngulationPatient",
        "RectificationType",
        "AcquisitionTerminationCondition",
        "CassetteSize",
        "PlateType",
        "Grid",
    ):
        try:
            word = names.word()
            setattr(ds, keyword, word.upper() if keyword != "ColumnAngulationPatient" else 1.5)
        except (ValueError, TypeError, AttributeError):
            continue
        if keyword in ds and keyword != "ColumnAngulationPatient":
            made[f"{location} {keyword}"] = word
    return made


def _numbers(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    made = {}
    for keyword in (
        "SeriesNumber",
        "PatientWeight",
        "ImagesInAcquisition",
        "NumberOfTemporalPositions",
        "DoseCalibrationFactor",
        "TriggerTime",
        "LossyImageCompressionRatio",
        "FrameDelay",
        "RecommendedDisplayFrameRate",
        "HeartRate",
        "TemporalResolution",
        "PixelAspectRatio",
    ):
        if keyword in ds and keyword != "SeriesNumber":
            continue
        number = names.number(9)
        setattr(ds, keyword, [number, "1"] if keyword == "PixelAspectRatio" else number)
        made[f"{location} {keyword}"] = number
    ds.TimezoneOffsetFromUTC = "+0137"
    return made


def _identity_in_fraction(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    ds.SliceLocation = f"12.{ds.PatientID}"
    ds.SpacingBetweenSlices = f"0.{ds.AccessionNumber}"
    return {f"{location} SliceLocation": ds.PatientID, f"{location} SpacingBetweenSlices": ds.AccessionNumber}


def _nested(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(6)]
    uid = [names.uid() for _ in range(3)]
    ds.ReferencedImageSequence = [
        _item(
            ReferencedSOPClassUID=ds.SOPClassUID,
            ReferencedSOPInstanceUID=uid[0],
            PurposeOfReferenceCodeSequence=Sequence([code("121311", "DCM", words[0])]),
        )
    ]
    ds.SourceImageSequence = [_item(ReferencedSOPClassUID=uid[1], ReferencedSOPInstanceUID=ds.SOPInstanceUID)]
    ds.RequestAttributesSequence = [
        _item(
            RequestedProcedureDescription=words[1],
            ScheduledProcedureStepID=words[2],
            ReasonForRequestedProcedureCodeSequence=Sequence([code(words[3][:12], "99LOCAL", words[4])]),
        )
    ]
    changed = _item(PatientName=words[5], StudyInstanceUID=uid[2])
    ds.OriginalAttributesSequence = [
        _item(ModifiedAttributesSequence=Sequence([changed]), ModifyingSystem=words[1])
    ]
    ds.AnatomicRegionSequence = [
        Dataset(ds.AnatomicRegionSequence[0])
        if "AnatomicRegionSequence" in ds
        else code("51185008", "SCT", words[3]),
        code(words[0][:16], "99HOSP", words[2]),
    ]
    made = {f"{location} {place}": word for place, word in enumerate(words)}
    return made | {f"{location} uid {place}": one for place, one in enumerate(uid)}


def _private(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(6)]
    block = ds.private_block(0x0029, f"{words[0]} HEADER", create=True)
    block.add_new(0x10, "LO", words[1])
    block.add_new(0x11, "OB", words[2].encode() + b"\0\1" * 5)
    block.add_new(0x12, "SQ", Sequence([_item(PatientName=words[3])]))
    block.add_new(0x13, "UN", words[4].encode("utf-16-le"))
    ds.add_new(Tag(0x00191001), "LO", words[5])
    return {f"{location} {place}": word for place, word in enumerate(words)}


def _unknown(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(3)]
    for tag, vr, word in zip((0x00081FF0, 0x0018FFF2, 0x31310100), ("LO", "UN", "LT"), words, strict=True):
        value = word.encode() + b" " * (len(word) % 2) if vr == "UN" else word
        if tag >> 16 & 1 == 0:
            ds.add(DataElement(Tag(tag), vr, value))
    return {f"{location} {place}": word for place, word in enumerate(words[:2])}


def _graphics(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(6)]
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60000011, "US", 8)
    ds.add_new(0x60000022, "LO", words[0])
    ds.add_new(0x60000040, "CS", "G")
    ds.add_new(0x60001500, "LO", words[1])
    ds.add_new(0x60003000, "OW", words[2].encode().ljust(32, b"\0"))
    ds.add_new(0x50000030, "SH", words[3])
    ds.add_new(0x50003000, "OW", words[4].encode().ljust(32, b"\0"))
    ds.add_new(0x50000022, "LO", words[5])
    return {f"{location} {place}": word for place, word in enumerate(words)}


def _attachments(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(3)]
    icon = _item(
        Rows=8,
        Columns=8,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        ImageComments=words[0],
    )
    icon.PixelData = words[1].encode().ljust(64, b"\0")
    icon["PixelData"].VR = "OB"
    ds.IconImageSequence = [icon]
    text = words[2].encode()
    profile = struct.pack(">I", 200) + b"lcms" + bytes(120) + b"desc" + bytes(8) + text
    ds.ICCProfile = profile + b"\0" * (-len(profile) % 2)
    return {f"{location} {place}": word for place, word in enumerate(words)}


def _tables(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    words = [names.word() for _ in range(4)]
    data = (words[0] + words[1]).encode().ljust(512, b"\0")
    ds.VOILUTSequence = [_item(LUTExplanation=words[2], LUTData=data)]
    ds.VOILUTSequence[0].add_new("LUTDescriptor", "US", [256, 0, 16])
    ds.VOILUTSequence[0]["LUTData"].VR = "OW"
    ds.ModalityLUTSequence = [_item(LUTExplanation=words[3], ModalityLUTType=words[3].upper()[:16])]
    ds.ModalityLUTSequence[0].add_new("LUTDescriptor", "US", [256, 0, 16])
    ds.ModalityLUTSequence[0].add_new("LUTData", "OW", np.arange(256, dtype="<u2").tobytes())
    return {f"{location} {place}": word for place, word in enumerate(words)}


def _dates(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    ds.AcquisitionDateTime = "20170615081845.71"
    ds.InstanceCreationDate, ds.LastMenstrualDate, ds.DateOfLastCalibration = "20170616", "20170502", "20160229"
    ds.PerformedProcedureStepStartDate, ds.AdmittingDate = "20170614", "20170611"
    ds.ScheduledProcedureStepStartDate = "20170613"
    forms = ("20170616", "20170502", "20160229", "20170614", "20170611", "20170613", "07.04.1931", "15.06.2017")
    return {f"{location} {form}": form for form in forms}


def _odd_uids(ds: Dataset, names: Names, location: str) -> dict[str, str]:
    word, uid = names.word(), [names.uid() for _ in range(4)]
    ds.IrradiationEventUID = uid[0]
    ds.SynchronizationFrameOfReferenceUID = uid[1]
    ds.InstanceCreatorUID, ds.StorageMediaFileSetUID = uid[2], uid[3]
    ds.DeviceUID = _ROOT + word
    return {f"{location} {place}": one for place, one in enumerate(uid)} | {f"{location} word": word}


LOCATIONS = {
    "ordinary": _ordinary,
    "free text": _free_text,
    "code strings": _code_strings,
    "numbers": _numbers,
    "fraction": _identity_in_fraction,
    "nested": _nested,
    "private": _private,
    "unknown": _unknown,
    "graphics": _graphics,
    "attachments": _attachments,
    "tables": _tables,
    "dates": _dates,
    "uids": _odd_uids,
}


def _plant_native(planted: Planted, names: Names) -> None:
    """Text behind the pixels, and in the bits above BitsStored."""
    ds = planted.dataset
    word, hidden = names.word(), names.word()
    pixels = np.frombuffer(ds.PixelData, "<u2" if ds.BitsAllocated == 16 else "u1").copy()
    if ds.BitsAllocated == 16 and ds.BitsStored == 12:
        bits = np.unpackbits(np.frombuffer(hidden.encode(), np.uint8))
        pixels[: len(bits)] |= (bits.astype("<u2") << 15).astype("<u2")
        planted.texts["overlay bits"] = hidden
    tail = word.encode() + b" " * (len(word) % 2)
    ds.PixelData = pixels.tobytes() + tail
    ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 else "OB"
    planted.texts["behind the pixels"] = word


def _compress(planted: Planted, names: Names, syntax: str) -> None:
    ds = planted.dataset
    dtype = "<u2" if ds.BitsAllocated == 16 else "u1"
    pixels = np.frombuffer(ds.PixelData, dtype).reshape(ds.Rows, ds.Columns)
    word, other = names.word(), names.word()
    if syntax == uids.JPEGBaseline8Bit:
        frame = with_jpeg_text(imagecodecs.jpeg8_encode(pixels, level=95), word, other)
    elif syntax == uids.JPEGLSLossless:
        frame = with_jpeg_text(imagecodecs.jpegls_encode(pixels), word, other)
    else:
        frame = with_j2k_text(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0), word)
        other = ""
    trailing = names.word()
    frame += trailing.encode() + b"\0" * ((len(frame) + len(trailing)) % 2)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    junk = names.number(8).encode()
    ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = bytes(8), junk
    planted.texts |= {"comment": word, "behind the image": trailing, "offset table": junk.decode()}
    if other:
        planted.texts["application segment"] = other


def with_jpeg_text(stream: bytes, comment: str, application: str) -> bytes:
    """A JPEG or JPEG-LS stream with a comment and an application segment."""
    text, name = comment.encode(), b"Exif\0\0" + application.encode()
    segments = (
        struct.pack(">BBH", 0xFF, 0xFE, len(text) + 2)
        + text
        + struct.pack(">BBH", 0xFF, 0xE1, len(name) + 2)
        + name
    )
    return stream[:2] + segments + stream[2:]


def with_j2k_text(stream: bytes, comment: str) -> bytes:
    """A JPEG 2000 codestream with a comment before its first tile."""
    place = stream.index(b"\xff\x90\x00\x0a")
    text = comment.encode()
    return stream[:place] + struct.pack(">HHH", 0xFF64, len(text) + 4, 1) + text + stream[place:]


def _written(planted: Planted, names: Names) -> bytes:
    """Bytes with text in the preamble, in the meta information and after the data set."""
    ds = planted.dataset
    words = [names.word() for _ in range(7)]
    ds.preamble = words[0].encode().ljust(128, b"\0")
    ds.file_meta.ImplementationClassUID = f"{_ROOT}{names.number()}"
    ds.file_meta.ImplementationVersionName = words[1][:16]
    ds.file_meta.SourceApplicationEntityTitle = words[2][:16]
    ds.file_meta.SendingApplicationEntityTitle = words[3][:16]
    ds.file_meta.PrivateInformationCreatorUID = names.uid()
    ds.file_meta.PrivateInformation = words[4].encode() + b"\0" * (len(words[4]) % 2)
    ds.add_new(0xFFFCFFFC, "OB", words[5].encode() + b"\0" * (len(words[5]) % 2))
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    planted.texts |= {f"preamble and meta {place}": word for place, word in enumerate(words[:6])}
    planted.texts["private creator uid"] = str(ds.file_meta.PrivateInformationCreatorUID)
    return buffer.getvalue()


def _answers(planted: Planted) -> None:
    ds, key = planted.dataset, planted.key
    for keyword in UTILITY[planted.iod]:
        key.append(Answer(keyword=keyword, action="tag_retained", value=ds[keyword].value))
    key += [
        Answer(keyword=keyword, action="text_notnull")
        for keyword in ("PatientName", "PatientID", "SOPInstanceUID")
    ]
    key += [
        Answer(keyword=keyword, action="text_retained", value=ds[keyword].value)
        for keyword in ("BodyPartExamined", "Manufacturer", "PatientSex")
    ]
    key += [
        Answer(keyword=keyword, action="date_shifted", value=ds[keyword].value)
        for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
    ]
    key += [
        Answer(keyword=keyword, action="uid_changed", value=ds[keyword].value)
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    ]
    key.append(
        Answer(
            keyword="SourceImageSequence.ReferencedSOPInstanceUID", action="uid_consistent", value="SOPInstanceUID"
        )
    )
    key += [
        Answer(keyword=location, action="text_removed", value=text) for location, text in planted.texts.items()
    ]
    key += [Answer(keyword="PatientID", action="patid_consistent", value=ds.PatientID)]
    key += [
        Answer(keyword="PixelData", action="pixels_retained"),
        Answer(keyword="PixelData", action="pixels_hidden"),
    ]


def encodings(text: str) -> set[bytes]:
    """A text in every form it could survive in."""
    forms = {text, text.upper(), text.lower()}
    codes = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "iso2022_jp", "gb18030")
    return {form.encode(code, "ignore") for form in forms for code in codes} - {b""}


def surviving(texts: dict[str, str], output: bytes) -> list[str]:
    """Locations of planted texts whose bytes stand in an output; a naive search."""
    return sorted(location for location, text in texts.items() if any(form in output for form in encodings(text)))
