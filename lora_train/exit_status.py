"""Exit statuses of `lora-train`, in one place: scripts and schedulers act on them."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
STOPPED = 75
"""Stopped on request with a checkpoint written (EX_TEMPFAIL of sysexits.h: try again later)."""
REQUEUE = 85
"""The same, and the Slurm job asks to be queued again: the batch script runs scontrol requeue."""

EXIT_STATUS_HELP = f"""\
exit status:
  {OK}   the run is complete
  {FAILED}   the run failed; the last good checkpoint is kept, and the message says how to go on
  {USAGE}   wrong command line, configuration, data or machine; nothing was started
  {STOPPED}  stopped by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, with a checkpoint once training
      began; the same command goes on from there
  {REQUEUE}  the same with resume.requeue=true; the batch script queues the Slurm job again"""
