"""``python -m medistill`` is the command ``medistill``."""

from medistill.cli import main

main()
