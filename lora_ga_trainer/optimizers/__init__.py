"""
Optimizers: LoRA-Pro around any optimizer or as its own AdamW, PEFT's, and the registry that a config chooses from.

It imports `adapters`, `engines` and `maths`. Start reading in `registry`, the list of optimizers. `builders` makes
each of them, `build` checks and builds the chosen one. `wrapper` and `adamw` are LoRA-Pro's two, `moments` the maths
of the second. `pairs` finds the factors that are stepped together, `batches` stacks them. `engine_step` does the work
where an engine steps by itself. `weight_decay` and `lockstep` refuse an optimizer that anchored factors can't have.
"""
