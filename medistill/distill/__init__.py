"""Distillers: one file per algorithm, each a frozen record of its published settings."""

from medistill.distill.runner import Distillation, distill, make_recipe, resolve_method, run_recipe

__all__ = ["Distillation", "distill", "make_recipe", "resolve_method", "run_recipe"]
