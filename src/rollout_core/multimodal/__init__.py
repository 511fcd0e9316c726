"""Multimodal conversations that grow by deltas."""
