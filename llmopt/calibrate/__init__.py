"""Calibration: step times of the programs, fitted to measured profiles or to benchmark logs."""
