"""`python -m sftd` is the `sftd` command."""

from sftd.cli import main

if __name__ == "__main__":
    main()
