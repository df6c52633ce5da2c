"""Runs that are repeated, or broken and gone on with, and compared with the first one."""
