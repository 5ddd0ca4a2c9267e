"""
Adapters: which layers carry LoRA, and how their factors are stored.

The only wing that knows the insides of PEFT; it imports `engines` and `maths`. Start reading in `layer`, one adapted
layer; `find` lists those of a model, `storage` holds the modules of factors in delta form, `anchor` puts them in.
"""
