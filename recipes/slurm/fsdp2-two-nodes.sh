#!/bin/bash
# sbatch recipes/slurm/fsdp2-two-nodes.sh run.yaml: two nodes of eight GPUs, weights sharded over all sixteen.
#SBATCH --job-name=ncalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
export run=${1:?give the configuration of the run: sbatch recipes/slurm/fsdp2-two-nodes.sh run.yaml}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export main=${hosts%%$'\n'*}

# One launcher a node; SLURM_NODEID differs between them. --resume starts at the beginning where there is no checkpoint.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file recipes/accelerate/fsdp2-two-nodes.yaml \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$main" -m ncalign train --config "$run" --resume'
