"""Frozen sparse autoencoders: loading, identity, and what a steering layer needs of them."""
