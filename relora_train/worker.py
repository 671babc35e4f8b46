"""The entry point of every worker process: `python -m relora_train.worker MODULE …` is `python -m MODULE …`.

An error on the way to its work, such as a package that cannot be imported, is reported as one in it is.
"""

import runpy
import sys

from relora_train.process import leave, run_reported

if __name__ == "__main__":
    module = sys.argv.pop(1)
    leave(run_reported(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)))
