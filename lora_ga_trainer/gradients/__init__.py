"""
Gradients: the probe, which runs training samples through the model and collects `dL/dW` of every adapted weight.

It imports `saving`, `adapters`, `engines`, `maths` and the config. Start reading in `probe`, the passes. `samples`
gives it micro-batches in the `order` asked for, `borrow` gives everything back afterwards (`state` and `model_state`
find what objects keep in themselves), `tap` shows it `x` and `dy` of a layer,
`accumulator` and `sketch` add them up, `estimate` is what comes out and `probe_file` keeps it.
"""
