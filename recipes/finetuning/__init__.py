"""What the programs that train share: arguments, models, rows and their encoding, the trainer, what is measured."""
