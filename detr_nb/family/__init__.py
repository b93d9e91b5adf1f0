"""Detectors that grew from DETR: each is DETR but for a few visible lines."""
