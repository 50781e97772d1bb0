"""FSMoE, arXiv 2501.10714: what the parts of an MoE layer cost, and in which order and chunks they should run. Pure."""
