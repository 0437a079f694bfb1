"""The only place where a guarantee can be made."""

from medistill.privacy.curator import OpenCurator, PrivateCurator
from medistill.privacy.ledger import Ledger

__all__ = ["Ledger", "OpenCurator", "PrivateCurator"]
