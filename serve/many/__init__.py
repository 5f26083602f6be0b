"""One door for the servers of several machines: it places sessions, passes them on, and repeats lost jobs."""
