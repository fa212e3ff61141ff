#!/bin/bash
# sbatch recipes/slurm/one-node.sh run.yaml [fsdp2-8-gpus.yaml]: one node, DDP or the named file of recipes/accelerate.
#SBATCH --job-name=ncalign
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
run=${1:?give the configuration of the run: sbatch recipes/slurm/one-node.sh run.yaml}
launcher=recipes/accelerate/${2:-ddp-8-gpus.yaml}

# --resume starts at the beginning where there is no checkpoint, so that a job that is requeued goes on (set save_steps).
srun --kill-on-bad-exit=1 accelerate launch --config_file "$launcher" -m ncalign train --config "$run" --resume
