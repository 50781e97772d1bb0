"""Tasks with verifiable rewards."""
