"""Flower's own FedAvg, as its documentation writes it."""
