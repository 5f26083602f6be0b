"""Serves streams over a network: a live page, sockets, WebRTC, jobs. `python -m serve --help`."""
