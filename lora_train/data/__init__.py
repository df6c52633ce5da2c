"""From files or a hub dataset to packed micro-batches with labels.

sources -> formats -> rendering -> tokenizing -> packing, held together and cached by `prepared`;
`batches` is what the trainer reads at each step, `audit` stands between bad labels and a GPU hour.
"""
