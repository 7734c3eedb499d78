"""TesseraFL: train models larger than any participant can hold, from many small devices."""

__version__ = "0.1.0"
