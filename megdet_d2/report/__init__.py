"""Reads finished runs and draws them: curves, tables and detections, as PNG files and a page."""
