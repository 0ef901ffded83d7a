"""From a conversation or a preference pair to token ids, labels and loss weights."""
