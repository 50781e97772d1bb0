"""Models, data, optimisation and checkpoints: one training process, and the group that Ray makes of them."""
