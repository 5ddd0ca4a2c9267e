"""
Learning rates: how large a rate the loss bears along the optimizer's own first updates.

`find` asks the trainer, `updates` takes the first steps on copies, `search` looks along them, `apply` hands the rate
to the optimizer and the schedule, `report` tells what was found.
"""
