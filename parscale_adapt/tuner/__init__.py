"""The PEFT method: configuration, layers, switching, saving and loading."""
