"""Turning texts and images into model inputs, for calibration and for evaluation alike."""
