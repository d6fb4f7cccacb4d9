"""`python -m profuser COMMAND` does the same as the console script `profuser COMMAND`."""

from profuser.cli import main

if __name__ == "__main__":
    main()
