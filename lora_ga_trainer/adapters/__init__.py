"""
Adapters: which layers carry LoRA, and how their factors are stored.

The only wing that knows the insides of PEFT; it imports `engines` and `maths`. Start reading in `layer`, one adapted
layer; `conv`, `parameter` and `attention` are those that are not linear. `host` finds where in a model its adapter is,
`find` lists the layers, `storage` holds the modules of factors in delta form, `anchor` puts them in, `frozen` lets `B`
alone train.
"""
