"""A simulated GPU for machines without one; README.md says what it finds."""
