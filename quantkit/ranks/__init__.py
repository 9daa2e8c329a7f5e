"""Several processes that do one conversion together, a GPU each (SPMD on torch.distributed): who they are, what they
exchange, how they are started. Nothing here knows models or files."""
