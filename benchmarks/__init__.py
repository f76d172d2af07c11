"""Benchmarks: operators, training steps, both on a GPU (`gpu_bench`); see CONTRIBUTING.md."""
