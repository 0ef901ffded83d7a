"""Commands: what a user types, the processes it starts and how it ends."""
