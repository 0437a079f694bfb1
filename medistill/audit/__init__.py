"""How much a release gives away: attacks on patients, each beside a positive and a negative control."""

from medistill.audit.runner import AuditPolicy, audit, require_patients

__all__ = ["AuditPolicy", "audit", "require_patients"]
