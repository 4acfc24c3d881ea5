"""Looking at models: summaries, explanations, pictures."""
