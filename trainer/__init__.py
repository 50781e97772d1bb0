"""Models, data, optimisation and checkpoints: one training process, and the group that Ray makes of them."""

import gc

# Importing torch, Ray and DeepSpeed makes 360,000 objects that stay as long as the process. With Python's own threshold of 700,
# looking for garbage among them again and again is a fifth of what a start computes. `memory.keep_imports` sets it back.
THRESHOLD = gc.get_threshold()
gc.set_threshold(50_000)
