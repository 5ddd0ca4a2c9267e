"""
Pure maths: tensors in, tensors out.

No module here knows of a model, an optimizer, a file or a process, and none imports another wing. Start reading in
`factors`, the two starts, then `inits`, the registry that names them. `recovery` turns sketches into singular vectors,
`lora_pro` corrects gradients.
"""
