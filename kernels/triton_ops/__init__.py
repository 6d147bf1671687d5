"""The tensor operations as Triton kernels, one file each, with the reference's names and meanings. Knows no model."""
