"""What is read from disk and from the Hub, and what is written for other tools: models and adapters in their published layouts."""
