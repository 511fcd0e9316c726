"""Measurements, each beside its baseline in the same run. Ratios carry over between machines better than milliseconds do."""
