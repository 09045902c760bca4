#!/usr/bin/bash
trap : TERM USR1
(trap '' USR1; exec torchrun --nnodes=2 --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --nproc-per-node=8 --signals-to-handle=SIGHUP,SIGQUIT -m proma_megatron.cli export /lustre/users/ada/runs/qwen3_32b_gsm8k --out /lustre/users/ada/runs/qwen3_32b_gsm8k/export --overwrite parallel.data=1)
code=$?
exit $code
