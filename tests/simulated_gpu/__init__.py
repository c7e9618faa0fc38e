"""A simulated GPU for machines without one; README.md lists the faults it detects."""
