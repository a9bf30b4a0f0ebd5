"""The ``peft-fsrl`` program."""
