"""What all images together decide: duplicates, labels, who is who, contradictions, and the split of every patient.

Everything works on the rows of the :class:`~medistill.ingest.journal.Journal`, so memory grows with the number of
patients and not of images. Running it again on the same rows gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from medistill.core.cohort import Instance, Split
from medistill.core.task import joined_names
from medistill.ingest.cache import Accepted
from medistill.ingest.identity import Pseudonymiser
from medistill.ingest.journal import Journal
from medistill.ingest.labels import LabelRule, LabelTable
from medistill.ingest.quarantine import Rejected
from medistill.ingest.splits import Member, SplitFractions, assign_splits

_DECISIONS = """
create temp table decision as
select id, ordinal, frame, uid, study, own_patient, folder, bare_patient, sex, birth, pixel_key, given_test,
       outcome, detail, label as given, patient as person, '' as assumed, 0 as by_number, '' as chosen
from image
"""
_REPEATED = """
update decision
set outcome = case when pixel_key = first.pixels then 'DUP_SOP_SAME' else 'DUP_SOP_DIFF' end
from (
    select id as other, first_value(id) over same as kept, first_value(pixel_key) over same as pixels
    from decision where outcome = '' window same as (partition by uid order by ordinal, frame)
) as first
where first.other = decision.id and first.kept != decision.id
"""
_WITHOUT_ISSUER = """
update decision set person = bare_patient
where outcome = '' and bare_patient != '' and bare_patient in (select person from decision where outcome = '')
"""
_NAMED_BY_STUDY = """
update decision set person = known.person
from (
    select study, min(person) as person from decision where outcome = '' and assumed = '' and study != ''
    group by study having count(distinct person) = 1
) as known
where decision.outcome = '' and decision.assumed != '' and decision.study = known.study
"""


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """Decides about the images of a journal.

    Args:
        journal: Everything that was read.
        table: Labels that came beside the source.
        missing_patient: ``reject`` images without a patient, or make them their ``own``.
        rule: How labels of the source are read; those of the table are read already.
    """

    journal: Journal
    table: LabelTable | None
    missing_patient: str
    rule: LabelRule = field(default_factory=LabelRule)

    def decide(self) -> None:
        """Turn away duplicates, images without label or patient, and contradictions; name every patient once."""
        self._begin()
        self._join()
        self._duplicates()
        self._numbers_of_two_issuers()
        self._one_name_each()
        self._contradictions()

    def _sql(self, statement: str, *values: Any) -> Any:
        return self.journal.rows.execute(statement, values)

    def _begin(self) -> None:
        """A table of decisions beside the rows, so that rows stay as they were read."""
        self._sql("drop table if exists temp.decision")
        self._sql(_DECISIONS)
        self._sql("create unique index temp.decision_id on decision (id)")

    def _duplicates(self) -> None:
        """Of images with one UID the first in the scan stays."""
        self._sql("create index temp.decision_uid on decision (uid)")
        self._sql(_REPEATED)

    def _join(self) -> None:
        """Add what the label table says; the header's patient comes before the table's."""
        entry, last = None, None
        rows = self._sql(
            "select d.id, d.ordinal, i.keys, d.person, d.study, d.folder, d.own_patient, d.given, d.given_test "
            "from decision d join image i on i.id = d.id where d.outcome = '' order by d.ordinal, d.frame"
        )
        for number, ordinal, keys, person, study, folder, own, given, test in rows:
            if ordinal != last:
                entry, last = self.table.match(keys.split()) if self.table else None, ordinal
            label, assumed, outcome = self.rule(given), "", ""
            if self.table and self.table.has_labels:
                label = entry.label if entry else ""
            patient = person or (entry.patient if entry else "")
            if not label:
                outcome = "NO_LABEL"
            elif not patient and self.missing_patient == "reject":
                outcome = "ID_MISSING"
            elif not patient:
                patient = study or folder or own
                assumed = "patient_is_study" if study else "patient_is_folder" if folder else "patient_is_image"
            self._sql(
                "update decision set given = ?, person = ?, assumed = ?, given_test = ?, by_number = ?, "
                "outcome = ?, bare_patient = coalesce(nullif(bare_patient, ''), ?) where id = ?",
                *(label, patient, assumed, bool(test or (entry and entry.given_test))),
                *(bool(entry and entry.by_number), outcome, entry.bare_patient if entry else "", number),
            )

    def _numbers_of_two_issuers(self) -> None:
        """A row for a bare number that fits patients of two issuers says of none of them what it means."""
        self._reject(
            "ID_CONFLICT",
            "the label table names a number that two issuers use; add the issuer to the table",
            "by_number and bare_patient in (select bare_patient from decision where outcome = '' and by_number "
            "and person != bare_patient group by bare_patient having count(distinct person) > 1)",
        )

    def _one_name_each(self) -> None:
        """Give a patient one pseudonym where files name the issuer, or the patient, only sometimes.

        A number without an issuer is taken for the same number with one; an image without a patient for the only
        patient of its study. Taking two people for one costs a rejection or a little data; the reverse would put
        one patient into two splits.
        """
        self._sql(_WITHOUT_ISSUER)
        self._sql(_NAMED_BY_STUDY)

    def _contradictions(self) -> None:
        """Turn away patients with two sexes or two birth dates: the number may stand for two people."""
        self._reject(
            "ID_CONFLICT",
            "two sexes or two birth dates under one patient",
            "person in (select person from decision where outcome = '' group by person "
            "having count(distinct nullif(sex, '')) > 1 or count(distinct nullif(birth, '')) > 1)",
        )

    def _reject(self, code: str, detail: str, condition: str) -> None:
        self._sql(
            f"update decision set outcome = ?, detail = ? where outcome = '' and {condition}",  # noqa: S608 - fixed text
            code,
            detail,
        )

    def labels(self) -> Iterator[str]:
        """Label of every image that stays."""
        for (label,) in self._sql("select given from decision where outcome = '' order by ordinal, frame"):
            yield label

    def usable(self) -> int:
        """Images that stay."""
        (count,) = self._sql("select count(*) from decision where outcome = ''").fetchone()
        return int(count)

    def codes(self) -> dict[str, int]:
        """Rejections per reason code, most frequent first."""
        rows = self._sql(
            "select outcome, count(*) from decision where outcome != '' group by outcome order by 2 desc, 1"
        )
        return dict(rows)

    def rejected_names(self) -> Iterator[tuple[int, int, str, str]]:
        """Position, frame, reason code and original name of everything turned away."""
        rows = self._sql(
            "select d.ordinal, d.frame, d.outcome, n.name from decision d join image i on i.id = d.id "
            "join name n on n.token = i.token where d.outcome != '' order by d.ordinal, d.frame, d.id"
        )
        for ordinal, frame, code, name in rows:
            yield ordinal, frame, code, name.decode("utf-8", "surrogateescape")

    def counts(self) -> dict[str, int]:
        """Images and patients that stay."""
        images, patients = self._sql(
            "select count(*), count(distinct person) from decision where outcome = ''"
        ).fetchone()
        return {"images": images, "patients": patients}

    def divide(self, fractions: SplitFractions, pseudonymiser: Pseudonymiser, seed: int) -> None:
        """Give every image its split.

        Images of a patient given for testing that are not for testing themselves are turned away. Patients with an
        image in common (same pixels) or a study in common are taken for one person.

        Raises:
            SourceError: If there are too few patients to divide.
        """
        members = [
            Member(patient=patient, label=name, given_test=bool(test))
            for patient, label, test in self._sql(
                "select distinct person, given, given_test from decision where outcome = '' order by 1, 2, 3"
            )
            for name in self._classes(label)
        ]
        links = [tuple(row) for column in ("pixel_key", "study") for row in self._linked(column)]
        splits = assign_splits(members, links=links, fractions=fractions, pseudonymiser=pseudonymiser, seed=seed)
        homes = {(member.patient, member.given_test): split for member, split in zip(members, splits, strict=True)}
        self._sql("create index if not exists temp.decision_person on decision (person)")
        for (patient, test), split in homes.items():
            self._sql(
                "update decision set chosen = ? where outcome = '' and person = ? and given_test = ?",
                split.value if split else "",
                patient,
                test,
            )
        self._reject("ID_CONFLICT", "the patient is also given for testing", "chosen = ''")

    def _classes(self, label: str) -> tuple[str, ...]:
        """Classes that decide where a patient goes; an empty one stands for none of them."""
        return joined_names(label) or ("",) if self.rule.multilabel else (label,)

    def _linked(self, column: str) -> Any:
        """Pairs of patients that share a value."""
        shared = (
            f"select {column} as value, min(person) as first from decision where outcome = '' and {column} != '' "  # noqa: S608 - fixed text
            f"group by {column} having count(distinct person) > 1"
        )
        return self._sql(
            f"select distinct d.person, shared.first from decision d join ({shared}) as shared "  # noqa: S608 - fixed text
            f"on d.{column} = shared.value where d.outcome = '' and d.person != shared.first"
        )

    def outcomes(self) -> Iterator[tuple[Accepted | Rejected, int]]:
        """Every image or rejection in the order of the scan, with its position in the spool."""
        row = 0
        cursor = self._sql(
            "select i.*, d.outcome as decided, d.detail as why, d.given, d.person, d.assumed, d.chosen "
            "from decision d join image i on i.id = d.id order by i.ordinal, i.frame, i.id"
        )
        names = [column[0] for column in cursor.description]
        for values in cursor:
            found = dict(zip(names, values, strict=True))
            if found["decided"]:
                yield (
                    Rejected(
                        ordinal=found["ordinal"], frame=found["frame"], code=found["decided"], detail=found["why"]
                    ),
                    -1,
                )
            else:
                yield _accepted(found, row), found["spooled"]
                row += 1


def _accepted(found: Mapping[str, Any], row: int) -> Accepted:
    instance = Instance(
        uid=found["uid"],
        patient=found["person"],
        label=found["given"],
        split=Split(found["chosen"]),
        row=row,
        **{name: found[name] for name in ("study", "modality", "view", "sex", "age_band", "site", "pixel_key")},
    )
    flags = (*found["flags"].split(), *found["assumed"].split())
    return Accepted(ordinal=found["ordinal"], frame=found["frame"], instance=instance, flags=flags)
