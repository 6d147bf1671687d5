"""Tensor operations of the executor: the plain torch specification and the place that chooses implementations."""
