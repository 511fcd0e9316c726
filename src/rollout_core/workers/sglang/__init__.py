"""SGLang as a rollout worker: its Engine in a process of its own, or a server by HTTP."""
