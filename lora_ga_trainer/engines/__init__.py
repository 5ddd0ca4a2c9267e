"""
Engines: one process, DDP, FSDP and DeepSpeed ZeRO, and the devices under them.

The only wing that knows them; it imports no other wing. Start reading in `support`, what is refused and who steps.
`parameters` brings full values in and out of sharded weights, `collectives` is the communication between processes,
`devices` the random numbers and the dtypes of a device.
"""
