"""Time limit of a test. Only a hang reaches it; a shorter limit would fail on a busy machine."""

HANG = 3600  # seconds
