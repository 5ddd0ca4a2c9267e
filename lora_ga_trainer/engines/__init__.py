"""
Engines: one process, DDP, FSDP and DeepSpeed ZeRO, and the devices under them.

The only wing that knows them. It imports no other wing. Start reading in `support`: what is refused, and who takes the
step. `parameters` brings full values in and out of sharded weights, `collectives` is the communication between
processes, `devices` the precision and the random numbers of a device.
"""
