"""What made a run: its receipt, written by each start into environment.json."""
