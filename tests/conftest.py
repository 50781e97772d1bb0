"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch is imported anywhere: on two cores, several ranks with two threads each would fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

settings.register_profile("tessera", deadline=None)  # timings never decide a test
settings.load_profile("tessera")
