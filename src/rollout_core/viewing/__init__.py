"""Looking at a conversation: what each turn added, as a table and as a picture. The command is ``rollout-core conversation``."""
