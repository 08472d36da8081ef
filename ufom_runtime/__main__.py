"""`python -m ufom_runtime`: the `ufom` command."""

from ufom_runtime.command.cli import main

if __name__ == "__main__":
    main()
