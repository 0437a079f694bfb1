"""Every exception medistill raises on purpose.

::

    MedistillError
    ├── ConfigError        a configuration or command line that cannot be run        exit 2
    ├── SourceError        input missing, unreadable or without a usable image       exit 2
    │   ├── LabelError     labels that do not match the images
    │   └── RejectedFile   one file that goes to quarantine (never reaches the user)
    ├── OutputError        the output folder cannot be used, or the disk is full     exit 2
    ├── DataError          arrays or records that break an invariant                 exit 1
    ├── PrivacyError       an operation the privacy claim does not allow             exit 1
    ├── ReleaseError       a release folder that is damaged or was changed           exit 1
    └── GateError          the release gate was not passed                           exit 3

Messages say what, found, expected and remedy. They never quote a patient's value, a source path or a name:
files are named by their position in the scan, rows by their line number.
"""

from __future__ import annotations


class MedistillError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ConfigError(MedistillError, ValueError):
    """A configuration or command line that cannot be run. Lists every problem at once."""

    exit_code = 2


class SourceError(MedistillError):
    """The input is missing, unreadable, or holds nothing usable."""

    exit_code = 2


class LabelError(SourceError):
    """Labels that do not match the images, or are not usable for the task."""


class RejectedFile(SourceError):  # noqa: N818 - a rejection is an outcome, reported as a quarantine row
    """One file that cannot enter the cohort.

    Args:
        code: Reason code, one of :data:`medistill.ingest.quarantine.REASON_CODES`.
        detail: What was found and expected, without any value of the file.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class OutputError(MedistillError):
    """The output folder is not empty, not writable, or the disk is full."""

    exit_code = 2


class DataError(MedistillError, ValueError):
    """Arrays or records that break a documented invariant."""


class PrivacyError(MedistillError):
    """An operation that the privacy claim does not allow."""


class ReleaseError(MedistillError):
    """A release folder that is damaged, incomplete, or was changed."""


class GateError(MedistillError):
    """The release gate was not passed."""

    exit_code = 3
