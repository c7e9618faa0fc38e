"""Configurations of other trainers, as options of the scripts here."""
