"""`python -m storm_vlm` is `storm`."""

from storm_vlm.cli import main

main()
