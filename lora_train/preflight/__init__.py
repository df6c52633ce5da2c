"""Checks before anything heavy: what the run would stumble over later, said at once.

A check is a function of the machine and the configuration that returns `Finding`s. `runner` runs
them, each in a thread of its own and for a few seconds at most; none imports torch.
"""
