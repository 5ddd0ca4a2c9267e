"""
Optimizers: LoRA-Pro around any optimizer or as its own AdamW, and what builds them for a Trainer.

It imports `adapters`, `engines` and `maths`. Start reading in `build`. `pairs` stacks the factors of many layers,
`wrapper` and `adamw` are the two optimizers, `engine_step` does their work where an engine steps by itself.
"""
