"""What `python -m launch.bench` measures: one module a benchmark, its peers beside it."""
