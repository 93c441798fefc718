"""`python -m lyco_lab` is `lyco-lab`."""

from lyco_lab.cli import main

if __name__ == "__main__":
    main()
