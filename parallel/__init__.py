"""Who holds what, and when it moves: experts, tokens, gradients, balance."""
