"""Names of the tensors in batch.extras of an RL update, (B, S) each."""

# of rl/packing.py: 0 or False where there is no response
RESPONSES = "responses"  # bool: the target is a token of a response
ADVANTAGES = "advantages"  # of the response, at each of its tokens; rl/returns.py replaces them by those of the tokens
BEHAVIOUR = "behaviour_logprobs"  # as sampled
WHOLE = "whole_logprobs"  # of the same policy, before tokens were left out of what it sampled from; only where they were

# predictions before the first update of a round, at every position
PROXIMAL = "proximal_logprobs"  # under off_policy=staged from rl/packing.py too
REFERENCE = "reference_logprobs"
VALUES = "values"

RETURNS = "returns"  # what the value head learns
