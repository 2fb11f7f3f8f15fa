"""The optimizers of ``MEGDET.OPTIMIZER``, for large mini-batches (docs/large_batch.md)."""
