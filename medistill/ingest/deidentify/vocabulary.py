"""Public words: the only texts that a de-identified file may share with its source.

Everything here is vocabulary of the standard or of the trade (PS3.3 defined terms, PS3.16 Annex L body parts,
PS3.6 UIDs, PS3.16 codes, names of products). Nothing is learnt from data.

Example:
    >>> code_meaning("SCT", "51185008")
    'Chest'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_has_tag
from pydicom.sr._concepts_dict import concepts
from pydicom.sr._snomed_dict import mapping


def _lines(text: str) -> frozenset[str]:
    """Terms separated by ``|`` or line ends, in lower case."""
    return frozenset(term.strip().casefold() for term in re.split(r"[|\n]", text) if term.strip())


#: Body parts as written in BodyPartExamined (PS3.16 Annex L, and what scanners write beside it).
BODY_PARTS = _lines("""
ABDOMEN|ABDOMENPELVIS|ADRENAL|ANKLE|AORTA|ARM|AXILLA|BACK|BLADDER|BRAIN|BREAST|BRONCHUS|BUTTOCK|CALCANEUS
CALF|CAROTID|CEREBELLUM|CHEST|CHESTABDOMEN|CHESTABDPELVIS|CIRCLEOFWILLIS|CLAVICLE|COCCYX|COLON|CORNEA
CORONARYARTERY|CSPINE|CTSPINE|DUODENUM|EAR|ELBOW|ESOPHAGUS|EXTREMITY|EYE|EYELID|FACE|FEMUR|FINGER|FOOT
GALLBLADDER|HAND|HEAD|HEADNECK|HEART|HIP|HUMERUS|IAC|ILEUM|ILIUM|JAW|JEJUNUM|KIDNEY|KNEE|LARYNX|LEG|LIVER
LSPINE|LSSPINE|LUNG|MAXILLA|MEDIASTINUM|MOUTH|NECK|NECKCHEST|NECKCHESTABDOMEN|NECKCHESTABDPELV|NOSE|ORBIT
OVARY|PANCREAS|PAROTID|PATELLA|PELVIS|PENIS|PHARYNX|PROSTATE|RECTUM|RIB|SACRUM|SCALP|SCAPULA|SCLERA|SCROTUM
SELLA|SHOULDER|SKULL|SPINE|SPLEEN|SSPINE|STERNUM|STOMACH|SUBMANDIBULAR|TESTIS|THIGH|THORAX|THUMB|THYMUS
THYROID|TIBIA|TIBIAFIBULA|TLSPINE|TMJ|TOE|TONGUE|TRACHEA|TSPINE|ULNA|URETER|URETHRA|UTERUS|VAGINA|VULVA
WHOLEBODY|WHOLE BODY|WRIST|ZYGOMA|L-SPINE|C-SPINE|T-SPINE|LUMBAR SPINE|CERVICAL SPINE
""")

#: Words of ImageType after the second value, and of frame types (PS3.3 C.7.6.1.1.2 and the modality modules).
IMAGE_TYPES = _lines("""
ORIGINAL|DERIVED|MIXED|PRIMARY|SECONDARY|NONE|AXIAL|LOCALIZER|OTHER|SINGLE PLANE|BIPLANE A|BIPLANE B
SINGLE A|SINGLE B|M|P|R|I|ND|NORM|DIS2D|DIS3D|FM3_2|FIL|MFSPLIT|MOSAIC|DIFFUSION|ADC|FA|TRACEW|T1|T2|T2_STAR
T2 MAP|T1 MAP|PERFUSION|CSA MPR|CSAPARALLEL|CT_SOM5 SPI|CT_SOM5 SEQ|CT_SOM5 TOP|CT_SOM7 SPI|CT_SOM7 SEQ
CT_SOM7 TOP|CT_SOM8 SPI|HELICAL|HELIX|SPIRAL|REFORMATTED|AVERAGE|MPR|MIP|MINIP|PROJECTION IMAGE|MAX_IP
MIN_IP|VOLUME|VOLUME_RENDER|SURFACE_RENDER|SCREEN SAVE|DUAL|M_FFE|M_SE|M_IR|FFE|SE|IR|PCA|PHASE MAP
MAGNITUDE|PHASE|REAL|IMAGINARY|FIELD_MAP|WATER|FAT|IN_PHASE|OUT_PHASE|SUBTRACTION|ANGIO|TOF|PROPELLER|EPI
EPICARDIAL|INTRAVASCULAR|TRANSESOPHAGEAL|TRANSTHORACIC|ABDOMINAL|OBSTETRICAL|GYNECOLOGICAL|CARDIAC|VASCULAR
BREAST|PELVIS|RENAL|PEDIATRIC|SMALL PARTS|THYROID|STATIC|DYNAMIC|GATED|WHOLE BODY|TOMO|RECON TOMO|GATED TOMO
RECON GATED TOMO|EMISSION|TRANSMISSION|TOMOSYNTHESIS|GENERATED_2D|POST_PROCESSED|POST_CONTRAST|PRE_CONTRAST
RCBF|RCBV|MTT|TTP|CARDIO|CALCIUM SCORE|SCOUT|SUM|IMAGE|REST|STRESS|OLDER_RAW|RESAMPLED|FILTERED|STACK|CINE
""")

#: Manufacturers as they write themselves.
MANUFACTURERS = _lines("""
SIEMENS|SIEMENS HEALTHINEERS|SIEMENS NM|CPS|GE MEDICAL SYSTEMS|G.E. MEDICAL SYSTEMS|GE HEALTHCARE
GE HEALTHCARE ULTRASOUND|GE VINGMED ULTRASOUND|GEMS|GE ULTRASOUND|PHILIPS|PHILIPS MEDICAL SYSTEMS
PHILIPS HEALTHCARE|PHILIPS MEDICAL SYSTEMS, INC.|ADAC|MARCONI MEDICAL SYSTEMS|PICKER INTERNATIONAL, INC.
ELSCINT|TOSHIBA|TOSHIBA_MEC|TOSHIBA_MEC_US|CANON INC.|TOSHIBA MEDICAL SYSTEMS
TOSHIBA AMERICA MEDICAL SYSTEMS|CANON|CANON_MEC|CANON MEDICAL SYSTEMS|HITACHI|HITACHI MEDICAL CORPORATION
HITACHI, LTD.|HITACHI ALOKA MEDICAL,LTD.|ALOKA CO., LTD.|ALOKA|FUJIFILM|FUJIFILM CORPORATION
FUJI PHOTO FILM CO. LTD.|FUJI PHOTO FILM CO., LTD.|AGFA|AGFA-GEVAERT|AGFA-GEVAERT AG|AGFA HEALTHCARE|KODAK
EASTMAN KODAK COMPANY|CARESTREAM|CARESTREAM HEALTH|CARESTREAM HEALTH, INC.|KONICA MINOLTA|KONICA
SAMSUNG ELECTRONICS|SAMSUNG MEDISON CO., LTD.|MEDISON|SHIMADZU|SHIMADZU CORPORATION|HOLOGIC|HOLOGIC, INC.
LORAD|LORAD, A HOLOGIC COMPANY|R2 TECHNOLOGY, INC.|IMS|IMS S.R.L.|IMS GIOTTO S.P.A.|PLANMED|SECTRA IMTEC AB
SWISSRAY|STERLING|TREX|ACUSON|ATL|ACCURAY|VARIAN|VARIAN MEDICAL SYSTEMS|ELEKTA|BRUKER
BRUKER BIOSPIN MRI GMBH|ESAOTE|ESAOTE S.P.A.|MINDRAY|UIH|UNITED IMAGING HEALTHCARE|NEUSOFT|NEUROLOGICA
MEDISO|SOPHA|SPECTRUM DYNAMICS|VIDAR|HOWTEK|LUMISYS|ICAD|VISUALSONICS|SONOSITE|SUPERSONIC IMAGINE|BK MEDICAL
PIE MEDICAL|ZIEHM|ZIEHM IMAGING GMBH|OEC|ZONARE|HEWLETT PACKARD|AGILENT|ROTEM|DEL MEDICAL
OREX COMPUTED RADIOGRAPHY|ICRCO|VIEWORKS|RAYENCE|DRTECH|IBA|EIZO|OFFIS|DCMTK
""")

#: Product names.
MODELS = _lines("""
LIGHTSPEED PLUS|LIGHTSPEED ULTRA|LIGHTSPEED VCT|LIGHTSPEED16|LIGHTSPEED PRO 16|LIGHTSPEED RT16
LIGHTSPEED QX/I|HISPEED CT/I|OPTIMA CT660|OPTIMA CT580|DISCOVERY CT750 HD|DISCOVERY STE|DISCOVERY ST
DISCOVERY 690|DISCOVERY MR750|DISCOVERY MR750W|REVOLUTION CT|REVOLUTION EVO|BRIGHTSPEED|SIGNA HDXT
SIGNA EXCITE|SIGNA ARTIST|SIGNA PREMIER|SIGNA PET/MR|GENESIS_SIGNA|OPTIMA MR450W|SENOGRAPHE DS
SENOGRAPHE ESSENTIAL|SENOGRAPHE 2000D|LOGIQ E9|LOGIQ 700|LOGIQ 9|VIVID E9|VIVID 7|VIVID E95|VOLUSON E8
VOLUSON E10|MILLENNIUM MG|INFINIA|SOMATOM FORCE|SOMATOM DEFINITION|SOMATOM DEFINITION AS
SOMATOM DEFINITION AS+|SOMATOM DEFINITION FLASH|SOMATOM DEFINITION EDGE|SOMATOM DRIVE|SOMATOM GO.TOP
SENSATION 16|SENSATION 64|EMOTION 16|EMOTION 6|EMOTION DUO|VOLUME ZOOM|BIOGRAPH 64|BIOGRAPH 40|BIOGRAPH128
BIOGRAPH MMR|AVANTO|AVANTO_FIT|AERA|SKYRA|SKYRA_FIT|TRIO|TRIOTIM|TIMTRIO|VERIO|PRISMA|PRISMA_FIT|ESPREE
SYMPHONY|SYMPHONYTIM|SONATA|HARMONY|ACUSON S2000|ACUSON SEQUOIA|ECAM|SYMBIA T|BRILLIANCE 16|BRILLIANCE 16P
BRILLIANCE 40|BRILLIANCE 64|BRILLIANCE 6|ICT 256|INGENUITY CT|IQON - SPECTRAL CT|MX8000|MX8000 IDT 16
GEMINI TF|INGENIA|ACHIEVA|INTERA|PANORAMA HFO|GYROSCAN NT|IE33|IU22|HD11|EPIQ 5G|EPIQ 7C|EPIQ 7G|CX50
ALLURA XPER|INTEGRIS|DIGITALDIAGNOST|ESSENTA DR|THORAVISION|AQUILION|AQUILION ONE|AQUILION PRIME|AQUILION/LB
ASTEION|XPRESS GX|TITAN|VANTAGE|APLIO 500|APLIO XG|SELENIA|SELENIA DIMENSIONS|LORAD SELENIA
MAMMOMAT INSPIRATION|MAMMOMAT NOVATION DR|MAMMOMAT REVELATION|FCR|FCR (CSL-3)|FCR (CSL-2)|CR 975|CR 850
CR 950|DRX-EVOLUTION|DRX-1|REGIUS|ADC_51XX|ADC_5146|ADC COMPACT|ECLIPSE 1.5T|MRT50H1|IRS|CTI_IMAGE
""")

#: Display windows as scanners name them.
WINDOW_NAMES = _lines("""
NORMAL|HARDER|SOFTER|WINDOW1|WINDOW2|WINDOW3|BRAIN|BONE|BONES|LUNG|LUNGS|MEDIASTINUM|ABDOMEN|LIVER
SOFT TISSUE|SPINE|SUBDURAL|STROKE|DEFAULT|STANDARD|USER|CHEST|HEAD|PELVIS|ANGIO|LINEAR|ALGO1|ALGO2|EDGE|HIGH
LOW|HIGH CONTRAST|LOW CONTRAST
""")

#: Words a description may keep, one by one; common family names among them are left out on purpose.
WORDS = _lines("""
abdomen|abdominal|acute|adc|adrenal|angio|angiogram|angiography|ankle|aorta|apical|ap|arterial|artery|asl
axial|ax|bilat|bilateral|biopsy|bladder|blade|bone|bones|brain|breast|breath|bravo|bold|calcium|cardiac
carotid|carotids|cc|cervical|chest|cine|cisternography|clavicle|colon|colonography|contrast|cor|coronal
coronary|cr|cranial|cspine|ct|cta|ctpa|cube|cystogram|delayed|dental|diff|diffusion|dir|dixon|doppler|dti
dual|dwi|dx|dynamic|echo|echocardiogram|elbow|emission|enhanced|enhancement|epi|extremity|facial|fat|fatsat
fast|femoral|femur|fetal|fiesta|fill|first|flair|flash|fluoro|fluoroscopy|fov|fse|fs|fused|gad|gadolinium
gallbladder|gated|gradient|gre|haste|heart|helical|hepatic|hip|hires|hr|humerus|iac|inspiration|expiration
iodine|kidney|kidneys|knee|lat|lateral|left|limb|liver|localiser|localizer|lower|lspine|lumbar|lung|lungs
mag|mammogram|mammography|medial|mediastinum|mip|minip|mlo|mpr|mprage|mr|mra|mri|mrv|neck|neuro|nm|non
oblique|obl|orbit|orbits|osem|pa|pancreas|patella|pc|pd|pelvic|pelvis|perfusion|pet|phase|pilot|plain|portal
post|pre|projection|prostate|protocol|pulmonary|radiograph|recon|reformat|renal|rest|right|rectum|routine
sagittal|sag|scan|scout|screening|sense|seq|sequence|shoulder|skull|soft|space|spect|spgr|spin|spine|spiral
spleen|standing|static|ste|stir|stress|supine|prone|surview|survey|swi|swan|t1|t1w|t2|t2w|t2star|tra|tse
thin|thoracic|thorax|thyroid|tibia|tissue|tof|tomo|tomosynthesis|topogram|trace|transverse|tspine|ultrasound
unenhanced|unilateral|upper|us|uterus|vascular|vein|venous|vibe|view|views|volume|water|whole|with|without
wo|wrist|xa|xray|2d|3d|4d|3mm|5mm|1mm|2mm|body|cerebral|head|hand|foot|stack|axials|thick|ssfp|trufi|lava
thrive|dynamics
""")

_PATTERNS = {
    "kernel": re.compile(
        r"(?:[BHUTDIJQ]|Br|Hr|Hc|Hf|Hp|Hv|Bl|Bv|Bf|Bq|Qr|Ur|Sa|Sd|Sp|Sx|Tr)\d{2}[fshmuv]?|FC\d{2}|FL\d{2}"
        r"|STANDARD|SOFT|BONE|BONEPLUS|LUNG|DETAIL|EDGE|CHEST|STND|SMOOTH|SHARP|ULTRA|[A-E]|Y[A-E]|1|2|3|4|5"
        r"|GAUSSIAN|HANNING|BUTTERWORTH|RAMP|XYZGAUSS\d\.\d\d?|ALL-?PASS"
    ),
    "orientation": re.compile(r"(?!.*[AP].*[AP])(?!.*[RL].*[RL])(?!.*[HF].*[HF])[APRLHF]{1,3}"),
    "age": re.compile(r"0[0-8]\dY|090Y"),
}


def matches(pattern: str, value: str) -> bool:
    """Whether a value has one of the known forms ``kernel``, ``orientation`` or ``age``."""
    return _PATTERNS[pattern].fullmatch(value) is not None


def is_public_uid(uid: str) -> bool:
    """Whether a UID is registered by the standard (PS3.6 Annex A)."""
    return uid in UID_dictionary


def is_public_tag(tag: int) -> bool:
    """Whether a tag is one of the data dictionary (PS3.6)."""
    return dictionary_has_tag(tag)


@cache
def _codes() -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = {}
    known: Mapping[str, Mapping[str, Mapping[str, tuple[str, Any]]]] = concepts  # type: ignore[assignment]
    for scheme, by_name in known.items():
        tables[scheme] = {code: entry[0] for by_code in by_name.values() for code, entry in by_code.items()}
    retired = {old: tables["SCT"][new] for old, new in mapping["SRT"].items() if new in tables["SCT"]}
    return tables | {"SRT": retired, "SNM3": retired, "99SDM": retired}


def code_meaning(scheme: str, value: str) -> str | None:
    """Meaning of a code of PS3.16; ``None`` for a code the standard does not use."""
    return _codes().get(scheme, {}).get(value)


@cache
def code_texts() -> frozenset[str]:
    """Every code value, scheme and meaning, in lower case."""
    tables = _codes()
    values = {value for table in tables.values() for value in table}
    meanings = {meaning for table in tables.values() for meaning in table.values()}
    return frozenset(text.casefold() for text in {*tables, *values, *meanings})
