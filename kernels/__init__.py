"""Pure functions on tensors: each operation of an MoE layer beside its plain-torch reference."""
