"""medistill: medical images that may not be shared, turned into a small synthetic release that trains a model."""

__version__ = "0.1.0"
