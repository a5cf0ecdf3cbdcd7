"""`python -m cag`: the command line."""

from cag.cli import main

if __name__ == "__main__":
    main()
