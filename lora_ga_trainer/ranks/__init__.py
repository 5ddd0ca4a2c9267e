"""
Ranks: how large the adapter of each layer should be, under a number of parameters for all.

`find` asks the trainer, `evidence` probes for what a rule needs, `plan` is what comes out, `apply` makes the adapter
anew. The rules themselves are maths: `lora_ga_trainer.maths.ranks`.
"""
