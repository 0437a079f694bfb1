"""Distillers: one file per algorithm, each a frozen record of its published settings."""

from medistill.distill.private import Prospect, distill_privately, foresee
from medistill.distill.runner import Distillation, distill, make_recipe, resolve_method, run_recipe

__all__ = [
    "Distillation",
    "Prospect",
    "distill",
    "distill_privately",
    "foresee",
    "make_recipe",
    "resolve_method",
    "run_recipe",
]
