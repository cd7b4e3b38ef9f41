"""`python -m tl_lenses` is the command `tl-lenses`."""

from tl_lenses.cli import main

if __name__ == "__main__":
    main()
