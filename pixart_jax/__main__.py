"""`python -m pixart_jax`: the same as the console script `pixart`."""

from pixart_jax.cli import main

main()
