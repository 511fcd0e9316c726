"""What an operator runs before a training run: checks of a rollout worker, and a look at how a model is laid out in buckets."""
