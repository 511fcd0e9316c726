"""What two ends of an update say to each other, as pure state machines: events in, actions out. No socket, clock or thread.

``sender`` and ``receiver`` hold the two machines, ``messages`` what they exchange, ``wire`` its bytes, ``steps`` the events and
actions, ``line`` the order of messages and what time has to do with them.
"""
