"""vLLM as a rollout worker. ``worker.py`` is what a trainer calls, and imports no engine; the rest runs where vLLM does."""
