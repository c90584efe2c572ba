"""Training: one resumable loop for the alignment block and the animator."""
