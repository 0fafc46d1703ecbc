"""Run the command line with ``python -m dither``."""

from dither.cli import main

if __name__ == "__main__":
    main()
