"""`python -m plait.cli`, where the `plait` script is not on the path."""

from plait.cli.main import main

main()
