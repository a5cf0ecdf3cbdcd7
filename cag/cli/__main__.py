"""`python -m cag.cli`."""

from cag.cli import main

if __name__ == "__main__":
    main()
