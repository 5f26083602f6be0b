"""How long a test waits. Only a hang takes this long: a shorter limit would fail on a busy machine."""

HANG = 3600  # seconds
