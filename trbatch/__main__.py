"""`python -m trbatch` is the command line."""

from trbatch.cli import main

if __name__ == "__main__":
    main()
