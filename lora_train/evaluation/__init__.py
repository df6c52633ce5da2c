"""Evaluation of a model on rows: what is asked, measured, compared and written down."""
