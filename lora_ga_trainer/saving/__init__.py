"""
Files: what a folder says of an adapter's start, and what is checked before one is loaded.

It imports `adapters`, `engines` and `maths`. Start reading in `record`, the file `lora_ga.json`. `resume` and `intact`
look at checkpoints before training goes on from one, `checkpoint` writes and reads the adapter where a trainer does
not, `load` and `export` are the user's ways in and out.
"""
