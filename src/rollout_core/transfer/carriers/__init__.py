"""Carriers: how an update's messages and bytes get from the sender to its receivers. ``contract`` says what one has to do.

Each is imported by its module, so that none loads what only another needs.
"""
