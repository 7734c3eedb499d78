"""The client app."""

from tesserafl.engines.flower.client import app

__all__ = ["app"]
