"""Parts of `compare.py`: arms, their starts, one run, the sweep over rates and seeds, and the outcome."""
