"""What passes want to know about activations, collected in one sweep over the samples."""
