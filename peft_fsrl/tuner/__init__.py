"""The PEFT method: configuration, layers, model, placement and saved folders."""
