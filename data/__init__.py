"""What crosses the border of the device: datasets in, run records out."""
