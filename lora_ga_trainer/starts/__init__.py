"""
Starts: from an adapter as PEFT makes it to factors that are written and reported.

The highest wing: it may import every other one. Start reading in `start`, the whole of it in one function. `prepare`
comes before the optimizer, `compute` makes the factors, `head_warmup` trains fresh heads first, `report` and
`tracking` say what was done.
"""
