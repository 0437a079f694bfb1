"""The only place where a guarantee can be made."""

from medistill.privacy.curator import OpenCurator

__all__ = ["OpenCurator"]
