"""
Gradients: the probe, which runs training samples through the model and collects `dL/dW` of every adapted weight.

It imports `saving`, `adapters`, `engines`, `maths` and the config. Start reading in `probe`, the passes. `samples`
gives it micro-batches, `borrow` gives everything back afterwards, `tap` shows it `x` and `dy` of a layer,
`accumulator` and `sketch` add them up, `estimate` is what comes out and `probe_file` keeps it.
"""
