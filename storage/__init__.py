"""What is on disk and on the Hub: models in the published layout, adapters in PEFT's, atomic files."""
