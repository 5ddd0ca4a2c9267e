"""
Analysis: what training did to the weights, read from a saved adapter, and what can be made of several.

It imports `starts`, `gradients`, `saving`, `adapters`, `engines` and `maths`. Start reading in `analyse`, the figures
of every layer. `base` reads the weights under an adapter, from files or a model, `directions` those that the start
came from, `report` tells it all. `intruders` writes an adapter with its intruder dimensions scaled down, `average` one
of several, `callback` looks at every checkpoint.
"""
