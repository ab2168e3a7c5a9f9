"""``python -m quamba``: the command ``quamba``."""

from quamba.cli.main import main

if __name__ == "__main__":  # processes of its own import this file, too
    main()
