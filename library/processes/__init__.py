"""The processes of a run: ranks, launcher, and what they exchange."""
