"""The batch script of a job. `slurm/*.slurm` are what it makes of no particular cluster."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Time to save in, of a job that runs for so long; a short one is told at three quarters.
_SECONDS_TO_SAVE = 300

_COLUMN = 38

_IMAGE = r"""refuse() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}
# Singularity by either of its names: on PATH, or a module of this cluster.
container() { type -P singularity apptainer | head -n 1; }
for name in singularity apptainer; do
  [ -n "$(container)" ] || module load "$name" 2>/dev/null || :
done
[ -n "$(container)" ] || refuse \
  "no singularity or apptainer on PATH, nor by module: $(module load singularity apptainer 2>&1)" \
  "module load NAME here, of \`module avail\`; #!/bin/bash -l as line 1 makes \`module\` known"
@IMAGE@
[ -e "$LORA_SIF" ] || refuse "no image $LORA_SIF on $(uname -n), in $PWD" \
  "@HINT@"
# Caches go to project or scratch storage, or to the folder that LORA_CACHE_DIR names.
if [ -n "${LORA_CACHE_DIR:-}" ]; then
  LORA_CACHE_DIR=$(realpath -m "$LORA_CACHE_DIR")
  export LORA_CACHE_DIR
  create=(mkdir -p "$LORA_CACHE_DIR")
  [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] || create=(srun "${create[@]}")
  "${create[@]}" || refuse "LORA_CACHE_DIR=$LORA_CACHE_DIR: no such folder can be made" \
    "LORA_CACHE_DIR=/scratch/... sbatch ..."
fi
"""

_BEGIN = r"""job=$SLURM_JOB_ID
# the last task of an array has the array's own number, which means all of its tasks
[ "${SLURM_ARRAY_JOB_ID:-}" != "$job" ] || job=${job}_$SLURM_ARRAY_TASK_ID
# When the job ends, for the run to save in time: an older Slurm does not tell it.
end=$(SLURM_TIME_FORMAT=%s squeue -h -j "$job" -o %e 2>/dev/null) || :
case $end in [1-9]*) export SLURM_JOB_END_TIME=$end ;; esac
left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
[ "$left" -ge @SHORT@ ] || echo "warning: $left s to the end of the job, and --signal=TERM@@LEAD@" \
  "stops the run so many seconds before it: sbatch --signal=TERM@60 ... leaves more" >&2

# scancel and preemption send SIGTERM to this shell too: it must stay until the run has saved.
trap : TERM
echo "job $job starts $(date +%FT%T%z) on $SLURM_JOB_NODELIST"
# Nodes save and end one after the other: the first to end must not have the others killed, and
# what is left 5 minutes later hangs.
status=0
srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
"""

_IN_IMAGE = (
    '  "$(container)" run --nv ${LORA_CACHE_DIR:+--bind="$LORA_CACHE_DIR"}@BINDS@ "$LORA_SIF" \\\n'
)

_END = r"""echo "job $job ends $(date +%FT%T%z) with exit status $status"

# 75: saved; 85: and resume.requeue=true wants to go on. A preempted job goes on with either; one
# that scancel ends stays ended, though Slurm would bring it back as well.
case $status in 75 | 85) ;; *) exit "$status" ;; esac
for seconds in 0 20 20 20 20; do # Slurm may be too busy to answer
  sleep "$seconds"
  state=$(SLURM_TIME_FORMAT=%s scontrol show job "$job") || continue
  case $status$state in
    *PreemptTime=[0-9]* | 85*JobState=RUNNING* | 85*Reason=TimeLimit*) ;;
    *) exit "$status" ;;
  esac
  scontrol requeue "$job" && exit "$status"
done
echo "error: job $job is not queued again" >&2
echo "hint: give the same sbatch line again: the run goes on" >&2
exit "$status"
"""


@dataclass(frozen=True, kw_only=True)
class JobScript:
    """What a batch script asks for, and what it runs."""

    introduction: Sequence[str]
    """Lines of the comment at its head."""
    nodes: int = 1
    gpus_per_node: str = "1"
    """Their number, or kind:number."""
    cpus_per_node: int
    """CPUs of the one task of each node."""
    memory_per_node: str | None
    """As Slurm writes it: 60G; None: Slurm's default."""
    seconds: int
    """Time limit."""
    name: str = "lora-train"
    """Of the job."""
    output: str = "%x-%j.out"
    """File that gets what the job prints."""
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    """Features of the nodes."""
    image: Path | None = None
    """The SIF. None: LORA_SIF, which the user may set, or lora.sif."""
    program: Path | None = None
    """`lora-train` of an installation, which is run in place of an image."""
    binds: Sequence[Path] = ()
    """Folders that the image's container is to show."""
    words: Sequence[str] = ()
    """Command line of the run; what stands behind the script's name is added to it."""

    def text(self) -> str:
        """Return the script."""
        head = ["#!/usr/bin/env bash", *(f"# {line}".rstrip() for line in self.introduction)]
        head += [_line(*option) for option in self._options() if option[1] is not None]
        words = " ".join([*map(shlex.quote, self.words), '"$@"'])
        binds = "".join(f" --bind={_quoted(folder)}" for folder in self.binds)
        begin = _BEGIN.replace("@LEAD@", str(self._lead)).replace(
            "@SHORT@", str(self._lead * 6 // 5)
        )
        body = begin + _IN_IMAGE.replace("@BINDS@", binds)
        if self.program is not None:
            body = f"{begin}  {_quoted(self.program)} \\\n"
        elif self.image is not None:
            hint = "lora-train sbatch --sif FILE writes this file for another one"
            body = _find_image(_quoted(self.image), hint) + body
        else:
            body = (
                _find_image("${LORA_SIF:-lora.sif}", "LORA_SIF=/path/to/lora.sif sbatch ...") + body
            )
        return "\n".join(head) + f"\n\n{body}  {words} || status=$?\n{_END}"

    @property
    def _lead(self) -> int:
        """Seconds before the end at which the run is told to save."""
        return min(_SECONDS_TO_SAVE, self.seconds // 4)

    def _options(self) -> list[tuple[str, str | None, str]]:
        """Options of sbatch with their values, None for those that are left out, and comments."""
        lead = self._lead
        told = f"{lead // 60} minutes" if lead % 60 == 0 else f"{lead} s"
        return [
            ("job-name", self.name, ""),
            ("output", self.output, "%x: name, %j: number of the job"),
            ("partition", self.partition, ""),
            ("account", self.account, ""),
            ("constraint", self.constraint, ""),
            ("nodes", str(self.nodes), ""),
            ("ntasks-per-node", "1", "lora-train starts a process for each GPU"),
            ("gpus-per-node", self.gpus_per_node, "no --gres: this overrules it"),
            ("cpus-per-task", str(self.cpus_per_node), "for all GPUs of a node"),
            ("mem", self.memory_per_node, "of each node"),
            ("time", format_time(self.seconds), ""),
            ("signal", f"TERM@{lead}", f"{told} before the end: save, and stop"),
            ("requeue", "", "after a failure of the node or preemption"),
            ("open-mode", "append", "a job that comes back goes on in its output file"),
        ]


def format_time(seconds: int) -> str:
    """Return a time limit as Slurm writes it: 2:00:00, 1-12:00:00."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    clock = f"{hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{days}-{clock}" if days else clock.removeprefix("0")


def _find_image(image: str, hint: str) -> str:
    return _IMAGE.replace("@IMAGE@", f"LORA_SIF={image}").replace("@HINT@", hint)


def _line(option: str, value: str | None, comment: str) -> str:
    line = f"#SBATCH --{option}" + (f"={value}" if value else "")
    return f"{line:<{_COLUMN}}# {comment}" if comment else line


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
