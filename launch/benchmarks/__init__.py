"""The benchmarks of `python -m launch.bench`: one module each, with its competitors."""
