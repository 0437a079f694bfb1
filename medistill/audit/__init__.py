"""How much a release gives away: attacks on patients, each beside a positive and a negative control."""

from medistill.audit.attack import Exposed
from medistill.audit.guesses import attributes_of
from medistill.audit.policy import AuditPolicy
from medistill.audit.pool import require_patients
from medistill.audit.record import outcome_lines, read_pictures, write_audit
from medistill.audit.runner import audit, audit_images

__all__ = [
    "AuditPolicy",
    "Exposed",
    "attributes_of",
    "audit",
    "audit_images",
    "outcome_lines",
    "read_pictures",
    "require_patients",
    "write_audit",
]
