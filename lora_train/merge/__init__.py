"""Merging: an adapter added into its base model, with a proof that the sum is the same model."""
