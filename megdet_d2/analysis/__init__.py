"""What became of a training: curves, detections and numbers from its OUTPUT_DIR."""
