"""TesseraFL as a Flower app."""
