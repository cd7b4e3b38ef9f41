"""Which lens should I believe? What a lens reads that is not said, and whether the model uses what it reads."""
