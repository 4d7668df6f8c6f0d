"""`python -m seriatim` is `seriatim`."""

from seriatim.cli.main import main

main()
