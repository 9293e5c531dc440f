"""From prompts to answers, and from answers to scores."""
