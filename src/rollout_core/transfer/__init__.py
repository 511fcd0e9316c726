"""Moving buckets between processes: shared memory and the channel that says what lies in it."""
