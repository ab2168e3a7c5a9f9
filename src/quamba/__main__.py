"""``python -m quamba``: the command ``quamba``."""

from quamba.cli.main import main

main()
