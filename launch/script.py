"""The text of a job's script. Pure: no file, no process, no clock. Everything that a user gives is quoted.

The script starts one task per process with srun and owns what happens after: it reads the exit code and puts the job
back into the queue, or does not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpscale.errors import InputError
from launch.profiles import Profile
from launch.resources import Resources, format_time

# sbatch reads its own comment lines with a tokenizer of its own, and % and \ are patterns in file names.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+=@,:~ -]+")
MAX_FRUITLESS = 10  # times that a job may save and come back without one new durable step

HEAD = """\
umask 077
trap : TERM USR2  # the tasks handle both; this shell waits for srun and then decides
dpscale_restart=${SLURM_RESTART_COUNT:-0}
# One element of a job array has the array's own number: SLURM must be asked about that element alone.
dpscale_job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
dpscale_job=${dpscale_job:-$SLURM_JOB_ID}
dpscale_ends=$dpscale_run/attempts/$SLURM_JOB_ID.ends

dpscale_durable() {  # the newest step whose checkpoint is whole, 0 when there is none
  local newest=0 file step
  for file in "$dpscale_run"/ckpt/*/manifest.json; do
    step=${file%/manifest.json} step=${step##*/}
    if [[ -e $file && $step =~ ^[0-9]+$ ]] && (( 10#$step > newest )); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

dpscale_count() { if [[ -e $dpscale_ends ]]; then grep -c "$1" "$dpscale_ends"; else echo 0; fi; }

dpscale_ended() {  # 0 and 2 are final, 75 was saved and goes on, anything else is a crash
  local code=$? durable decision=final state advanced=0
  trap - EXIT
  durable=$(dpscale_durable)
  (( durable > dpscale_before )) && advanced=1
  state=$(scontrol show job "$dpscale_job" -o 2>/dev/null | grep -oE ' (JobState=RUNNING|Reason=TimeLimit) ')
  case $code in
    0 | 2) ;;
    75 | 140)  # 140: USR2 came before Python could listen, or while files were staged
      if (( advanced || $(dpscale_count '"advanced":0,"decision":"requeue"') < dpscale_max_fruitless )); then
        decision=requeue
      else
        decision=gave-up
      fi ;;
    *)
      if (( advanced && $(dpscale_count '"decision":"requeue-after-crash"') < dpscale_max_crashes )); then
        decision=requeue-after-crash
      else
        decision=gave-up
      fi ;;
  esac
  # Cancelled, preempted or requeued from outside: what comes next is decided already. At the time limit it is not.
  [[ $decision == requeue* && -z $state ]] && decision=slurm-decides
  [[ $decision == requeue-after-crash && -e $dpscale_run/STOP ]] && decision=final
  printf '{"restart":%d,"code":%d,"durable_step":%d,"advanced":%d,"decision":"%s","at":%d}\\n' \\
    "$dpscale_restart" "$code" "$durable" "$advanced" "$decision" "$(date +%s)" >>"$dpscale_ends"
  echo "dpscale: job $dpscale_job, restart $dpscale_restart: exit code $code, durable step $durable: $decision"
  if [[ $decision == requeue* ]] && ! scontrol requeue "$dpscale_job"; then
    echo "dpscale: this job cannot be requeued: go on with dpscale resume $(printf %q "$dpscale_run")"
  fi
  exit "$code"
}

mkdir -p -- "$dpscale_run/attempts" || exit 2
dpscale_before=$(dpscale_durable)
if (( dpscale_restart > 0 )) && [[ -e $dpscale_run/finished || -e $dpscale_run/STOP ]]; then
  echo "dpscale: the run has finished, or its owner stopped it: nothing to do"
  exit 0
fi
trap dpscale_ended EXIT
"""

MEETING = """\
# The tasks meet on this node, the first one; its name need not resolve, and a container may have no scontrol.
export DPSCALE_HEAD_NODE=$SLURMD_NODENAME DPSCALE_HEAD_ADDRESS
DPSCALE_HEAD_ADDRESS=$(scontrol show node "$SLURMD_NODENAME" -o | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
# srun takes the number of CPUs from here only, since SLURM 22.05.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
"""
HEAD += MEETING

DEADLINE = """\
# Asked last: SLURM signals steps alone, and brings forward the end of a job that it preempts before its first step.
dpscale_end=$(squeue -h -j "$dpscale_job" -o %e 2>/dev/null)
if [[ $dpscale_end == *T* ]]; then export DPSCALE_DEADLINE; DPSCALE_DEADLINE=$(date -d "$dpscale_end" +%s); fi
"""

SRUN_OPTIONS = ("--kill-on-bad-exit=1", "--wait=60", "--unbuffered")


@dataclass(frozen=True)
class Job:
    """One job, complete: where it runs, what, and how.

    `run_dir`: absolute; `python`: the interpreter in the job; `working_directory`: relative paths of the config are
    relative to it; `sbatch_args`, `srun_args`: after the profile's own; `points`: (run directory, config) of each
    element of a job array, which then replace `run_dir` and `config`; `task_words`: what Python runs in each task
    instead of the training of `config`.
    """

    name: str
    run_dir: str
    config: str
    python: str
    working_directory: str
    resources: Resources
    profile: Profile
    overrides: tuple[str, ...] = ()
    new_attempt: bool = False
    sbatch_args: tuple[str, ...] = field(default=())
    srun_args: tuple[str, ...] = field(default=())
    points: tuple[tuple[str, str], ...] = ()
    task_words: tuple[str, ...] = ()

    @property
    def stop_margin_s(self) -> int:
        """Before the end of the job; a quarter of a short job at most."""
        return int(min(self.profile.stop_margin_s, self.resources.time_s / 4))

    @property
    def job_log(self) -> str:
        """SLURM's pattern of the file that gets the script's own output."""
        return f"{self.run_dir}/attempts/job-%j.log"

    @property
    def log_needs_redirect(self) -> bool:
        """Whether the log's path cannot be written into a comment line of sbatch."""
        return bool(self.points) or PLAIN_PATH.fullmatch(self.run_dir) is None


def render(job: Job) -> str:
    """The script for plain sbatch."""
    lines = ["#!/bin/bash", *header(sbatch_options(job)), "", *body(job)]
    return "\n".join([*lines, "", *srun_lines(job), ""])


def sbatch_options(job: Job) -> dict[str, str | None]:
    """Long options of sbatch, None where there is no value, in the order in which they are printed."""
    resources, profile = job.resources, job.profile
    options: dict[str, str | None] = {
        "job-name": job_name(job.name),
        "nodes": str(resources.nodes),
        "ntasks-per-node": str(resources.tasks_per_node),
    }
    if resources.gpus_per_node:
        value = str(resources.gpus_per_node)
        options[profile.gpu_option] = f"gpu:{value}" if profile.gpu_option == "gres" else value
    optional = {
        "cpus-per-task": resources.cpus_per_task,
        "mem": profile.mem_per_node,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
    }
    options |= {name: str(value) for name, value in optional.items() if value is not None}
    if profile.exclusive:
        options["exclusive"] = None
    options |= {
        "time": format_time(resources.time_s),
        "signal": f"USR2@{job.stop_margin_s}",
        "requeue": None,
        "open-mode": "append",
        "output": "/dev/null" if job.log_needs_redirect else job.job_log,
    }
    if job.points:
        options["array"] = f"0-{len(job.points) - 1}"
    for argument in (*profile.sbatch_args, *job.sbatch_args):
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not re.fullmatch(r"[a-z][a-z-]*", name):
            raise InputError(f"sbatch argument {argument!r}: write a long option, --name or --name=value")
        options[name] = value if equals else None
    return options


def header(options: Mapping[str, str | None]) -> list[str]:
    """`#SBATCH` lines. Raises: InputError for a value with a line break, which would end the comment."""
    lines = []
    for name, value in options.items():
        if value is not None and (not value.isprintable() or not value):
            raise InputError(f"--{name}={value!r}: give a value of printable characters")
        lines.append(f"#SBATCH --{name}" + ("" if value is None else f"={_sbatch_quoted(value)}"))
    return lines


def body(job: Job) -> list[str]:
    """Everything between the options and srun: data, the end's rules, the site's set-up. The setup of submitit."""
    profile = job.profile
    lines = [
        *_which_run(job),
        f"dpscale_max_crashes={profile.max_crashes} dpscale_max_fruitless={MAX_FRUITLESS}",
    ]
    if job.log_needs_redirect:
        lines.append('exec >>"$dpscale_run/attempts/job-$SLURM_JOB_ID.log" 2>&1')
    lines += [HEAD.rstrip("\n"), *body_of_tasks(job)]
    for source, destination in profile.stage.items():
        lines += [
            'srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 '
            f"cp -ruT -- {shlex.quote(source)} {shlex.quote(destination)}"
            ' || { code=$?; echo "dpscale: staging ended with code $code"; exit "$code"; }'
        ]
    return [*lines, DEADLINE.rstrip("\n")]


def _which_run(job: Job) -> list[str]:
    if not job.points:
        return [f"dpscale_run={shlex.quote(job.run_dir)}"]
    runs, configs = (shlex.join(words) for words in zip(*job.points, strict=True))
    chosen = "dpscale_run=${dpscale_runs[$SLURM_ARRAY_TASK_ID]} dpscale_config=${dpscale_configs[$SLURM_ARRAY_TASK_ID]}"
    return [f"dpscale_runs=({runs})", f"dpscale_configs=({configs})", chosen]


def body_of_tasks(job: Job) -> list[str]:
    """What the tasks need around them: the directory, the site's set-up, the variables."""
    variables = job.profile.variables() | {"DPSCALE_STOP_MARGIN_S": str(job.stop_margin_s)}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return [f"cd -- {shlex.quote(job.working_directory)} || exit 2", *job.profile.setup, *exports]


def srun_lines(job: Job) -> list[str]:
    """The tasks. Their exit code is the script's, which `dpscale_ended` reads."""
    command = ["srun", *SRUN_OPTIONS, *job.profile.srun_args, *job.srun_args, *interpreter(job)]
    if job.task_words:
        return [shlex.join(command) + " \\", f"  {shlex.join(job.task_words)}"]
    arguments = ["-m", "launch.runtime", *(["--new-attempt"] if job.new_attempt else []), "--logs", "--run-dir"]
    what = shlex.join([job.run_dir, "--", job.config, *job.overrides])
    if job.points:
        what = '"$dpscale_run" -- "$dpscale_config"'
    return [shlex.join(command) + " \\", f"  {shlex.join(arguments)} {what}"]


def interpreter(job: Job) -> list[str]:
    """The words that start Python, in the site's container if it has one."""
    return [*job.profile.container, job.profile.python or job.python]


def by_hand() -> str:
    """slurm/train.sbatch: the same job without a launcher. Its options may be given to sbatch on the command line."""
    options = {
        "job-name": "dpscale",
        "nodes": "1",
        "ntasks-per-node": "1",
        "time": "1:00:00",
        "signal": "USR2@180",
        "requeue": None,
        "open-mode": "append",
        "output": "dpscale-%j.out",
    }
    lines = ["#!/bin/bash", BY_HAND_HELP.rstrip("\n"), *header(options), "", BY_HAND_START + HEAD, BY_HAND_END]
    return "\n".join(lines)


BY_HAND_HELP = """\
# Train without a launcher:
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/train.sbatch CONFIG [section.key=value ...]
# from the directory that the config's relative paths mean. Any option below may be given to sbatch instead.
# DPSCALE_RUN_DIR: the run directory (default runs/NAME); DPSCALE_PYTHON: the interpreter (default .venv/bin/python,
# else python3). Site set-up (modules, containers, network variables) goes before srun, at the end of this file.
"""

BY_HAND_START = """\
if [[ $# -lt 1 ]]; then echo "usage: sbatch [options] $0 CONFIG [section.key=value ...]"; exit 2; fi
dpscale_python=${DPSCALE_PYTHON:-python3}
if [[ -z ${DPSCALE_PYTHON:-} && -x $PWD/.venv/bin/python ]]; then dpscale_python=$PWD/.venv/bin/python; fi
dpscale_run=${DPSCALE_RUN_DIR:-$("$dpscale_python" -m launch.default_run_dir -- "$@")} || exit 2
dpscale_max_crashes=${DPSCALE_MAX_CRASHES:-3} dpscale_max_fruitless=10
"""

BY_HAND_END = DEADLINE + "\n" + shlex.join(["srun", *SRUN_OPTIONS]) + ' "$dpscale_python" -m launch.runtime --logs \\\n'
BY_HAND_END += '  --run-dir "$dpscale_run" -- "$@"\n'


def job_name(run_name: str) -> str:
    """A name that every SLURM and every shell takes as it is."""
    return "dpscale-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name)[:48]


def _sbatch_quoted(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_./+=@,:%~\[\]-]+", value):
        return value
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value and "\\" not in value:
        return f'"{value}"'
    raise InputError(f"{value!r} has both kinds of quotes, which sbatch cannot read: use one kind")
