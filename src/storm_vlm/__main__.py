"""`python -m storm_vlm` is `storm`."""

from storm_vlm.cli.main import main

main()
