"""`python -m moorline.cli` is `moor`."""

from moorline.cli import main

main()
