"""`python -m profuser COMMAND`, as the console script."""

from profuser.cli import main

if __name__ == "__main__":
    main()
