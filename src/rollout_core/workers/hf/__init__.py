"""A transformers causal language model as a rollout worker: the reference that other engines are held against."""
