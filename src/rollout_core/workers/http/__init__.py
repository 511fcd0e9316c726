"""Engines behind HTTP: a client that never mistakes a failure for an answer, and server processes that leave nothing behind."""
