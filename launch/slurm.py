"""Submit a training to Slurm: the same as `proma launch slurm`, with the same arguments."""

import sys

from proma_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["launch", "slurm"]
    main()
