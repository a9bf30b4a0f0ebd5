"""Training with a sparsity penalty: trainer, data, objectives, coherence."""
