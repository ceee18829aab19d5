#!/usr/bin/env bash
#
# Start torchrun for one host or many, with what it leaves wrong by default set.
#
#   launch/torchrun.sh [OPTION=VALUE …] -m ast_dist.train --preset imagenet --run-dir RUN …
#
#   One host, all GPUs       launch/torchrun.sh -m ast_dist.train …
#   One to four hosts, each  NNODES=1:4 RDZV_ENDPOINT=host0:29400 RDZV_ID=job7 launch/torchrun.sh -m ast_dist.train …
#   Under Slurm              srun --ntasks-per-node=1 launch/supervise launch/torchrun.sh -m ast_dist.train …
#                            with NNODES=1:$SLURM_NNODES and RDZV_ENDPOINT=<first host of $SLURM_JOB_NODELIST>
#
# Options, each also an environment variable:
#   --nnodes=N or MIN:MAX      NNODES (1). With a range, hosts may leave and join; the global batch stays.
#   --nproc-per-node=N         NPROC_PER_NODE (all GPUs, or 1)
#   --rdzv-endpoint=HOST:PORT  RDZV_ENDPOINT: where the hosts meet, the same on all; for several hosts
#   --rdzv-id=NAME             RDZV_ID ($SLURM_JOB_ID): the job's name, the same on all hosts; for several hosts.
#                              The same name goes on with the same job, whatever --resume says: another job, another name
#   --rdzv-conf=KEY=V,KEY=V    RDZV_CONF: added to the settings below; is_host=1 where torchrun does not see that
#                              RDZV_ENDPOINT is this host (an alias, a second network)
#   --local-addr=ADDRESS       LOCAL_ADDR: this host's address, where its name leads to another network
#   --max-restarts=N           MAX_RESTARTS (1000)
#   --shutdown-timeout=N       SHUTDOWN_TIMEOUT (150), seconds
# Other options of torchrun pass through, as --OPTION=VALUE. PYTHON picks the interpreter.
#
# What is set, and why:
#   --max-restarts=1000        torchrun's 0 ends the job at the first lost worker. launch/supervise sees to it that
#                              restarts which gain no step come to an end, and so does a mistake in the command.
#   --monitor-interval=0.2     A dead worker is noticed in 0.2 s (5 s in some versions).
#   last_call_timeout=10       How long complete hosts wait for one more. torchrun's 30 s are lost at each change.
#   keep_alive 2 s × 5         A host that is lost without a word is given up after 10 s, not 15. Clocks of the hosts
#                              may differ by less than that.
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (several hosts)
#                              Else workers meet in the agents' store, where addresses of killed workers still stand:
#                              a job of two hosts died when a third came (pytorch/pytorch#135712).
#   SIGUSR1 is passed on       Slurm's and many clusters' warning; it would kill the agent, and its workers unsaved.
#                              Older versions of torchrun know no such setting: there the agent ignores it.
#   --shutdown-timeout=150     How long workers may save after a signal; --checkpoint.grace-s ends them sooner. Torchrun
#                              kills them after 30 s. Older versions know no such setting.
#   OMP_NUM_THREADS=1          Unless set: more threads than cores only slow down, and change the order of sums.
#   AST_DIST_AGENT_PID         Tells workers whose death is their own, too.
#   AST_DIST_COMMAND           This very command, for the run's last words; launch/supervise says its own.
#   AST_DIST_LAUNCH (several hosts)
#                              One job to --resume, however many of its hosts are left.
set -euo pipefail

usage() { sed -n '3,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

refuse() {
  echo "error: launch/torchrun.sh: $1" >&2
  exit 2
}

printf -v typed '%q ' "$0" "$@"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi

nnodes="${NNODES:-1}"
nproc="${NPROC_PER_NODE:-}"
endpoint="${RDZV_ENDPOINT:-}"
id="${RDZV_ID:-${SLURM_JOB_ID:-}}"
conf="${RDZV_CONF:-}"
address="${LOCAL_ADDR:-}"
max_restarts="${MAX_RESTARTS:-1000}"
shutdown="${SHUTDOWN_TIMEOUT:-150}"
options=()
while (($#)); do
  word="$1"
  case "${word//_/-}" in
    -h | --help) usage; exit 0 ;;
    --nnodes=*) nnodes="${word#*=}" ;;
    --nproc-per-node=*) nproc="${word#*=}" ;;
    --rdzv-endpoint=*) endpoint="${word#*=}" ;;
    --rdzv-id=*) id="${word#*=}" ;;
    --rdzv-conf=*) conf="${word#*=}" ;;
    --local-addr=*) address="${word#*=}" ;;
    --max-restarts=*) max_restarts="${word#*=}" ;;
    --standalone) nnodes=1 ;;
    --rdzv-backend=*) [[ "${word#*=}" == c10d ]] || refuse "$word: only c10d is set up here. Use torchrun itself." ;;
    --no-python | --run-path | --virtual-local-rank) options+=("$word") ;;
    --shutdown-timeout=*) shutdown="${word#*=}" ;;
    --) shift; break ;;
    -m | --module) break ;;
    --*=*) options+=("$word") ;;
    -*) refuse "$word: an option of torchrun's is written --OPTION=VALUE, and what to run begins with -m or a script." ;;
    *) break ;;
  esac
  shift
done
(($#)) || refuse "nothing to run. Example: launch/torchrun.sh -m ast_dist.train --help"

[[ "$nnodes" =~ ^([1-9][0-9]*)(:([1-9][0-9]*))?$ ]] || refuse "--nnodes=$nnodes: expected N or MIN:MAX, from 1 up."
min_nodes="${BASH_REMATCH[1]}" max_nodes="${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}"
((min_nodes <= max_nodes)) || refuse "--nnodes=$nnodes: at least $min_nodes hosts, but at most $max_nodes. Turn them round."
[[ "$shutdown" =~ ^[1-9][0-9]*$ ]] || refuse "--shutdown-timeout=$shutdown: expected seconds, from 1 up."
[[ "$max_restarts" =~ ^[0-9]+$ ]] || refuse "--max-restarts=$max_restarts: expected a number from 0 up."
if [[ -z "$nproc" ]]; then
  nproc=1
  if command -v nvidia-smi >/dev/null && [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]; then nproc=gpu; fi
fi
[[ "$nproc" =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]] || refuse "--nproc-per-node=$nproc: expected a number from 1 up, or gpu."

command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON: no such program."
run_py="$("$PYTHON" - <<'PYTHON_END'
import importlib.util, pathlib
torch = importlib.util.find_spec("torch")
print(pathlib.Path(torch.origin).parent / "distributed" / "run.py" if torch and torch.origin else "")
PYTHON_END
)"
[[ -n "$run_py" ]] || refuse "$PYTHON has no torch. Activate the environment that has it, or set PYTHON."

if ((max_nodes == 1)); then
  options+=(--standalone)
else
  [[ -n "$endpoint" ]] || refuse "several hosts need --rdzv-endpoint=HOST:PORT, one of them, the same on all."
  [[ -n "$id" ]] || refuse "several hosts need --rdzv-id=NAME, the job's name, the same on all."
  settings="last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=5${conf:+,$conf}"
  options+=(--rdzv-backend=c10d "--rdzv-endpoint=$endpoint" "--rdzv-id=$id" "--rdzv-conf=$settings")
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  export AST_DIST_LAUNCH="torchrun $id"
fi
[[ -z "$address" ]] || options+=("--local-addr=$address")
if grep -q -e '--signals-to-handle' "$run_py"; then
  options=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${options[@]}")
else
  trap '' USR1
fi
if grep -q -e '--shutdown-timeout' "$run_py"; then
  options=("--shutdown-timeout=$shutdown" "${options[@]}")
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export AST_DIST_AGENT_PID=$$
export AST_DIST_COMMAND="${AST_DIST_COMMAND:-${typed% }}"
# exec: whoever watches this process watches the agent.
exec "$PYTHON" -m torch.distributed.run --monitor-interval=0.2 "--max-restarts=$max_restarts" "--nnodes=$nnodes" \
  "--nproc-per-node=$nproc" "${options[@]}" "$@"
