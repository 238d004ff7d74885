"""INT8: calibration, quantizers one a file, and the search that holds an accuracy budget."""
