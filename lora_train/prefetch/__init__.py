"""Fetching what a run needs while there is network: pinned, hashed, and loaded again without.

contents  what the model, the data and the files beside them consist of, here or on the hub
fetching  into the hub cache or a bundle, every file by its hash
manifest  what was fetched, as a file that can be checked later
trial     a process without network that loads all of it as a run does
"""
