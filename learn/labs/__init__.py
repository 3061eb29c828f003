"""Experiments that need the known truth of the simulated market. `run.py` runs them."""
