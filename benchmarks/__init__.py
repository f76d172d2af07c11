"""Benchmarks: operators (`test_ops`) and training steps (`train_step`), see CONTRIBUTING.md."""
