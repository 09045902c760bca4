#!/usr/bin/bash
stopped=/lustre/users/ada/runs/qwen3_32b_gsm8k/logs/stopped.json
[ "$SLURM_NODEID" -ne 0 ] || rm -f "$stopped"  # of the attempt before
# Signals to a job reach each of its processes. Ranks save and stop; this shell outlives
# them, to tell; torchrun ignores signals, and gets 0 from ranks that stopped, since it
# would report anything else as a failure.
trap : TERM USR1
(trap '' TERM USR1; export PROMA_STOP_CODE=0; exec torchrun --nnodes=2 --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --nproc-per-node=8 --signals-to-handle=SIGHUP,SIGQUIT -m proma_megatron.cli train /nemo_run/code/proma_job.yaml --resume-or-start)
code=$?
if [ "${SLURM_NODEID:-0}" -eq 0 ] && [ -e "$stopped" ]; then code=75; fi
exit $code
