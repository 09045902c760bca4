#!/usr/bin/bash
trap : TERM USR1
(trap '' USR1; exec torchrun --nnodes=2 --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --nproc-per-node=8 --signals-to-handle=SIGHUP,SIGQUIT -m proma_megatron.cli eval /lustre/users/ada/runs/qwen3_32b_gsm8k --data /lustre/data/test.parquet --overwrite)
code=$?
exit $code
