"""`python -m ncalign`, the form that torchrun starts."""

from ncalign.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
