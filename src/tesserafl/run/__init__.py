"""Runs: configuration, rounds, evaluation, checkpoints, events and reports."""
