#!/usr/bin/env bash
# A search as a job of Slurm, which goes on by itself after each time limit:
#   sbatch deploy/slurm.sh NAME STORAGE [FLAGS OF launch.py search]
#   sbatch --array=1-3 deploy/slurm.sh seed-%a STORAGE --seed %a        several, %a being the number in the array
# STORAGE is a folder that all nodes reach, or a URI. Run from the repository's folder. See docs/cluster.md.
#SBATCH --job-name=crucible
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
set -m  # or what runs in the background ignores the interrupt by which a search saves itself

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  if [[ $1 != *%a* ]]; then
    echo "error: the name of a search in an array must hold %a, the number in the array, but is $1" >&2
    exit 2
  fi
  set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
fi
name=$1 storage=$2
shift 2
ray=${CRUCIBLE_RAY:-.venv/bin/ray} python=${CRUCIBLE_PYTHON:-.venv/bin/python}
nodes=${SLURM_JOB_NUM_NODES:-1}
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_ADDRESS=$head:$port
# Whoever reaches the port could run code as you.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}
temp=/tmp/ray-$SLURM_JOB_ID  # /tmp/ray may be another user's
more="--num-cpus=${SLURM_CPUS_PER_TASK:-1} --disable-usage-stats --block"

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  "$ray" start --head --node-ip-address="$head" --port="$port" --ray-client-server-port=$((port + 20000)) \
  --include-dashboard=false --temp-dir="$temp" $more &
running=($!)
if ((nodes > 1)); then
  srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$head" --overlap \
    bash -c "until (: < /dev/tcp/$head/$port) 2> /dev/null; do sleep 1; done
      for try in 1 2 3; do  # Ray gives a node half a minute to start
        $ray start --address=$RAY_ADDRESS --temp-dir=$temp-worker $more && exit || sleep 5
      done" &
  running+=($!)
fi
stop() {
  kill -TERM "${running[@]}" 2> /dev/null || true
  wait "${running[@]}" 2> /dev/null || true
  rm -rf "$temp" "$temp-worker"
}
trap stop EXIT

$python - "$nodes" <<'PYTHON'
import sys, time, ray
until = time.time() + 300
while True:
    try:
        ray.init("auto", logging_level="ERROR")
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[1]):
            sys.exit()
    except (ConnectionError, RuntimeError):
        pass
    ray.shutdown()
    if time.time() > until:
        sys.exit("not all nodes came within 300 s")
    time.sleep(2)
PYTHON

if $python launch.py list searches --storage "$storage" --json | grep -F "\"$name\"" > /dev/null; then
  $python launch.py resume "$name" --storage "$storage" --address auto &
else
  $python launch.py search --name "$name" --storage "$storage" --address auto "$@" &
fi
search=$!
ended=0
trap 'ended=1; kill -TERM $search' TERM  # the time limit is near: save
wait $search && code=0 || code=$?
if ((ended)); then
  trap '' TERM  # putting the job back ends it
  wait $search && code=0 || code=$?
  # Whoever cancels a job wants it to end: Slurm would put that one back into the queue too.
  state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")
  if [[ $state == RUNNING ]] && ((code == 130 || code == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit $code
