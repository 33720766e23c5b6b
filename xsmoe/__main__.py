"""`python -m xsmoe` is the command `xsmoe`."""

from xsmoe.cli import main

if __name__ == "__main__":
    main()
