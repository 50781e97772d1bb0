"""Pure functions on tensors: each operation of an MoE layer, with its plain-torch reference."""
