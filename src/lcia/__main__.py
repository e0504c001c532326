"""`python -m lcia` is the command `lcia`."""

from lcia.cli import main

main()
