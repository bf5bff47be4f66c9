"""CTMSR: one-step generative super-resolution, as functions on tensors and arrays."""
