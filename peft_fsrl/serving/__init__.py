"""FSRL adapters where models are served: a plugin for vLLM."""
