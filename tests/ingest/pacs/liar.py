"""A storage provider that does not keep its word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from tests.ingest.pacs.archive import Stored


class Liar:
    """Answers C-FIND, C-GET and C-MOVE on loopback with the faults that its attributes describe.

    Args:
        stored: Files that it has, all of one study, series and class.
        retrieves: Whether it offers C-GET and C-MOVE.
    """

    def __init__(self, stored: list[Stored], *, retrieves: bool = True) -> None:
        self.stored = stored
        self.series_count = self.study_count = len(stored)
        self.withheld: set[str] = set()
        self.swapped: dict[str, str] = {}
        self.drops: list[int] = []
        self.find_status = 0x0000
        self.move_status = 0x0000
        self.single_only = False
        self.requests: list[list[str]] = []
        entity = AE(ae_title="LIAR")
        entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        if retrieves:
            entity.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
            entity.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
        entity.add_supported_context(ComputedRadiographyImageStorage, scp_role=True, scu_role=True)
        handlers: list[Any] = [
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_C_GET, self._get),
            (evt.EVT_C_MOVE, self._move),
        ]
        self._server: Any = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        if self.find_status:
            yield self.find_status, None
            return
        wanted = event.identifier
        level, first = wanted.QueryRetrieveLevel, self.stored[0]
        for one in self.stored if level == "IMAGE" else [first]:
            row = Dataset()
            row.QueryRetrieveLevel = level
            row.StudyInstanceUID = one.study
            if level == "STUDY":
                row.StudyDate, row.PatientID = one.date, one.patient
                row.NumberOfStudyRelatedInstances = self.study_count
            elif level == "SERIES":
                row.SeriesInstanceUID, row.Modality = one.series, one.modality
                row.NumberOfSeriesRelatedInstances = self.series_count
            else:
                row.SOPInstanceUID, row.SOPClassUID = one.sop, ComputedRadiographyImageStorage
            yield 0xFF00, row

    def _get(self, event: Any) -> Iterator[Any]:
        names = event.identifier.SOPInstanceUID
        names = [str(name) for name in ([names] if isinstance(names, str) else names)]
        self.requests.append(names)
        if self.single_only and len(names) > 1:
            yield 0
            yield 0xA900, None
            return
        files = {one.sop: one.path for one in self.stored}
        sent = [self.swapped.get(name, name) for name in names if name not in self.withheld]
        yield len(sent)
        drop = self.drops.pop(0) if self.drops else -1
        for number, name in enumerate(sent):
            if number == drop:
                event.assoc.abort()
                return
            yield 0xFF00, pydicom.dcmread(files[name])

    def _move(self, _: Any) -> Iterator[Any]:
        if self.move_status == 0xA801:
            yield None, None
            return
        yield "127.0.0.1", 1
        yield 0
