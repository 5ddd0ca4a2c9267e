"""What `compare.py` is made of: arms, their starts, one run, the sweep over rates and seeds, what comes out."""
