"""Train on this machine: the same as `proma launch local`, with the same arguments."""

import sys

from proma_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["launch", "local"]
    main()
